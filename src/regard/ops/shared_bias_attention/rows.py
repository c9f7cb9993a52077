"""Some rows at a time, scores computed again in the backward pass; one operator to torch.compile and torch.export.

With `whole` None, x holds the projections: they are kept for the backward pass, not computed again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._linear import linear, linear_gradients
from .._operator import operator

CPU, OTHER = 2**20, 2**27  # scores, and projected values, of the rows worked on at a time; 4 MB stay in the cache


def _pieces(x: Tensor, width: int, heads: int) -> Iterator[tuple[int, slice]]:
    """Sample, rows."""
    b, r, n, _ = x.shape
    step = max(1, (CPU if _dispatch.on_cpu(x) else OTHER) // max(heads * n * n, n * width))
    for i in range(b):
        for row in range(0, r, step):
            yield i, slice(row, row + step)


def _project(x: Tensor, whole: Tensor | None, gate_bias: Tensor, heads: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """The elements (m, C), their q, k, v (rows, H, L, d), and the gates (m, H d)."""
    flat = x.reshape(-1, x.shape[-1])
    y = flat if whole is None else linear(flat, whole)
    width = gate_bias.shape[0]
    q, k, v = (t.unflatten(0, x.shape[:2]).unflatten(2, (heads, -1)).transpose(1, 2).contiguous() for t in y[:, : 3 * width].split(width, 1))
    return flat, [q, k, v], (y[:, 3 * width :] + gate_bias).sigmoid_()


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(q, k.mT)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if bias is not None:
        scores += bias
    if mask is None:
        return torch.softmax(scores, -1, out=scores)
    hidden = ~mask[:, None, None]
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, out=scores).masked_fill_(hidden, 0.0)


def _merged(x: Tensor) -> Tensor:
    """(rows, H, L, d) -> (rows L, H d)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _forward(
    x: Tensor, whole: Tensor | None, gate_bias: Tensor, out_weight: Tensor, out_bias: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int
) -> Tensor:
    out = x.new_empty(*x.shape[:3], out_bias.shape[0])
    for i, rows in _pieces(x, 4 * gate_bias.shape[0], heads):
        _, (q, k, v), gate = _project(x[i, rows], whole, gate_bias, heads)
        weights = _weights(q, k, None if bias is None else bias[i], None if mask is None else mask[i, rows])
        o = _merged(weights.to(v.dtype) @ v).mul_(gate)
        out[i, rows].flatten(0, 1).copy_(linear(o, out_weight, out_bias))
    return out


def _backward(
    grad: Tensor,
    x: Tensor,
    whole: Tensor | None,
    gate_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    heads: int,
) -> list[Tensor]:
    dx = x.new_empty(x.shape)
    wanted = x.new_empty(0) if whole is None else whole, gate_bias, out_weight, out_bias
    sums = [torch.zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32), device=t.device) for t in wanted]
    d_whole, d_gate_bias, d_out_weight, d_out_bias = sums
    d_bias = x.new_empty(0) if bias is None else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    width = gate_bias.shape[0]
    for i, rows in _pieces(x, 4 * gate_bias.shape[0], heads):
        part = x[i, rows]
        flat, (q, k, v), gate = _project(part, whole, gate_bias, heads)
        weights = _weights(q, k, None if bias is None else bias[i], None if mask is None else mask[i, rows])
        o = weights.to(v.dtype) @ v
        g = grad[i, rows].reshape(-1, grad.shape[-1])
        merged = _merged(o)
        inner, found = linear_gradients(g, merged * gate, out_weight)
        d_out_weight += found
        d_out_bias += g.sum(0)
        dy = dx[i, rows].flatten(0, 1) if whole is None else x.new_empty(len(flat), 4 * width)
        d_gate = torch.mul(inner * merged, gate * (1 - gate), out=dy[:, 3 * width :])
        d_gate_bias += d_gate.sum(0)
        do = inner.mul_(gate).unflatten(0, part.shape[:2]).unflatten(2, (heads, -1)).transpose(1, 2).contiguous()
        dv = weights.to(v.dtype).mT @ do
        ds = (do @ v.mT).to(weights.dtype)
        ds -= (do * o).sum(-1, keepdim=True, dtype=weights.dtype)
        ds *= weights
        if bias is not None:
            d_bias[i] += ds.sum(0)
        ds = ds.to(q.dtype)
        for at, t in enumerate((ds @ k, ds.mT @ q, dv)):
            dy[:, at * width : (at + 1) * width].unflatten(0, part.shape[:2]).unflatten(2, (heads, -1)).copy_(t.transpose(1, 2))
        if whole is not None:
            back, found = linear_gradients(dy, flat, whole)
            d_whole += found
            dx[i, rows].flatten(0, 1).copy_(back)
    return [dx, *(s.to(t.dtype) for s, t in zip(sums, wanted, strict=True)), d_bias]


def _like(
    x: Tensor, whole: Tensor | None, gate_bias: Tensor, out_weight: Tensor, out_bias: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int
) -> Tensor:
    return x.new_empty(*x.shape[:3], out_bias.shape[0])


def _parts(x: Any, whole: Any, out_weight: Any) -> tuple[int, int, int]:
    """The products of the projections into heads, of the scores, and of the projection out."""
    elements, width = x[0] * x[1] * x[2], out_weight[1]
    return 2 * elements * x[3] * whole[0] if whole else 0, 2 * elements * x[2] * width, 2 * elements * width * out_weight[0]


def _flops(x: Any, whole: Any, gate_bias: Any, out_weight: Any, *_: Any) -> int:
    into, scores, out = _parts(x, whole, out_weight)
    return into + 2 * scores + out


def _backward_flops(grad: Any, x: Any, whole: Any, gate_bias: Any, out_weight: Any, *_: Any) -> int:
    into, scores, out = _parts(x, whole, out_weight)
    return 3 * into + 6 * scores + 2 * out


attention = operator("shared_bias_attention", _forward, _backward, _like, tensors=7, wanted=range(6), flops=_flops, backward_flops=_backward_flops)
