"""Attention by a pointwise function of the scores instead of a softmax: whole or in chunks joined by a linear part, block by block."""

from .api import ACTIVATIONS, gated_attention, gated_weights

__all__ = ["ACTIVATIONS", "gated_attention", "gated_weights"]
