"""Forward and backward over a few heads and rows at a time: every N x M matrix exists in parts of about 2 MB, and none is kept.

    W = c T G,   T = tanh(q k^T),   G = sigmoid(Z),   Z = -beta (D - mean D),   out = W v,   back = W^T u

The mean over a matrix needs all its distances: a head of up to 8 MB is taken whole, above that their sum is found by sorting.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from ..linear_attention.blocked import blocks_of
from ..softmax_attention import causal_mask, combine_masks
from .distances import distance_backward, mean_distance, mean_distance_backward
from .reference import mean


class Problem(NamedTuple):
    """q, a (B, H, N, d); k, b (B, H, M, d); v (B, H, M, dv); u (B, H, N, du); beta (B, H); rows (B, N); keys (B, M); pairs broadcast to (B, H, N, M).

    factor: of the weights. center: "", "row" or "matrix". causal: key j is allowed for query i if j <= i + M - N.
    """

    q: Tensor
    k: Tensor
    a: Tensor
    b: Tensor
    v: Tensor
    u: Tensor | None
    beta: Tensor
    rows: Tensor | None
    keys: Tensor | None
    pairs: Tensor | None
    causal: bool
    factor: float
    center: str


class Matrices(NamedTuple):
    """Of some rows of some heads: tanh, gate, centred distance, and which pairs are allowed."""

    tanh: Tensor
    gate: Tensor
    distance: Tensor
    mask: Tensor | None


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    (batch, heads, n, _), width = p.q.shape, p.v.shape[3]
    out = p.v.new_zeros(batch, n, heads, width).transpose(1, 2)  # heads merge without a copy
    back = p.v.new_zeros(0) if p.u is None else p.u.new_zeros(*p.v.shape[:3], p.u.shape[3])
    for block, some in _blocks(p):
        center = mean_distance(some.a, some.b, some.rows, some.keys) if _sorts(p) else None
        for rows, stop in _spans(p):
            x = _matrices(some, rows, stop, center)
            w = _masked(x.tanh.mul_(x.gate), x.mask).mul_(p.factor)
            out[block][:, :, rows] = w @ some.v[:, :, :stop]
            if some.u is not None:
                back[block][:, :, :stop] += w.mT @ some.u[:, :, rows]
    return out, back


def backward(d_out: Tensor, d_back: Tensor | None, p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, a, b, v, u and beta."""
    dq, dk, da, db, dv, dbeta = (torch.zeros_like(t) for t in (p.q, p.k, p.a, p.b, p.v, p.beta))
    du = p.v.new_zeros(0) if p.u is None else torch.zeros_like(p.u)
    for block, some in _blocks(p):
        beta, gathered = some.beta[..., None, None], 0.0
        center = mean_distance(some.a, some.b, some.rows, some.keys) if _sorts(p) else None
        for rows, stop in _spans(p):
            x, grad, v = _matrices(some, rows, stop, center), d_out[block][:, :, rows], some.v[:, :, :stop]
            w = _masked(x.tanh * x.gate, x.mask).mul_(p.factor)
            dv[block][:, :, :stop] += w.mT @ grad
            dw = grad @ v.mT
            if some.u is not None and d_back is not None:
                d_stop = d_back[block][:, :, :stop]
                du[block][:, :, rows] = w @ d_stop
                dw += some.u[:, :, rows] @ d_stop.mT
            del w
            dw = _masked(dw, x.mask).mul_(p.factor).mul_(x.gate)
            dz = (dw * x.tanh).mul_(x.gate.neg_().add_(1))
            de = dw.mul_(x.tanh.square_().neg_().add_(1))
            dq[block][:, :, rows] = de @ some.k[:, :, :stop]
            dk[block][:, :, :stop] += de.mT @ some.q[:, :, rows]
            dbeta[block] -= (dz * x.distance).sum((2, 3))
            if p.center and center is None:
                dz = _masked(dz - mean(dz, x.mask, p.center), x.mask)
            gathered = gathered + dz.sum((2, 3), keepdim=True)
            parts = distance_backward(dz.mul_(-beta), some.a[:, :, rows], some.b[:, :, :stop])
            da[block][:, :, rows] += parts[0]
            db[block][:, :, :stop] += parts[1]
        if center is not None:
            parts = mean_distance_backward(beta * gathered, some.a, some.b, some.rows, some.keys)
            da[block] += parts[0]
            db[block] += parts[1]
    return dq, dk, da, db, dv, du, dbeta


def _limits(x: Tensor) -> tuple[int, int]:
    """Floats of an N x M matrix worked on at a time, and up to which a head is taken whole."""
    return (1 << 19, 1 << 21) if _dispatch.on_cpu(x) else (1 << 24, 1 << 26)


def _sorts(p: Problem) -> bool:
    """Whether the mean comes from sorting; an arbitrary mask of pairs leaves no way but all pairs of a head at once."""
    return p.center == "matrix" and p.pairs is None and p.q.shape[2] * p.k.shape[2] > _limits(p.q)[1]


def _blocks(p: Problem) -> Iterator[tuple[tuple[slice, slice], Problem]]:
    """Some batch elements and heads at a time, with their part of the tensors."""
    for block in blocks_of(p.q.shape[0], p.q.shape[1], p.q.shape[2] * p.k.shape[2], _limits(p.q)[0]):
        whole = {name: t[block] for name in ("q", "k", "a", "b", "v", "u", "beta") if (t := getattr(p, name)) is not None}
        rows, keys = (None if t is None else t[block[0]] for t in (p.rows, p.keys))
        pairs = None if p.pairs is None else p.pairs[block[0]] if p.pairs.shape[1] == 1 else p.pairs[block]
        yield block, p._replace(**whole, rows=rows, keys=keys, pairs=pairs)


def _spans(p: Problem) -> Iterator[tuple[slice, int]]:
    """Some rows at a time, and how many keys they may see."""
    n, m = p.q.shape[2], p.k.shape[2]
    step = n if p.center == "matrix" and not _sorts(p) else max(1, _limits(p.q)[0] // max(m, 1))
    for start in range(0, n, max(step, 1)):
        stop = min(start + step, n)
        yield slice(start, stop), min(max(stop + m - n, 0), m) if p.causal else m


def _allowed(p: Problem, rows: slice, stop: int) -> Tensor | None:
    """The masks of some rows and the first keys, as one."""
    n, m, device = p.q.shape[2], p.k.shape[2], p.q.device
    return combine_masks(
        None if p.rows is None else p.rows[:, None, rows, None],
        None if p.keys is None else p.keys[:, None, None, :stop],
        None if p.pairs is None else (p.pairs[:, :, rows] if p.pairs.shape[2] > 1 else p.pairs)[..., :stop],
        causal_mask(n, m, device, torch.arange(rows.start, rows.stop, device=device))[:, :stop] if p.causal else None,
    )


def _matrices(p: Problem, rows: slice, stop: int, center: Tensor | None) -> Matrices:
    mask, far = _allowed(p, rows, stop), torch.cdist(p.a[:, :, rows], p.b[:, :, :stop], p=1)
    if p.center:
        far -= mean(far, mask, p.center) if center is None else center
    tanh = (p.q[:, :, rows] @ p.k[:, :, :stop].mT).tanh_()
    return Matrices(tanh, (far * -p.beta[..., None, None]).sigmoid_(), far, mask)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill_(~mask, 0.0)
