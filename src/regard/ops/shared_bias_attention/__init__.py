"""Gated attention within each row of a map, with scores that all rows share."""

from .api import row_attention, row_weights

__all__ = ["row_attention", "row_weights"]
