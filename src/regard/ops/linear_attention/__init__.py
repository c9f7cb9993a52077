"""Attention through feature maps: products taken right to left, causal in chunks, recomputed block by block."""

from .api import blockwise, linear_attention, prefix_softmax_attention
from .chunks import chunk_size, full_precision

__all__ = ["blockwise", "chunk_size", "full_precision", "linear_attention", "prefix_softmax_attention"]
