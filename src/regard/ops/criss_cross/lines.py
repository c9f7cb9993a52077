"""Maps on CPU: batched products over the lines of (H, B, W, C) storage, where rows and columns are both views.

At most CHUNK_BYTES of weights live at a time: a map that needs more goes in blocks of rows, whose weights are computed anew in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 << 20


def criss_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k (B, H, W, d), v (B, H, W, C), best as transposes of contiguous (H, B, W, .)."""
    return _Lines.apply(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1)  # type: ignore[union-attr]


class _Lines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, p = [], None
        for block in _blocks(q):
            p = _weights(q, k, block)
            out.append(_gather(p, v, block))
        ctx.save_for_backward(q, k, v, p if len(out) == 1 else None)
        return _join(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, kept = ctx.saved_tensors
        h, dq, dk, dv = k.shape[0], [], _Sum(), _Sum()
        grad = grad.contiguous()
        for block in _blocks(q):
            p = _weights(q, k, block) if kept is None else kept
            mine = grad[block]
            ds = torch.empty_like(p)
            ds[..., h:] = torch.bmm(_rows(mine), _rows(v[block]).mT).view_as(ds[..., h:])
            _columns(ds[..., :h]).copy_(torch.bmm(_columns(mine), _columns(v).mT))
            dv.add(_rows(p[..., h:]).mT, _rows(mine), _columns(p[..., :h]).mT, _columns(mine))
            ds = torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype)
            dq.append(_gather(ds, k, block))
            dk.add(_rows(ds[..., h:]).mT, _rows(q[block]), _columns(ds[..., :h]).mT, _columns(q[block]))
        return _join(dq), dk.total(k), dv.total(v)


class _Sum:
    """What the keys gather: from each block of queries its rows, and a share of every column."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.columns: Tensor | None = None

    def add(self, row_weights: Tensor, row: Tensor, column_weights: Tensor, column: Tensor) -> None:
        self.rows.append(torch.bmm(row_weights, row))
        share = torch.bmm(column_weights, column)
        self.columns = share if self.columns is None else self.columns.add_(share)

    def total(self, like: Tensor) -> Tensor:
        out = _join(self.rows).view(like.shape)
        assert self.columns is not None
        _columns(out).add_(self.columns)
        return out


def _blocks(q: Tensor) -> list[slice]:
    h, b, w, _ = q.shape
    step = max(1, min(h, CHUNK_BYTES // max(1, b * w * (h + w) * q.element_size())))
    return [slice(low, min(low + step, h)) for low in range(0, h, step)]


def _weights(q: Tensor, k: Tensor, block: slice) -> Tensor:
    """(rows, B, W, H + W) of the queries in a block of rows."""
    (h, b, w, _), own = k.shape, q[block]
    p = q.new_empty(own.shape[0], b, w, h + w)
    p[..., h:] = torch.bmm(_rows(own), _rows(k[block]).mT).view(own.shape[0], b, w, w)
    column = torch.bmm(_columns(own), _columns(k).mT)
    column.diagonal(block.start, 1, 2).fill_(float("-inf"))  # the row counts the pixel itself
    _columns(p[..., :h]).copy_(column)
    return torch.softmax(p, -1, out=p)


def _gather(p: Tensor, v: Tensor, block: slice) -> Tensor:
    """(rows, B, W, C) of the queries in a block of rows."""
    h, own = v.shape[0], v[block]
    out = torch.bmm(_rows(p[..., h:]), _rows(own)).view(own.shape)
    _columns(out).add_(torch.bmm(_columns(p[..., :h]), _columns(v)))
    return out


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _rows(x: Tensor) -> Tensor:
    """(H, B, W, c) -> (H B, W, c)."""
    return x.flatten(0, 1)


def _columns(x: Tensor) -> Tensor:
    """(H, B, W, c) -> (B W, H, c)."""
    return x.flatten(1, 2).transpose(0, 1)
