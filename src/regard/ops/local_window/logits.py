"""Logits of every pixel with its neighbours: one pass over the logits for each channel of a group, no copy of the keys for each neighbour."""

import torch
from torch import Tensor

from .flat import Flat
from .window import accumulator


def forward(q: Tensor, k: Tensor, op: str, kernel: int, stride: int, dilation: int, first: int, scale: float, mask: bool) -> Tensor:
    """q (B, G, e, H', W'), k (B, G, e, H, W) -> (B, G, k^2, H', W'), in at least float32."""
    flat = Flat(q, k, kernel, stride, dilation, first)
    out = q.new_empty(*q.shape[:2], kernel**2, *q.shape[-2:], dtype=flat.dtype)
    for box in flat.boxes(2 * q.shape[2] + (0 if op == "product" else kernel**2)):
        queries, keys = flat.read(q, box), flat.neighbours(k, box)
        logits = keys.new_zeros(*keys.shape[:2], *keys.shape[3:])
        for c in range(q.shape[2]):
            one, other = queries[:, :, c, None, None], keys[:, :, c]
            if op == "product":
                logits.addcmul_(one, other, value=scale)
            elif op == "squared":
                difference = one - other
                logits.addcmul_(difference, difference, value=-scale)
            else:
                logits.sub_((one - other).abs_(), alpha=scale)
        if mask:
            no_row, no_column = flat.outside(box)
            logits.masked_fill_(no_row[:, None, :, None] | no_column[None, :, None], float("-inf"))
        flat.write(out, box, logits.flatten(2, 3))
    return out


def backward(
    dlogits: Tensor, q: Tensor, k: Tensor, op: str, kernel: int, stride: int, dilation: int, first: int, scale: float, mask: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of q and k. What is outside the map is a zero key, or, masked, has no gradient."""
    flat = Flat(q, k, kernel, stride, dilation, first)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(k, dtype=accumulator(k), memory_format=torch.contiguous_format)
    for box in flat.boxes(5 * q.shape[2]):
        queries, keys, given = flat.read(q, box), flat.neighbours(k, box), flat.read(dlogits, box).unflatten(2, (kernel, kernel))
        if mask:
            no_row, no_column = flat.outside(box)
            given.masked_fill_(no_row[:, None, :, None] | no_column[None, :, None], 0)
        dqueries, band = torch.zeros_like(queries), flat.band(k, box)
        dkeys = flat.view(band, box)
        for i, j in flat.shifts():
            one = given[:, :, None, i, j]
            if op == "product":
                dqueries.addcmul_(one, keys[:, :, :, i, j], value=scale)
                dkeys[:, :, :, i, j].addcmul_(one, queries, value=scale)
            else:
                difference = queries - keys[:, :, :, i, j]
                slope = difference.mul_(2) if op == "squared" else difference.sign_()
                slope *= one
                dqueries.sub_(slope, alpha=scale)
                dkeys[:, :, :, i, j].add_(slope, alpha=scale)
        flat.add(dk, box, band)
        flat.write(dq, box, dqueries)
    return dq, dk.to(k.dtype)
