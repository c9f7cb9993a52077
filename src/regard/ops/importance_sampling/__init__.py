"""Attention by sampling: features drawn around keys, and estimates of softmax attention through a few Gaussian proposals."""

from .api import Mixture, mixture_attention, mixture_weights
from .draws import draw_keys
from .features import draw_features, feature_attention, feature_weights

__all__ = ["Mixture", "draw_features", "draw_keys", "feature_attention", "feature_weights", "mixture_attention", "mixture_weights"]
