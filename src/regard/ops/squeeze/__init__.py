"""A map summed up in one number per channel or per position: means, maxima, one attention pooling for all channels."""

from .api import attention_pool, channel_max, channel_mean, position_max, position_mean

__all__ = ["attention_pool", "channel_max", "channel_mean", "position_max", "position_mean"]
