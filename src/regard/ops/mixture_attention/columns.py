"""What every key collects from the queries that weigh it: W^T v, a tile of W at a time, W formed again in the backward pass.

One operator to torch.compile and torch.export, which therefore never see a length.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._operator import operator

TILE = 2**20  # scores worked on at a time on a CPU: 4 MB stay in its cache
WIDE_TILE = 2**26


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T)^T v on (B, H, N, D), (B, H, M, D), (B, H, N, E): (B, H, M, E)."""
    out = q.new_zeros((*k.shape[:3], v.shape[3]))
    for keys, rows in _tiles(q, k):
        out[keys] += _weights(q[rows], k[keys], _part(mask, rows)).mT @ v[rows]
    return out


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_empty(v.shape)
    for keys, rows in _tiles(q, k):
        weights = _weights(q[rows], k[keys], _part(mask, rows))
        dv[rows] = weights @ grad[keys]
        change = torch._softmax_backward_data(v[rows] @ grad[keys].mT, weights, -1, weights.dtype)
        dq[rows] = change @ k[keys]
        dk[keys] += change.mT @ q[rows]
    return dq, dk, dv


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Samples and heads, and the same with some of their queries: all the keys of each."""
    (b, h, n, _), m = q.shape, k.shape[2]
    limit = TILE if _dispatch.on_cpu(q) else WIDE_TILE
    rows = max(1, min(n, limit // max(m, 1)))
    heads = max(1, min(h, limit // max(rows * m, 1)))
    samples = max(1, min(b, limit // max(rows * m * h, 1)))
    for i, j, r in product(range(0, b, samples), range(0, h, heads), range(0, n, rows)):
        keys = (slice(i, i + samples), slice(j, j + heads))
        yield keys, (*keys, slice(r, r + rows))


def _part(mask: Tensor | None, tile: tuple[slice, ...]) -> Tensor | None:
    return None if mask is None else mask[tuple(at if size > 1 else slice(None) for at, size in zip(tile, mask.shape, strict=False))]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.mT
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill_(~mask, float("-inf")).softmax(-1).masked_fill_(~mask, 0.0)  # the second for rows without keys, NaN before


def _like(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return q.new_empty((*k.shape[:3], v.shape[3]))


def _flops(q: Any, k: Any, v: Any, mask: Any) -> int:
    b, h, n, d = q
    return 2 * b * h * n * k[2] * (d + v[3])


def _backward_flops(grad: Any, q: Any, k: Any, v: Any, mask: Any) -> int:
    """The scores once more, and the gradients of both factors of both products."""
    b, h, n, d = q
    return 2 * b * h * n * k[2] * (3 * d + 2 * v[3])


column_sums = operator("column_sums", _forward, _backward, _like, tensors=4, wanted=(0, 1, 2), flops=_flops, backward_flops=_backward_flops)
