"""Softmax attention over all allowed pairs: the fused kernel under masks, biases and unequal widths; weights where they are asked for."""

from .api import attend, attention_weights, causal_mask, combine_masks

__all__ = ["attend", "attention_weights", "causal_mask", "combine_masks"]
