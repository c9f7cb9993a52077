"""Quasi-attention: tanh of an affinity, gated by a distance; weights between -1 and 1 that no softmax normalises."""

from .api import l1_attention, l1_weights

__all__ = ["l1_attention", "l1_weights"]
