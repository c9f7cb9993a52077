"""The form for CPU: rows of blocks sorted by how many of their blocks are refined, and worked through in runs of nearly equal ones.

A run is one batched dense attention, b queries against the keys of their refined blocks. It is merged with the other blocks by log-sum-exp,

    e^L = e^F + e^R Z + 1e-6 e^max(F, R),   out = e^(F - L) out_F + e^(R - L) C
    a_ij = t_j e^(l_ij - R_i) for blocks that are not refined,   Z_i = sum_j a_ij,   C_i = sum_j a_ij V_j

where F is that of the refined scores, and stands here for their maximum: the term of 1e-6 is at most 1e-6 of the total either way. The gradient of
a run needs only L and out, as in `softmax_attention.blocks`: scores are formed anew in the backward pass and nothing else is kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._operator import operator
from .._precision import at_least_float32
from .choice import Resolution, choose, counts, in_blocks, mask_blocks, means, parts

aten = torch.ops.aten
INF = float("inf")
GROUP = 1 << 18  # numbers of one tensor, or of one matrix of coarse scores, that are worked on at a time
RUN = 1 << 17  # numbers of the keys gathered at a time


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, resolution: Resolution) -> Tensor:
    """(B, H, N, d), differentiable once."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _call(q, k, v, key_mask, resolution.numbers(), scale)[0].transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, options: Sequence[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """On (B, N, H, d); also L, (B, H, n b), and the refined blocks as flat indices, (B H K,)."""
    resolution = Resolution.of(options)
    (batch, length, heads, _), b = q.shape, resolution.block_size
    n = resolution.rows(length)
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, n * b), dtype=at_least_float32(q))
    picked = q.new_empty((batch, heads, resolution.refined(n)), dtype=torch.long)
    for some, mask in _groups(q, key_mask, resolution):
        qb, kb, vb = (_load(x, some, n, b, mask) for x in (q, k, v))
        scores = scale * means(qb, mask) @ means(kb, mask).mT
        chosen = choose(scores, mask, resolution)
        o, e = torch.zeros_like(qb), lse.new_full(qb.shape[:3], -INF)
        for rows, columns, bias in _runs(chosen, n, RUN // (b * q.shape[-1]), mask, lse.dtype, b):
            part, found = aten._scaled_dot_product_flash_attention_for_cpu(
                _rows(qb, rows), _keys(kb, columns), _keys(vb, columns), 0.0, False, attn_mask=bias, scale=scale
            )
            if bias is not None:  # the kernel says 0 for a row without keys
                found = found.masked_fill((bias == -INF).all(-1), -INF)
            o.flatten(0, 1).index_copy_(0, rows, part[:, 0])
            e.flatten(0, 1).index_copy_(0, rows, found[:, 0])
        best = scores.amax(-1, keepdim=True)
        if resolution.coarse:
            rest = _rest(scores, best, chosen, mask, qb)
            most = torch.maximum(e, best)
            log = most + ((e - most).exp() + (best - most).exp() * rest.sum(-1, keepdim=True) + 1e-6).log()
            o.mul_((e - log).exp().unsqueeze(-1)).addcmul_((best - log).exp().unsqueeze(-1), (rest @ means(vb, mask)).unsqueeze(-2))
        else:
            most = e.masked_fill(e == -INF, 0.0)
            log = most + ((e - most).exp() + 1e-6).log()
            o.mul_((e - log).exp().unsqueeze(-1))
        _store(out, some, o if mask is None else o.masked_fill_(~mask.unsqueeze(-1), 0.0))
        lse[some[0], some[1]] = log.flatten(1)
        picked[some[0], some[1]] = chosen
    return out, lse, picked.flatten()


def _backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    grad_picked: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    picked: Tensor,
    options: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    resolution = Resolution.of(options)
    n, b = resolution.rows(q.shape[1]), resolution.block_size
    picked = picked.view(*lse.shape[:2], resolution.refined(n))
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    for some, mask in _groups(q, key_mask, resolution):
        qb, kb, vb, gb, ob = (_load(x, some, n, b, mask) for x in (q, k, v, grad, out))
        log, chosen = lse[some[0], some[1]].unflatten(1, (n, b)), picked[some[0], some[1]]
        gq, gk, gv = (torch.zeros_like(qb) for _ in range(3))
        for rows, columns, bias in _runs(chosen, n, RUN // (b * q.shape[-1]), mask, lse.dtype, b):
            given = (_rows(gb, rows), _rows(qb, rows), _keys(kb, columns), _keys(vb, columns), _rows(ob, rows), _rows(log, rows))
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False, attn_mask=bias, scale=scale)
            gq.flatten(0, 1).index_copy_(0, rows, found[0][:, 0])
            for total, part in ((gk, found[1]), (gv, found[2])):
                total.flatten(0, 1).index_add_(0, columns.flatten(), part.unflatten(2, (-1, b)).flatten(0, 2))
        if resolution.coarse:
            qm, km, vm = (means(x, mask) for x in (qb, kb, vb))
            scores = scale * qm @ km.mT
            best = scores.amax(-1, keepdim=True)
            rest = _rest(scores, best, chosen, mask, qb)
            weight = (best - log).exp()
            back = (weight.unsqueeze(-2) @ gb).squeeze(-2)  # what each row of blocks passes to its means, (g, n, d)
            change = rest * (back @ vm.mT - (weight * (gb * ob).sum(-1)).sum(-1, keepdim=True)) * scale
            share = parts(mask, qb)[..., None, None]
            for total, of_means in ((gq, change @ km), (gk, change.mT @ qm), (gv, rest.mT @ back)):
                total.add_(of_means.unsqueeze(-2) * share)
        for total, x in ((dq, gq), (dk, gk), (dv, gv)):
            _store(total, some, x if mask is None else x.masked_fill_(~mask.unsqueeze(-1), 0.0))
    return dq, dk, dv


def _groups(q: Tensor, key_mask: Tensor | None, resolution: Resolution) -> Iterator[tuple[tuple[int, slice], Tensor | None]]:
    """Samples and heads to work through one after the other, so that what is temporary stays small; the mask of the sample, (n, b)."""
    batch, length, heads, d = q.shape
    n = resolution.rows(length)
    step = max(1, GROUP // max(length * d, n * n, 1))
    mask = mask_blocks(key_mask, q.transpose(1, 2), n, resolution.block_size)[:, 0] if resolution.masked(length, key_mask) else None
    for sample in range(batch):
        for first in range(0, heads, step):
            yield (sample, slice(first, first + step)), None if mask is None else mask[sample]


def _load(x: Tensor, some: tuple[int, slice], n: int, b: int, mask: Tensor | None) -> Tensor:
    """(g, n, b, d), in memory order."""
    x = x[some[0], :, some[1]].transpose(0, 1)
    return in_blocks(x.to(at_least_float32(x)), n, b, mask).contiguous()


def _store(total: Tensor, some: tuple[int, slice], x: Tensor) -> None:
    total[some[0], :, some[1]] = x.flatten(1, 2)[:, : total.shape[1]].transpose(0, 1)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """(R, 1, b, ...), as the kernel takes its queries."""
    return x.flatten(0, 1).index_select(0, rows).unsqueeze(1)


def _keys(x: Tensor, columns: Tensor) -> Tensor:
    """(R, 1, w b, d) for columns (R, w)."""
    return x.flatten(0, 1).index_select(0, columns.flatten()).unflatten(0, columns.shape).flatten(1, 2).unsqueeze(1)


def _rest(scores: Tensor, best: Tensor, chosen: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """t_j e^(l_ij - R_i), zero where refined."""
    rest = (scores - best).exp_().mul_(counts(mask, like))
    rest.flatten(1).scatter_(1, chosen, 0.0)
    return rest


def _runs(chosen: Tensor, n: int, blocks: int, mask: Tensor | None, dtype: torch.dtype, b: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows (R,) of the g n rows of blocks, their refined columns (R, w), and the bias that hides masked keys and what fills up short rows.

    Rows without a refined block are left out. A run gathers up to `blocks` blocks, one row at least.
    """
    heads = n * torch.arange(chosen.shape[0], device=chosen.device)[:, None]
    row, order = (heads + chosen // n).flatten().sort(stable=True)
    column = (heads + chosen % n).flatten()[order]
    count = torch.bincount(row, minlength=n * chosen.shape[0])
    start = count.cumsum(0) - count
    ranked, sizes = count.argsort(descending=True, stable=True), count.sort(descending=True).values.tolist()
    first = 0
    while first < len(sizes) and sizes[first]:
        width = sizes[first]
        stop = min(first + max(1, blocks // width), len(sizes))
        while sizes[stop - 1] == 0:
            stop -= 1
        rows = ranked[first:stop]
        slots = torch.arange(width, device=row.device)
        columns = column[(start[rows][:, None] + slots).clamp(max=len(column) - 1)]
        seen = None if sizes[stop - 1] == width else (slots < count[rows][:, None]).unsqueeze(-1)
        if mask is not None:
            real = mask[columns % n]
            seen = real if seen is None else real & seen
        bias = None
        if seen is not None:
            hidden = ~seen.expand(*columns.shape, b).flatten(1)[:, None, None]
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -INF)
        yield rows, columns, bias
        first = stop


def _shapes(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, options: Sequence[int], scale: float) -> tuple[Tensor, ...]:
    resolution = Resolution.of(options)
    n = resolution.rows(q.shape[1])
    lse = q.new_empty((q.shape[0], q.shape[2], n * resolution.block_size), dtype=at_least_float32(q))
    return q.new_empty(q.shape), lse, q.new_empty(q.shape[0] * q.shape[2] * resolution.refined(n), dtype=torch.long)


def _count(q: Any, k: Any, v: Any, key_mask: Any, options: Sequence[int], scale: float) -> int:
    """Products of refined blocks, coarse scores and what they weigh. What fills up short rows of a run depends on the data and is not counted."""
    (batch, length, heads, d), resolution = q, Resolution.of(options)
    n = resolution.rows(length)
    return batch * heads * d * (4 * resolution.refined(n) * resolution.block_size**2 + (4 if resolution.coarse else 2) * n * n)


def _count_backward(*args: Any) -> int:
    """As the fused kernels count it: the scores once more, and the gradients of both factors of every product."""
    (batch, length, heads, d), resolution = args[3], Resolution.of(args[-2])
    n = resolution.rows(length)
    return batch * heads * d * (10 * resolution.refined(n) * resolution.block_size**2 + (10 if resolution.coarse else 0) * n * n)


_call = operator(
    "multiresolution_rows",
    _forward,
    _backward,
    _shapes,
    tensors=4,
    wanted=(0, 1, 2),
    outputs=3,
    keep_outputs=True,
    flops=_count,
    backward_flops=_count_backward,
)
