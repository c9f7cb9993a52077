"""The definition: scores along every axis side by side, one softmax over all of them. q, k (B, *space, d), v (B, *space, C)."""

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor) -> Tensor:
    """(B, *space, sum of the sides). A pixel is on all its axes: only the last one counts it."""
    axes, scores = range(1, q.ndim - 1), []
    for axis in axes:
        score = q.movedim(axis, -2) @ k.movedim(axis, -2).mT
        if axis != axes[-1]:
            score = score.masked_fill(torch.eye(q.shape[axis], dtype=torch.bool, device=q.device), float("-inf"))
        scores.append(score.movedim(-2, axis))
    return torch.cat(scores, -1).softmax(-1)


def gather(w: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros_like(v)
    for axis, part in enumerate(w.split(v.shape[1:-1], -1), 1):
        out = out + (part.movedim(axis, -2) @ v.movedim(axis, -2)).movedim(-2, axis)
    return out
