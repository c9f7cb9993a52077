"""A few heads and queries at a time, in the cache: the scores are computed again in the backward pass, and never stored."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .._operator import operator

CPU_SCORES, OTHER_SCORES = 2**19, 2**24  # 2 MB of float32, and 64 MB


def _pieces(q: Tensor, keys: int) -> Iterator[tuple[int, slice, slice]]:
    """(member of the batch, heads, queries)."""
    batch, heads, n = q.shape[:3]
    budget = CPU_SCORES if q.device.type == "cpu" else OTHER_SCORES
    rows = max(1, min(n, budget // keys))
    group = max(1, min(heads, budget // (keys * rows)))
    for b in range(batch):
        for h in range(0, heads, group):
            for r in range(0, n, rows):
                yield b, slice(h, h + group), slice(r, r + rows)


def _scores(q: Tensor, k: Tensor, row: Tensor, column: Tensor) -> Tensor:
    places = row[..., :, None] + column[..., None, :]
    if not q.shape[-1]:
        return places.flatten(-2)
    return torch.baddbmm(places.flatten(-2), q, k.mT)


def _forward(q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    out, total = v.new_empty(*q.shape[:3], v.shape[3]), v.new_empty(q.shape[:3])
    for b, h, r in _pieces(q, k.shape[2]):
        scores = _scores(q[b, h, r], k[b, h], row[b, h, r], column[b, h, r])
        top = scores.amax(-1, keepdim=True)
        scores.sub_(top).exp_()
        mass = scores.sum(-1, keepdim=True)
        out[b, h, r] = torch.bmm(scores, v[b, h]).div_(mass)
        total[b, h, r] = mass.log_().add_(top)[..., 0]
    return out, total


def _backward(
    d_out: Tensor, d_total: Tensor, q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, drow, dcolumn = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, row, column))
    for b, h, r in _pieces(q, k.shape[2]):
        weights = _scores(q[b, h, r], k[b, h], row[b, h, r], column[b, h, r]).sub_(total[b, h, r, None]).exp_()
        grad = d_out[b, h, r]
        dv[b, h].baddbmm_(weights.mT, grad)
        expected = (grad * out[b, h, r]).sum(-1, keepdim=True)
        d_scores = torch.bmm(grad, v[b, h].mT).sub_(expected).mul_(weights)
        dq[b, h, r] = torch.bmm(d_scores, k[b, h])
        dk[b, h].baddbmm_(d_scores.mT, q[b, h, r])
        d_places = d_scores.unflatten(-1, (row.shape[-1], column.shape[-1]))
        drow[b, h, r], dcolumn[b, h, r] = d_places.sum(-1), d_places.sum(-2)
    return dq, dk, dv, drow, dcolumn


def _fake(q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), v.new_empty(q.shape[:3])


def _products(q: torch.Size, k: torch.Size) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2]


chunked_attend = operator(
    "separable_attention",
    _forward,
    _backward,
    _fake,
    tensors=5,
    outputs=2,
    keep_outputs=True,
    flops=lambda q, k, v, *rest: _products(q, k) * (q[3] + v[3]),
    backward_flops=lambda d_out, d_total, q, k, v, *rest: _products(q, k) * (3 * q[3] + 2 * v[3]),
)
