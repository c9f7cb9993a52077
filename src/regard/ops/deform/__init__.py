"""Samples off the grid: deformable unfolding and convolution, and weighted sums of such samples."""

from .api import deform_apply, deform_conv2d, deform_unfold

__all__ = ["deform_apply", "deform_conv2d", "deform_unfold"]
