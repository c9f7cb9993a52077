"""Softmax attention over all allowed pairs: the fused kernel under masks, biases and unequal widths; weights where they are asked for."""

from .api import attend, attend_key_bias, attention_weights, causal_mask, combine_masks, rows_of

__all__ = ["attend", "attend_key_bias", "attention_weights", "causal_mask", "combine_masks", "rows_of"]
