"""Kernels that say how near two nodes of a graph are, and attention whose weights they multiply."""

from .api import attend, weights
from .checks import check_frequency, check_matrix
from .kernels import (
    diffusion_kernel,
    kernel_of,
    neighbour_kernel,
    normalise_rows,
    random_walk_frequency,
    random_walk_kernel,
    real_part,
    symmetric_operator,
    taylor_kernel,
)

__all__ = [
    "attend",
    "check_frequency",
    "check_matrix",
    "diffusion_kernel",
    "kernel_of",
    "neighbour_kernel",
    "normalise_rows",
    "random_walk_frequency",
    "random_walk_kernel",
    "real_part",
    "symmetric_operator",
    "taylor_kernel",
    "weights",
]
