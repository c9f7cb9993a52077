"""Gathering a map into one number per channel or per position, and scaling it by a gate: few passes over the map, forward and backward."""

from .api import attention_pool, channel_max, channel_mean, position_max, position_mean, scale

__all__ = ["attention_pool", "channel_max", "channel_mean", "position_max", "position_mean", "scale"]
