"""The triangle product of a map of pairs: gated projections, one product of matrices a channel, a gated projection back."""

from .api import triangle_product

__all__ = ["triangle_product"]
