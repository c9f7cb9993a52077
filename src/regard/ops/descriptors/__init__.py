"""A map summed up in a few attended descriptors, and every position's mixture of them."""

from .api import double_attention

__all__ = ["double_attention"]
