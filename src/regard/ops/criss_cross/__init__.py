"""Attention of every pixel along its own row and column (and depth), itself counted once."""

from .api import criss_cross, criss_cross_weights

__all__ = ["criss_cross", "criss_cross_weights"]
