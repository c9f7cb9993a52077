"""The loop as one opaque operator with its own derivative: gates, masks and options at a few small calls a step, of any length when traced."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._precision import full_precision
from .cells import CELLS
from .lstm_loops import lstm_backward, lstm_forward


@torch.library.custom_op("regard::recurrent_scan", mutates_args=())
def recurrent_scan(cell: str, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """a (T, B, k H), mask (T, B) -> every state and the gates, each (T, B, ...)."""
    with full_precision(a):
        return lstm_forward(CELLS[cell], a, state, params, mask)


@recurrent_scan.register_fake
def _(cell: str, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    return [*(a.new_empty(*a.shape[:2], s.shape[-1]) for s in state), torch.empty_like(a, memory_format=torch.contiguous_format)]


@torch.library.custom_op("regard::recurrent_scan_backward", mutates_args=())
def recurrent_scan_backward(
    cell: str, grads: Sequence[Tensor], saved: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None
) -> list[Tensor]:
    """Gradients of all outputs -> those of a, of the first states, of the parameters."""
    with full_precision(grads[0]):
        return lstm_backward(CELLS[cell], grads, saved, state, params, mask)


@recurrent_scan_backward.register_fake
def _(
    cell: str, grads: Sequence[Tensor], saved: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None
) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (saved[-1], *state, *params)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.cell, _, state, params, mask = inputs
    ctx.sizes, ctx.masked = (len(output), len(state)), mask is not None
    ctx.save_for_backward(*output, *state, *params, *([mask] if ctx.masked else []))


def _back(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    outputs, states = ctx.sizes
    kept = list(ctx.saved_tensors)
    mask = kept.pop() if ctx.masked else None
    saved, state, weights = kept[:outputs], kept[outputs : outputs + states], kept[outputs + states :]
    given = [torch.zeros_like(out) if grad is None else grad for grad, out in zip(grads, saved, strict=True)]
    found = recurrent_scan_backward(ctx.cell, given, saved, state, weights, mask)
    return None, found[0], found[1 : 1 + states], found[1 + states :], None


torch.library.register_autograd("regard::recurrent_scan", _back, setup_context=_keep)


@register_flop_formula(torch.ops.regard.recurrent_scan)
def _cost(cell: Any, a: Any, state: Any, params: Any, mask: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * params[0][1]


@register_flop_formula(torch.ops.regard.recurrent_scan_backward)
def _cost_backward(cell: Any, grads: Any, saved: Any, state: Any, params: Any, mask: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    gates = saved[-1]
    return (6 if CELLS[cell].layer_norm else 4) * gates[0] * gates[1] * gates[2] * params[0][1]
