"""Sums of outer products of two sets of vectors, projected, without the tensor of all outer products."""

from .api import counts, outer_product

__all__ = ["counts", "outer_product"]
