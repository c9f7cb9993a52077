"""Queries in the order of their starts, some at a time: together they need one stretch of keys, and a dense product with it.

No row is gathered. With R queries at a time the stretches sum up to at most M + N / R (count + 1) keys, wherever the queries look.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .reference import positions


def _parts(start: Tensor, count: int, keys: int) -> Iterator[tuple[int, Tensor, slice, Tensor]]:
    """Sample, queries, the stretch of their keys, and where in it each query's keys are."""
    size = min(256, max(32, count))
    for i, (order, low) in enumerate(zip(start.argsort(1), start.sort(1).values.tolist(), strict=True)):
        for first in range(0, len(low), size):
            some = order[first : first + size]
            a = min(max(low[first], 0), keys - 1)
            b = min(max(low[first + len(some) - 1] + count - 1, 0), keys - 1)
            yield i, some, slice(a, b + 1), positions(start[i, some], count, keys) - a


def _matrix(w: Tensor, stretch: slice, at: Tensor) -> Tensor:
    """Weights (R, count) as (R, stretch)."""
    return w.new_zeros(w.shape[0], stretch.stop - stretch.start).scatter_add_(1, at, w)


def dots(q: Tensor, k: Tensor, start: Tensor, count: int) -> Tensor:
    out = q.new_empty(*start.shape, count)
    for i, some, stretch, at in _parts(start, count, k.shape[1]):
        out[i, some] = (q[i, some] @ k[i, stretch].mT).gather(1, at)
    return out


def sums(w: Tensor, v: Tensor, start: Tensor) -> Tensor:
    out = v.new_empty(*start.shape, v.shape[2])
    for i, some, stretch, at in _parts(start, w.shape[2], v.shape[1]):
        out[i, some] = _matrix(w[i, some], stretch, at) @ v[i, stretch]
    return out


def spread(w: Tensor, q: Tensor, start: Tensor, keys: int) -> Tensor:
    out = torch.zeros(q.shape[0], keys, q.shape[2], dtype=q.dtype, device=q.device)
    for i, some, stretch, at in _parts(start, w.shape[2], keys):
        out[i, stretch].addmm_(_matrix(w[i, some], stretch, at).mT, q[i, some])
    return out
