"""Softmax attention for queries and keys narrower than the values, exact, a few queries at a time, with its own gradient.

The fused kernel needs equal widths: zeros in narrow queries and keys would cost as much as the values do. Here a block of queries has all its scores
at once, in a buffer that stays in cache, and the gradient computes them again. Numbers to subtract from every score of a row (its log sum of
exponentials, its share of the gradient) are carried as one more channel against ones, which costs no pass over the scores.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._linear import linear
from .._operator import operator

BLOCK_BYTES = 2 << 20
SMALL = 40.0


def _rows(keys: int, like: Tensor) -> int:
    """A multiple of 16, which the products of `linear` like."""
    return max(16, BLOCK_BYTES // (keys * like.element_size()) // 16 * 16)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q, k (B, N, d), (B, M, d), v (B, M, dv) -> what was gathered (B, N, dv) and the log sums of exponentials (B, N)."""
    out, lse = v.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2])
    step = _rows(k.shape[1], q)
    buffer = q.new_empty(step, k.shape[1])
    for b in range(q.shape[0]):
        keys, values = (scale * k[b]).mT, v[b].mT.contiguous()
        # No score is larger than this product of norms: small ones need no maximum taken off before their exponentials.
        small = bool(q[b].norm(dim=1).amax() * keys.norm(dim=0).amax() < SMALL)
        for i in range(0, q.shape[1], step):
            rows = slice(i, i + step)
            scores = buffer[: q[b, rows].shape[0]]
            torch.mm(q[b, rows], keys, out=scores)
            top = scores.new_zeros(1) if small else scores.amax(1, keepdim=True)
            total = (scores if small else scores.sub_(top)).exp_().sum(1, keepdim=True)
            torch.div(linear(scores, values), total, out=out[b, rows])
            lse[b, rows] = total.log_().add_(top)[:, 0]
    return out, lse


def _backward(dy: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    step = _rows(k.shape[1], q)
    weights = q.new_empty(step, k.shape[1])
    for b in range(q.shape[0]):
        keys, values = F.pad(scale * k[b], (0, 1), value=1.0), F.pad(v[b], (0, 1), value=1.0)
        queries, cotangents = torch.cat((q[b], -lse[b, :, None]), 1), torch.cat((dy[b], -(dy[b] * out[b]).sum(1, keepdim=True)), 1)
        for i in range(0, q.shape[1], step):
            rows = slice(i, i + step)
            w = weights[: q[b, rows].shape[0]]
            torch.mm(queries[rows], keys.mT, out=w).exp_()
            dv[b].addmm_(w.mT, dy[b, rows])
            ds = linear(cotangents[rows], values).mul_(w)
            torch.mm(ds, k[b], out=dq[b, rows])
            dk[b].addmm_(ds.mT, q[b, rows])
    return dq.mul_(scale), dk.mul_(scale), dv


def _like(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2])


def _flops(q: Any, k: Any, v: Any, *options: Any) -> int:
    return 2 * q[0] * q[1] * k[1] * (q[2] + v[2])


def _backward_flops(dy: Any, dlse: Any, q: Any, k: Any, v: Any, *options: Any) -> int:
    """The scores once more, and the gradients of both factors of both products."""
    return 2 * q[0] * q[1] * k[1] * (3 * q[2] + 2 * v[2])


_attention = operator(
    "narrow_attention",
    _forward,
    _backward,
    _like,
    tensors=3,
    outputs=2,
    keep_outputs=True,
    flops=_flops,
    backward_flops=_backward_flops,
)


def pairwise_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _attention(q, k, v, scale)[0]
