"""A few heads at a time, computed again in the backward pass: temporaries stay in the cache and none is kept."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Core = Callable[..., Tensor]
Block = tuple[slice, slice]


def blocks_of(batch: int, heads: int, floats: int, limit: int) -> list[Block]:
    """Blocks of (batch, head) pairs with at most `limit` floats of temporaries each, `floats` a pair; one pair at least."""
    h = max(1, min(heads, limit // max(floats, 1)))
    b = max(1, min(batch, limit // max(floats * heads, 1))) if h == heads else 1
    return [(slice(i, min(i + b, batch)), slice(j, min(j + h, heads))) for i, j in product(range(0, batch, b), range(0, heads, h))]


def run(core: Core, tensors: Sequence[Tensor | None], blocks: list[Block]) -> Tensor:
    return _Blocked.apply(core, blocks, *tensors)  # type: ignore[return-value]


def _cut(t: Tensor, block: Block) -> Tensor:
    """The block of t (B or 1, H or 1, ...)."""
    rows, heads = block
    t = t[rows] if t.shape[0] > 1 else t
    return t[:, heads] if t.shape[1] > 1 else t


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Core, blocks: list[Block], *tensors: Tensor | None) -> Tensor:
        ctx.core, ctx.blocks = core, blocks
        ctx.save_for_backward(*tensors)
        parts = (core(*[t if t is None else _cut(t, block) for t in tensors]) for block in blocks)
        part = next(parts)
        rows, heads = blocks[-1]
        out = part.new_empty(rows.stop, part.shape[2], heads.stop, part.shape[3]).transpose(1, 2)  # heads merge without a copy
        out[blocks[0]] = part
        for block, part in zip(blocks[1:], parts, strict=True):
            out[block] = part
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        totals = {i: torch.zeros_like(tensors[i]) for i in wanted}
        for block in ctx.blocks:
            leaves = {i: _cut(tensors[i], block).detach().requires_grad_() for i in wanted}
            with torch.enable_grad():
                part = ctx.core(*[leaves[i] if i in leaves else t if t is None else _cut(t, block) for i, t in enumerate(tensors)])
            found = torch.autograd.grad(part, list(leaves.values()), grad[block], materialize_grads=True)
            for i, one in zip(wanted, found, strict=True):
                _cut(totals[i], block).add_(one)
        return None, None, *[totals.get(i) for i in range(len(tensors))]
