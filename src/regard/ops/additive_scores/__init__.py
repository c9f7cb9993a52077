"""Additive scores v . f(q + k), f tanh or ReLU, without a tensor of queries x keys x width."""

from .api import additive_scores

__all__ = ["additive_scores"]
