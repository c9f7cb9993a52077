"""A neighbourhood for every pixel: sums of neighbours with given weights, and attention of blocks of pixels to a window around them."""

from .api import Window, carafe, window_apply, window_attention, window_attention_weights

__all__ = ["Window", "carafe", "window_apply", "window_attention", "window_attention_weights"]
