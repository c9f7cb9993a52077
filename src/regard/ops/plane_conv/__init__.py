"""A convolution of a few planes to one plane, with a large kernel."""

from .api import plane_conv

__all__ = ["plane_conv"]
