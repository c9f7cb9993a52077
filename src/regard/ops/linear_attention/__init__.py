"""Attention through feature maps: products taken right to left, causal in chunks, recomputed block by block, or one position at a time."""

from .api import blockwise, linear_attention, prefix_softmax_attention
from .chunks import chunk_size, full_precision
from .memory import causal_memory_attention
from .weights import effective_weights, prefix_softmax_weights

__all__ = [
    "blockwise",
    "causal_memory_attention",
    "chunk_size",
    "effective_weights",
    "full_precision",
    "linear_attention",
    "prefix_softmax_attention",
    "prefix_softmax_weights",
]
