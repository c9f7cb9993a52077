"""Some queries and keys at a time, computed again in the backward pass; one operator to torch.compile and torch.export."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._operator import operator

Piece = tuple[slice, slice, slice]
CPU, OTHER = 2**18, 2**25  # floats of (samples, queries, keys, d) in a piece; 1 MB stays in the cache


def _pieces(q: Tensor, k: Tensor) -> Iterator[Piece]:
    """Samples, queries, keys."""
    (b, n, d), m = q.shape, k.shape[1]
    limit = CPU if _dispatch.on_cpu(q) else OTHER
    columns = max(1, min(m, limit // d))
    rows = max(1, min(n, limit // (columns * d)))
    samples = max(1, limit // (columns * rows * d))
    for i in range(0, b, samples):
        for row in range(0, n, rows):
            for column in range(0, m, columns):
                yield slice(i, i + samples), slice(row, row + rows), slice(column, column + columns)


def _inner(q: Tensor, k: Tensor, piece: Piece, activation: str) -> Tensor:
    samples, rows, columns = piece
    total = q[samples, rows, None] + k[samples, None, columns]
    return total.tanh_() if activation == "tanh" else total.relu_()


def _scores(q: Tensor, k: Tensor, v: Tensor, activation: str) -> Tensor:
    out = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    for piece in _pieces(q, k):
        out[piece] = _inner(q, k, piece, activation) @ v
    return out


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for piece in _pieces(q, k):
        samples, rows, columns = piece
        g, t = grad[piece], _inner(q, k, piece, activation)
        dv += g.flatten() @ t.flatten(0, 2)
        if activation == "relu":
            t = t.sign_()  # the derivative
            dq[samples, rows] += (g[:, :, None] @ t)[:, :, 0]
            dk[samples, columns] += t.mul_(g[..., None]).sum(1)
        else:
            t = t.square_()  # the derivative of tanh is 1 - t^2
            dq[samples, rows] += g.sum(2, keepdim=True) - (g[:, :, None] @ t)[:, :, 0]
            dk[samples, columns] += g.sum(1)[..., None] - t.mul_(g[..., None]).sum(1)
    return dq.mul_(v), dk.mul_(v), dv


def _like(q: Tensor, k: Tensor, v: Tensor, activation: str) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1])


def _flops(q: Any, k: Any, v: Any, activation: str) -> int:
    """The product with v."""
    return 2 * q[0] * q[1] * k[1] * q[2]


def _backward_flops(grad: Any, q: Any, k: Any, v: Any, activation: str) -> int:
    """Two for each of the three gradients."""
    return 3 * _flops(q, k, v, activation)


scores = operator("additive_scores", _scores, _backward, _like, tensors=3, flops=_flops, backward_flops=_backward_flops)
