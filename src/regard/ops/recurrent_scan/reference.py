"""The definition: one step of each cell, and the loop. A step gives the new state, and the gates (B, k H) where there are any."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import EPS, GRU, LSTM, RNN, Cell


def rnn_step(cell: RNN, a: Tensor, state: Sequence[Tensor], w: dict[str, Tensor]) -> list[Tensor]:
    z = a + _normed(cell, state[0] @ w["weight_hh"].mT, w)
    return [torch.tanh(z) if cell.nonlinearity == "tanh" else torch.relu(z)]


def gru_step(cell: GRU, a: Tensor, state: Sequence[Tensor], w: dict[str, Tensor]) -> list[Tensor]:
    (h,), width, weight = state, state[0].shape[-1], w["weight_hh"]
    b = _normed(cell, h @ (weight if cell.reset_after else weight[:-width]).mT, w)
    b = b + w["bias_hh"] if "bias_hh" in w else b
    first = torch.sigmoid(a[..., :-width] + b[..., : a.shape[-1] - width])
    r, z = (first, 1 - first) if cell.minimal else first.chunk(2, -1)
    n = torch.tanh(a[..., -width:] + (r * b[..., -width:] if cell.reset_after else (r * h) @ weight[-width:].mT))
    return [n + z * (h - n), torch.cat((first, n), -1)]


def lstm_step(cell: LSTM, a: Tensor, state: Sequence[Tensor], w: dict[str, Tensor]) -> list[Tensor]:
    h, c = state
    *first, f, g, o = (a + _normed(cell, h @ w["weight_hh"].mT, w)).chunk(cell.rows, -1)
    f = torch.sigmoid(f + w["peephole_f"] * c if cell.peephole else f)
    g = torch.tanh(g)
    seen = [i + w["peephole_i"] * c if cell.peephole else i for i in first]
    i = torch.sigmoid(seen[0]) if seen else 1 - f
    c = f * c + i * g
    o = torch.sigmoid(o + w["peephole_o"] * c if cell.peephole else o)
    # What leaves the cell is normalised, what it keeps is not.
    u = F.layer_norm(c, c.shape[-1:], w["ln_c.weight"], w["ln_c.bias"], EPS) if cell.layer_norm else c
    return [o * torch.tanh(u), c, torch.cat((f, g, o) if cell.coupled else (i, f, g, o), -1)]


def _normed(cell: Cell, z: Tensor, w: dict[str, Tensor]) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], w["ln_hh.weight"], w["ln_hh.bias"], EPS) if cell.layer_norm else z


STEPS: dict[type, Callable[..., list[Tensor]]] = {RNN: rnn_step, GRU: gru_step, LSTM: lstm_step}


def step(cell: Cell, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """a (B, k H), given by `project`."""
    return STEPS[type(cell)](cell, a, state, dict(zip(cell.recurrent(), params, strict=True)))


def scan(cell: Cell, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """a (T, B, k H), mask (T, B) -> every state and the gates, each (T, B, ...)."""
    rows: list[list[Tensor]] = []
    for t in range(a.shape[0]):
        after = step(cell, a[t], state, params)
        if mask is not None:
            after[: len(state)] = [torch.where(mask[t, :, None], new, old) for new, old in zip(after, state, strict=False)]
        state = after[: len(state)]
        rows.append(after)
    return [torch.stack(column) for column in zip(*rows, strict=True)]
