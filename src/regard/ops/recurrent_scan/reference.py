"""The definition: one step of each cell, and the loop."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import EPS, LSTM


def lstm_step(cell: LSTM, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(h, c) after the step, and its gates (B, k H), for a (B, k H) given by `cell.project`."""
    (h, c), w = state, dict(zip(cell.recurrent(), params, strict=True))
    z = h @ w["weight_hh"].mT
    if cell.layer_norm:
        z = F.layer_norm(z, z.shape[-1:], w["ln_hh.weight"], w["ln_hh.bias"], EPS)
    *first, f, g, o = (a + z).chunk(3 if cell.coupled else 4, -1)
    f = torch.sigmoid(f + w["peephole_f"] * c if cell.peephole else f)
    g = torch.tanh(g)
    seen = [i + w["peephole_i"] * c if cell.peephole else i for i in first]
    i = torch.sigmoid(seen[0]) if seen else 1 - f
    c = f * c + i * g
    o = torch.sigmoid(o + w["peephole_o"] * c if cell.peephole else o)
    # What leaves the cell is normalised, what it keeps is not.
    u = F.layer_norm(c, c.shape[-1:], w["ln_c.weight"], w["ln_c.bias"], EPS) if cell.layer_norm else c
    return [o * torch.tanh(u), c], torch.cat((f, g, o) if cell.coupled else (i, f, g, o), -1)


STEPS = {LSTM: lstm_step}


def step(cell: LSTM, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    return STEPS[type(cell)](cell, a, state, params)


def scan(cell: LSTM, a: Tensor, state: Sequence[Tensor], params: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """a (T, B, k H), mask (T, B) -> every state and the gates, each (T, B, ...)."""
    rows: list[list[Tensor]] = []
    for t in range(a.shape[0]):
        after, gates = step(cell, a[t], state, params)
        if mask is not None:
            after = [torch.where(mask[t, :, None], new, old) for new, old in zip(after, state, strict=True)]
        state = after
        rows.append([*after, gates])
    return [torch.stack(column) for column in zip(*rows, strict=True)]
