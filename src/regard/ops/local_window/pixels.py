"""Attention of every pixel to its own window: a multiply-add of maps for each channel (logits) or neighbour (values), with no copy of the keys for
each neighbour. The backward computes the weights again instead of keeping them.

The relative term is separable: high[i] + wide[j] for the neighbour (i, j), where the codes high and wide depend on the query alone; a border mask is
a large negative code.
"""

import torch
from torch import Tensor

from .flat import Box, Flat
from .window import accumulator


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor | None,
    mix: Tensor | None,
    kernel: int,
    stride: int,
    dilation: int,
    first: int,
    scale: float,
    mask: bool,
) -> Tensor:
    """q (B, N, d, H', W'), k (B, N, d, H, W), v (B, N, M dv, H, W), rel (N or 1, 2 k, d), mix (M, k^2) -> (B, N, dv, H', W')."""
    flat = Flat(q, k, kernel, stride, dilation, first)
    count = 1 if mix is None else mix.shape[0]
    out = v.new_empty(*q.shape[:2], v.shape[2] // count, *q.shape[-2:])
    for box in flat.boxes(2 * q.shape[2] + 2 * v.shape[2]):
        queries = flat.read(q, box).mul_(scale)
        weights = _weights(flat, box, queries, flat.neighbours(k, box), rel, mask)
        values = flat.neighbours(v, box).unflatten(2, (count, -1))
        y = values.new_zeros(*values.shape[:2], values.shape[3], *values.shape[-2:])
        for m in range(count):
            mixed = weights if mix is None else weights * _part(mix, m, weights)
            for i, j in flat.shifts():
                y.addcmul_(mixed[:, :, None, i, j], values[:, :, m, :, i, j])
        flat.write(out, box, y)
    return out


def backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor | None,
    mix: Tensor | None,
    kernel: int,
    stride: int,
    dilation: int,
    first: int,
    scale: float,
    mask: bool,
) -> list[Tensor]:
    """The gradients of q, k, v, rel and mix (of the last two: nothing, where there are none)."""
    flat, acc = Flat(q, k, kernel, stride, dilation, first), accumulator(q)
    count = 1 if mix is None else mix.shape[0]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (k, v))
    drel = q.new_zeros(0) if rel is None else q.new_zeros(q.shape[1], *rel.shape[1:], dtype=acc)
    dmix = q.new_zeros(0 if mix is None else mix.shape, dtype=acc)
    for box in flat.boxes(4 * q.shape[2] + 4 * v.shape[2]):
        queries, keys = flat.read(q, box).mul_(scale), flat.neighbours(k, box)
        weights = _weights(flat, box, queries, keys, rel, mask)
        values, dout, band = flat.neighbours(v, box).unflatten(2, (count, -1)), flat.read(dy, box), flat.band(v, box)
        dvalues = flat.view(band, box).unflatten(2, (count, -1))
        dweights = torch.zeros_like(weights)
        for m in range(count):
            mixed = weights if mix is None else weights * _part(mix, m, weights)
            for i, j in flat.shifts():
                dvalues[:, :, m, :, i, j].addcmul_(mixed[:, :, None, i, j], dout)
            found = dweights if mix is None else torch.zeros_like(weights)
            for c in range(dout.shape[2]):
                found.addcmul_(dout[:, :, c, None, None], values[:, :, m, c])
            if mix is not None:
                dmix[m] += (weights * found).sum((0, 1, 4, 5)).flatten()
                dweights.addcmul_(found, _part(mix, m, weights))
        flat.add(dv, box, band)
        dlogits = torch._softmax_backward_data(dweights.flatten(2, 3), weights.flatten(2, 3), 2, acc).view_as(weights)
        dqueries, band = torch.zeros_like(queries), flat.band(k, box)
        dkeys = flat.view(band, box)
        for i, j in flat.shifts():
            dqueries.addcmul_(dlogits[:, :, None, i, j], keys[:, :, :, i, j])
            dkeys[:, :, :, i, j].addcmul_(dlogits[:, :, None, i, j], queries)
        flat.add(dk, box, band)
        if rel is not None:
            dcodes = torch.cat([dlogits.sum(3), dlogits.sum(2)], 2).flatten(3)
            dqueries += (_tables(rel, flat, box).mT @ dcodes).view_as(dqueries)
            drel[box[1]] += (dcodes @ queries.flatten(3).mT).sum(0)
        flat.write(dq, box, dqueries.mul_(scale))
    drel = drel if rel is None else drel.sum_to_size(rel.shape).to(rel.dtype)
    return [dq, dk.to(k.dtype), dv.to(v.dtype), drel, dmix if mix is None else dmix.to(mix.dtype)]


def _tables(rel: Tensor, flat: Flat, box: Box) -> Tensor:
    return rel.expand(flat.q.shape[1], -1, -1)[box[1]].to(flat.dtype)


def _part(mix: Tensor, m: int, weights: Tensor) -> Tensor:
    return mix[m].to(weights.dtype).view(*weights.shape[2:4], 1, 1)


def _weights(flat: Flat, box: Box, queries: Tensor, keys: Tensor, rel: Tensor | None, mask: bool) -> Tensor:
    """(b, n, k, k, rows, columns)."""
    b, n, d, rows, columns = queries.shape
    logits = queries.new_empty(b, n, flat.kernel, flat.kernel, rows, columns)
    high = wide = queries.new_zeros(1, 1, flat.kernel, 1, 1)
    if rel is not None:
        codes = (_tables(rel, flat, box) @ queries.flatten(3)).view(b, n, 2 * flat.kernel, rows, columns)
        high, wide = codes.split(flat.kernel, 2)
    if mask:
        lost = torch.finfo(logits.dtype).min / 4
        no_row, no_column = flat.outside(box)
        high, wide = high.masked_fill(no_row[:, :, None], lost), wide.masked_fill(no_column[:, None], lost)
    logits.copy_(high[:, :, :, None]).add_(wide[:, :, None])
    for c in range(d):
        logits.addcmul_(queries[:, :, c, None, None], keys[:, :, c])
    return torch.softmax(logits.flatten(2, 3), 2, out=logits.flatten(2, 3)).view_as(logits)
