"""Deformable convolution as attention: the bilinear weights of its samples, dense."""

from .api import deformable_attention_weights

__all__ = ["deformable_attention_weights"]
