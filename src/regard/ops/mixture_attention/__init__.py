"""Attention as inference in a mixture of Gaussians: responsibilities, keys and values adapted by EM, outputs."""

from .api import Mixture, adapt_keys, mixture_attend, mixture_weights, propagate_values
from .checks import check_heads, check_mixture, check_precision

__all__ = ["Mixture", "adapt_keys", "check_heads", "check_mixture", "check_precision", "mixture_attend", "mixture_weights", "propagate_values"]
