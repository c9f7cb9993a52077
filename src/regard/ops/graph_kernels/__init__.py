"""Kernels that say how near two nodes of a graph are, and attention whose weights they multiply."""

from .api import attend, weights
from .kernels import diffusion_kernel, normalise_rows, random_walk_frequency, symmetric_operator, taylor_kernel

__all__ = ["attend", "diffusion_kernel", "normalise_rows", "random_walk_frequency", "symmetric_operator", "taylor_kernel", "weights"]
