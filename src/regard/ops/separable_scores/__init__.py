"""Softmax attention over the pixels of a map, with a score for the key's row and one for its column added to the product."""

from .api import separable_attention, separable_weights
from .axis import Axis, from_blocks, span, to_blocks

__all__ = ["Axis", "from_blocks", "separable_attention", "separable_weights", "span", "to_blocks"]
