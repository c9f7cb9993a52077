"""Attention through feature maps: products taken right to left, causal in chunks, recomputed block by block, or one position at a time."""

from .api import blockwise, favor_attention, favor_runs_in_pieces, linear_attention, prefix_softmax_attention
from .chunks import chunk_size, full_precision
from .memory import causal_memory_attention
from .reference import ring_weights, toeplitz_mask
from .structured import ring_product, toeplitz_product
from .toeplitz import dense_up_to as toeplitz_dense_up_to
from .weights import effective_weights, prefix_softmax_weights

__all__ = [
    "blockwise",
    "causal_memory_attention",
    "chunk_size",
    "effective_weights",
    "favor_attention",
    "favor_runs_in_pieces",
    "full_precision",
    "linear_attention",
    "prefix_softmax_attention",
    "prefix_softmax_weights",
    "ring_product",
    "ring_weights",
    "toeplitz_dense_up_to",
    "toeplitz_mask",
    "toeplitz_product",
]
