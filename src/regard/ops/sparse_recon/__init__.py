"""Sparse reconstruction: values written as few atoms of a dictionary, found by a few steps of iterative shrinkage (ISTA)."""

from .api import fourier_recon, largest_singular, sparse_recon
from .shrinkage import SHRINK

__all__ = ["SHRINK", "fourier_recon", "largest_singular", "sparse_recon"]
