"""Attention at two resolutions: the blocks of the score matrix that matter exactly, the others by one value each."""

from .api import multiresolution, multiresolution_weights, refined_blocks
from .choice import Resolution

__all__ = ["Resolution", "multiresolution", "multiresolution_weights", "refined_blocks"]
