"""Between the chunks: lq times sums of lk^T v over chunks, carried for each sample from group to group, and their gradient the other way."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .cuts import Group, groups, limit_of


def forward(out: Tensor, lq: Tensor, lk: Tensor, v: Tensor, length: int, before: bool) -> None:
    """Adds to `out` what each chunk reads of the chunks before it, or of its own."""
    for group, sums in _sums(lk, v, length, before):
        group.add(out, group.take(lq).to(sums.dtype) @ sums)


def backward(grad: Tensor, lq: Tensor, lk: Tensor, v: Tensor, dv: Tensor, length: int, before: bool) -> tuple[Tensor, Tensor]:
    """Gradients of lq and lk; adds to `dv`."""
    dlq, dlk = lq.new_empty(lq.shape), lk.new_empty(lk.shape)
    for group, sums in _sums(lk, v, length, before):
        group.put(dlq, group.take(grad).to(sums.dtype) @ sums.mT)
    for group, sums in _sums(lq, grad, length, before, backwards=True):
        group.put(dlk, group.take(v).to(sums.dtype) @ sums.mT)
        group.add(dv, group.take(lk).to(sums.dtype) @ sums)
    return dlq, dlk


def _sums(a: Tensor, b: Tensor, length: int, before: bool, backwards: bool = False) -> Iterator[tuple[Group, Tensor]]:
    """For each group the sums of a^T b that its chunks read, (chunks, s, e): before each, after it if `backwards`, or its own; float32 at least."""
    (batch, n, s), e, dtype = a.shape, b.shape[2], torch.promote_types(a.dtype, torch.float32)
    carry = a.new_zeros((batch, 1, s, e), dtype=dtype)
    parts = list(groups(batch, n, length, max(s, length) * e, limit_of(a)))
    for group in reversed(parts) if backwards else parts:
        sums = group.take(a).to(dtype).mT @ group.take(b).to(dtype)
        if before:
            own, so_far = group.per_sample(sums), carry[group.samples]
            order = own.flip(1) if backwards else own
            order = torch.cat((so_far, order), 1).cumsum(1)
            so_far.copy_(order[:, -1:])
            sums = (order[:, :-1].flip(1) if backwards else order[:, :-1]).flatten(0, 1)
        yield group, sums
