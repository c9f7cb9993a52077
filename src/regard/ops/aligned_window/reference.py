"""The definitions, by way of all N x M pairs."""

import torch
from torch import Tensor


def positions(start: Tensor, count: int, keys: int) -> Tensor:
    """(B, N, count): start, start + 1, ..., those outside 0..keys - 1 moved to the nearest that is not."""
    return (start.unsqueeze(-1) + torch.arange(count, device=start.device)).clamp(0, keys - 1)


def dots(q: Tensor, k: Tensor, start: Tensor, count: int) -> Tensor:
    return (q @ k.mT).gather(-1, positions(start, count, k.shape[1]))


def sums(w: Tensor, v: Tensor, start: Tensor) -> Tensor:
    weights = w.new_zeros(*start.shape, v.shape[1])
    return weights.scatter_add(-1, positions(start, w.shape[-1], v.shape[1]), w) @ v
