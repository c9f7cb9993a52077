"""The loop as one opaque operator with its own derivative: gates, masks and options at a few small calls a step, of any length when traced."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...errors import RegardError
from .._precision import full_precision
from .cells import CELLS, GRU, LSTM, RNN, Cell
from .gru_loops import gru_backward, gru_forward
from .lstm_loops import lstm_backward, lstm_forward
from .rnn_loops import rnn_backward, rnn_forward

# Steps of a piece of the backward pass.
STEPS = 32
Loop = Callable[..., list[Tensor]]
LOOPS: dict[type, tuple[Loop, Loop]] = {RNN: (rnn_forward, rnn_backward), GRU: (gru_forward, gru_backward), LSTM: (lstm_forward, lstm_backward)}


@torch.library.custom_op("regard::recurrent_scan", mutates_args=())
def recurrent_scan(cell: str, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """a (T, B, k H), mask (T, B) -> every state and the gates, each (T, B, ...)."""
    with full_precision(a):
        return LOOPS[type(CELLS[cell])][0](CELLS[cell], a, state, params, mask)


@recurrent_scan.register_fake
def _(cell: str, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    gates = [torch.empty_like(a, memory_format=torch.contiguous_format)] if CELLS[cell].gates else []
    return [*(a.new_empty(*a.shape[:2], s.shape[-1]) for s in state), *gates]


@torch.library.custom_op("regard::recurrent_scan_backward", mutates_args=())
def recurrent_scan_backward(
    cell: str, grads: Sequence[Tensor | None], saved: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None
) -> list[Tensor]:
    """Gradients of all outputs -> those of a, of the first states, of the parameters."""
    with full_precision(saved[0]):
        return _backward(CELLS[cell], grads, saved, state, params, mask)


def _backward(
    cell: Cell, grads: Sequence[Tensor | None], saved: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None
) -> list[Tensor]:
    """Piece by piece from the end, so that what a loop computes beforehand for its steps stays small."""
    states, loop = len(state), LOOPS[type(cell)][1]
    da = saved[0].new_empty(*saved[0].shape[:2], params[0].shape[0])
    carry, total = [torch.zeros_like(s) for s in state], [torch.zeros_like(w) for w in params]
    for start in reversed(range(0, len(da), STEPS)):
        at = slice(start, start + STEPS)
        before = [s[start - 1] for s in saved[:states]] if start else list(state)
        given = [None if g is None else g[at] for g in grads]
        da[at], *found = loop(cell, given, [s[at] for s in saved], before, params, None if mask is None else mask[at], carry)
        carry = found[:states]
        for sum_, part in zip(total, found[states:], strict=True):
            sum_.add_(part)
    return [da, *carry, *total]


@recurrent_scan_backward.register_fake
def _(
    cell: str, grads: Sequence[Tensor | None], saved: Sequence[Tensor], state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None
) -> list[Tensor]:
    da = saved[0].new_empty(*saved[0].shape[:2], params[0].shape[0])
    return [da, *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*state, *params))]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.cell, _, state, params, mask = inputs
    ctx.sizes, ctx.masked = (len(output), len(state)), mask is not None
    ctx.set_materialize_grads(False)  # zeros for gates that nobody used would be as large as the gates
    ctx.save_for_backward(*output, *state, *params, *([mask] if ctx.masked else []))


def _back(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    outputs, states = ctx.sizes
    kept = list(ctx.saved_tensors)
    mask = kept.pop() if ctx.masked else None
    saved, state, weights = kept[:outputs], kept[outputs : outputs + states], kept[outputs + states :]
    found = recurrent_scan_backward(ctx.cell, list(grads), saved, state, weights, mask)
    return None, found[0], found[1 : 1 + states], found[1 + states :], None


def _once(ctx: Any, grads: Sequence[Tensor | None]) -> Any:
    raise RegardError("recurrent_scan is differentiable once; for second derivatives use use_impl('reference')")


torch.library.register_autograd("regard::recurrent_scan", _back, setup_context=_keep)
torch.library.register_autograd("regard::recurrent_scan_backward", _once)


@register_flop_formula(torch.ops.regard.recurrent_scan)
def _cost(cell: Any, a: Any, state: Any, params: Any, mask: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * params[0][1]


@register_flop_formula(torch.ops.regard.recurrent_scan_backward)
def _cost_backward(cell: Any, grads: Any, saved: Any, state: Any, params: Any, mask: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    hidden, one = saved[0], CELLS[cell]
    product = 2 * hidden[0] * hidden[1] * params[0][0] * params[0][1]
    again = product if one.layer_norm else product // one.rows if isinstance(one, GRU) and one.reset_after else 0
    return 2 * product + again
