"""What the gates are for: answers to what was long ago, and a memory that stays shut."""

import pytest
import torch
from torch import nn

import regard

pytestmark = pytest.mark.slow


def adding(batch: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers with two of them marked, one in each half; the answer is the sum of the two. Predicting 1 has an error of 0.167."""
    values = torch.rand(batch, length, generator=generator)
    marks = torch.zeros(batch, length)
    half = length // 2
    first = torch.randint(0, half, (batch, 1), generator=generator)
    second = torch.randint(half, length, (batch, 1), generator=generator)
    marks.scatter_(1, first, 1.0).scatter_(1, second, 1.0)
    return torch.stack((values, marks), -1), (values * marks).sum(1)


def test_adding_problem():
    """Mean squared error after 1500 steps of 64 sequences of 50. Measured 0.0032, 16 s on a loaded core (the spec's own run: 0.005)."""
    torch.manual_seed(0)
    cell, read = regard.create("lstm_cell", 2, 32, forget_bias=1.0), nn.Linear(32, 1)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam([*cell.parameters(), *read.parameters()], 3e-3)
    for _ in range(1500):
        x, y = adding(64, 50, generator)
        loss = (read(cell(x)[0][:, -1])[:, 0] - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
        optimiser.step()
    x, y = adding(1000, 50, generator)
    with torch.no_grad():
        error = (read(cell(x)[0][:, -1])[:, 0] - y).square().mean().item()
    print(f"adding problem: {error:.4f}")
    assert error < 0.02


def test_latch():
    """The first symbol (+1 or -1) is asked for after a gap of noise that grows to 60 steps in training.

    Measured, 800 steps, 2 units: all right, mean forget gates over the gap 0.946 and 0.895, from 0.73 at the start. With 8 units the answer is
    as good but no gate passes 0.9 (0.888): they write the symbol to one another anew, so the claim holds for a small memory only.
    """
    torch.manual_seed(0)
    cell, read = regard.create("lstm_cell", 2, 2, forget_bias=1.0), nn.Linear(2, 1)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam([*cell.parameters(), *read.parameters()], 1e-2)

    def batch(size: int, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.zeros(size, gap + 1, 2)
        x[:, 1:, 0] = torch.randn(size, gap, generator=generator)
        x[:, 0, 1] = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
        return x, (x[:, 0, 1] + 1) / 2

    for step in range(800):
        x, y = batch(64, min(60, 5 + 90 * step // 800))
        loss = nn.functional.binary_cross_entropy_with_logits(read(cell(x)[0][:, -1])[:, 0], y)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
        optimiser.step()
    x, y = batch(500, 60)
    with torch.no_grad():
        out, _, gates = cell(x, return_gates=True)
    right = ((read(out[:, -1])[:, 0] > 0) == (y > 0.5)).float().mean().item()
    held = gates["f"][:, 1:].mean((0, 1))
    print(f"latch: accuracy {right:.3f}, mean forget gates {held.tolist()}")
    assert right > 0.95 and held.max() > 0.9
