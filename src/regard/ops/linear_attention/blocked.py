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
    return _Blocked.apply(core, blocks, *tensors)


def _cut(t: Tensor | None, block: Block) -> Tensor | None:
    """The block of t (B or 1, H or 1, ...)."""
    if t is None:
        return None
    rows, heads = block
    t = t[rows] if t.shape[0] > 1 else t
    return t[:, heads] if t.shape[1] > 1 else t


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Core, blocks: list[Block], *tensors: Tensor | None) -> Tensor:
        ctx.core, ctx.blocks = core, blocks
        ctx.save_for_backward(*tensors)
        out: Tensor | None = None
        for block in blocks:
            part = core(*[_cut(t, block) for t in tensors])
            if out is None:
                batch, heads = blocks[-1][0].stop, blocks[-1][1].stop
                out = part.new_empty(batch, part.shape[2], heads, part.shape[3]).transpose(1, 2)  # heads merge without a copy
            out[block] = part
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        shared = [w and t.shape[:2] != grad.shape[:2] for t, w in zip(tensors, wanted, strict=True)]
        grads = [(torch.zeros_like(t) if s else torch.empty_like(t)) if w else None for t, w, s in zip(tensors, wanted, shared, strict=True)]
        for block in ctx.blocks:
            cuts = [_cut(t, block) for t in tensors]
            leaves = [c.detach().requires_grad_() if w else c for c, w in zip(cuts, wanted, strict=True)]
            with torch.enable_grad():
                part = ctx.core(*leaves)
            some = torch.autograd.grad(part, [c for c, w in zip(leaves, wanted, strict=True) if w], grad[block], materialize_grads=True)
            for total, one, add in zip([g for g in grads if g is not None], some, [s for s, w in zip(shared, wanted, strict=True) if w], strict=True):
                target = _cut(total, block)
                assert target is not None
                target.add_(one) if add else target.copy_(one)
        return None, None, *grads
