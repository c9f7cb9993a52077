"""As folded, a few heads at a time, with its own backward pass: kept are the small sums; the features are made again, the recurrence is run again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linear_attention.blocked import Block, blocks_of
from .shrinkage import Shrink
from .solve import features, solve, unit

FLOATS = 2**18  # of features in a block: 1 MB


def sparse_recon(
    q: Tensor,
    v: Tensor,
    random: Tensor,
    static: Tensor | None,
    static_gram: Tensor | None,
    mixing: Tensor,
    threshold: Tensor,
    step: Tensor,
    steps: int,
    shrink: Shrink,
) -> tuple[Tensor, Tensor]:
    return _Blocked.apply(steps, shrink, q, v, random, static, static_gram, mixing, threshold, step)  # type: ignore[return-value]


def _cut(tensors: Sequence[Tensor | None], block: Block) -> list[Any]:
    """The block of tensors (B or 1, H or 1, ...)."""
    rows, heads = block
    every = slice(None)
    return [None if t is None else t[rows if t.shape[0] > 1 else every, heads if t.shape[1] > 1 else every] for t in tensors]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: int, shrink: Shrink, *tensors: Any) -> tuple[Tensor, Tensor]:
        q, _, random, *_ = tensors
        (batch, heads, n, d), m = q.shape, random.shape[-1]
        ctx.blocks, ctx.options = blocks_of(batch, heads, n * m, FLOATS), {"steps": steps, "shrink": shrink}
        out = q.new_empty(batch, n, heads, d).transpose(1, 2)  # heads merge without a copy
        code = q.new_empty(batch, heads, tensors[5].shape[-1], d)
        kept = []
        for block in ctx.blocks:
            qb, vb, rb, static, *small = _cut(tensors, block)
            f = features(unit(qb), rb)
            sums: Any = (f.mT @ f, f.mT @ vb, *((None, None) if static is None else (f.mT @ static, static.mT @ vb)))
            code[block], weights = solve(*sums, *small, steps=steps, shrink=shrink)
            out[block] = f @ weights[..., :m, :] if static is None else f @ weights[..., :m, :] + static @ weights[..., m:, :]
            kept += sums
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return out, code

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_code: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        tensors, kept = saved[:8], saved[8:]
        d_out = torch.zeros_like(tensors[1]) if d_out is None else d_out
        totals = [torch.zeros_like(t) if needed else None for t, needed in zip(tensors, ctx.needs_input_grad[2:], strict=True)]
        for at, block in enumerate(ctx.blocks):
            q, v, random, static, *small = _cut(tensors, block)
            with torch.enable_grad():
                q = q.detach().requires_grad_()
                u = unit(q)
                leaves = [None if t is None else t.detach().requires_grad_() for t in (*kept[4 * at : 4 * at + 4], *small)]
                z, weights = solve(*leaves, **ctx.options)  # type: ignore[arg-type]
            f, g = features(u.detach(), random), d_out[block]
            moving, still = weights.detach().tensor_split([random.shape[-1]], -2)
            change = f.mT @ g if static is None else torch.cat((f.mT @ g, static.mT @ g), -2)
            ends, starts = ([weights], [change]) if d_code is None else ([weights, z], [change, d_code[block]])
            found = iter(torch.autograd.grad(ends, [t for t in leaves if t is not None], starts, materialize_grads=True))
            results: list[Any] = [None if t is None else next(found) for t in leaves]
            gram, target, cross, static_target, *d_small = results
            d_v, d_f, d_static = f @ target, f @ (gram + gram.mT), None
            d_f += v @ target.mT
            d_f += g @ moving.mT
            if cross is not None and static_target is not None:
                d_v += static @ static_target
                d_f += static @ cross.mT
                d_static = f @ cross
                d_static += v @ static_target.mT
                d_static += g @ still.mT
            d_f *= f
            d_random = None if totals[2] is None else u.detach().mT @ d_f
            (d_q,) = torch.autograd.grad(u, q, d_f @ random.mT - u.detach() * d_f.sum(-1, keepdim=True))
            for total, part in zip(_cut(totals, block), (d_q, d_v, d_random, d_static, *d_small), strict=True):
                if total is not None and part is not None:
                    total += part.sum_to_size(total.shape)
        return None, None, *totals
