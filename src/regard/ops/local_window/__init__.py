"""A neighbourhood for every pixel: sums of neighbours with given weights, and attention of blocks of pixels to a window around them."""

from .api import Window, window_attention, window_attention_weights, carafe, window_apply

__all__ = ["Window", "window_attention", "window_attention_weights", "carafe", "window_apply"]
