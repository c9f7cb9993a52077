"""Recurrent cells: the implementation chosen, precisions settled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import require
from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import fused, looped, reference
from .cells import LSTM, Cell, Weights, project

_dispatch.register("recurrent_scan", "fused", "looped")


def run(
    cell: Cell, x: Tensor, state: Sequence[Tensor], weights: Weights, *, mask: Tensor | None = None, gates: bool = False
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """A cell over a whole sequence.

    Args:
        x: (B, T, I).
        state: what the cell starts from, each (B, H).
        weights: under the names that the cell knows.
        mask: (B, T), False = the step copies the state.
        gates: return them.

    Returns:
        the first state component after every step (B, T, H); the last state; the gates by name (B, T, H), none unless asked for.
    """
    refusal = _refusal(cell, x, weights, mask, gates)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        automatic, why = "reference", "inside a functorch transform the plain steps are batched"
    elif refusal:
        automatic, why = "looped", refusal
    elif x.device.type == "cpu" and not isinstance(cell, LSTM) and _wants_gradients(x, *state, *weights.values()):
        automatic, why = "looped", "on the CPU torch differentiates every call of every step by itself"
    else:
        automatic, why = "fused", "torch's kernel does the whole sequence"
    impl = _dispatch.choose("recurrent_scan", automatic, why)
    require(impl != "fused" or not refusal, "recurrent_scan='fused' cannot run: {}", refusal)
    if impl == "fused" and x.shape[1]:
        kind = weights["weight_hh"].dtype
        with full_precision(x):
            out, last = fused.scan(cell, x.to(kind), [s.to(kind) for s in state], weights)
        return out.to(x.dtype), [s.to(x.dtype) for s in last], {}
    exact = at_least_float32(x, weights["weight_hh"])
    with full_precision(x):
        weights = {name: w.to(exact) for name, w in weights.items()}
        start, params = [s.to(exact) for s in state], [weights[name] for name in cell.recurrent()]
        a = project(cell, x.transpose(0, 1).to(exact), weights)
        if not x.shape[1]:
            found = [*(a.new_empty(0, *s.shape) for s in start), a]
            last = list(state)
        else:
            step_mask = None if mask is None else mask.mT.contiguous()
            scan = reference.scan if impl == "reference" else _looped
            found = scan(cell, a, start, params, step_mask)
            last = [s[-1].to(x.dtype) for s in found[: len(start)]]
        named = cell.unpack(found) if gates else {}
    return found[0].transpose(0, 1).to(x.dtype), last, {name: g.transpose(0, 1).to(x.dtype) for name, g in named.items()}


def step(cell: Cell, x: Tensor, state: Sequence[Tensor], weights: Weights) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One step of the plain definition: x (B, I) -> the state, and the gates (B, H)."""
    exact = at_least_float32(x, weights["weight_hh"])
    with full_precision(x):
        weights = {name: w.to(exact) for name, w in weights.items()}
        params = [weights[name] for name in cell.recurrent()]
        found = reference.step(cell, project(cell, x.to(exact), weights), [s.to(exact) for s in state], params)
        named = cell.unpack(found)
    return [s.to(x.dtype) for s in found[: len(state)]], {name: g.to(x.dtype) for name, g in named.items()}


def _looped(cell: Cell, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    return looped.recurrent_scan(cell.key, a, list(state), list(params), mask)


def _refusal(cell: Cell, x: Tensor, weights: Weights, mask: Tensor | None, gates: bool) -> str:
    """Why torch's fused kernel cannot do it; empty if it can."""
    if cell.fused is None:
        return f"torch has no kernel for {cell.key}"
    if mask is not None or (gates and cell.gates):
        return "torch's kernel neither copies masked steps nor shows its gates"
    if torch.compiler.is_compiling():
        return "traced, torch's kernel would be unrolled for one length"
    kind = weights["weight_hh"].dtype
    if x.is_meta or (x.device.type == "cpu" and kind != torch.float32 and (isinstance(cell, LSTM) or kind != torch.float64)):
        return "the CPU's kernels would carry half precision, and oneDNN's for LSTMs has float32 alone"
    return ""


def _wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
