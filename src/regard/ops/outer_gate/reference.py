"""The definitions, written out."""

from torch import Tensor


def logits(channel: Tensor, position: Tensor, combine: str) -> Tensor:
    """(B, C) and (B, 1, H, W) -> (B, C, H, W): their products or sums."""
    channel = channel[:, :, None, None]
    return channel * position if combine == "mul" else channel + position


def apply(x: Tensor, channel: Tensor, position: Tensor, combine: str, at_zero: float) -> Tensor:
    return x * ((1 + logits(channel, position, combine).sigmoid()) / at_zero)
