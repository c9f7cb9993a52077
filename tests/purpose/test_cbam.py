"""What the spatial gate is for: it finds where the evidence is, taught by labels of the whole map alone."""

import pytest
import torch

import regard


@pytest.mark.slow
def test_spatial_gate_finds_the_patch() -> None:
    """Measured: accuracy 1.0, mean gate 0.992 on the patch and 0.568 off it (the specification: 1.0, 0.995, 0.583)."""
    torch.manual_seed(0)
    attention = regard.create("cbam", 16, reduction=4)
    conv, readout = torch.nn.Conv2d(2, 16, 3, padding=1), torch.nn.Linear(16, 2)
    parameters = [*conv.parameters(), *attention.parameters(), *readout.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y, where = 0.5 * torch.randn(n, 2, 12, 12), torch.randint(0, 2, (n,)), torch.zeros(n, 12, 12, dtype=torch.bool)
        for i, (row, column) in enumerate(torch.randint(0, 10, (n, 2)).tolist()):
            where[i, row : row + 3, column : column + 3] = True
        x[:, 0] += 1.5 * where
        x[:, 1] += (2 * y - 1)[:, None, None] * where
        return x, y, where

    for _ in range(150):
        x, y, _ = batch(64)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(readout(attention(conv(x).relu()).mean((2, 3))), y).backward()
        optimizer.step()
    attention.eval()
    with torch.no_grad():
        x, y, where = batch(1000)
        out, (_, spatial) = attention(conv(x).relu(), return_weights=True)
    accuracy = (readout(out.mean((2, 3))).argmax(1) == y).float().mean().item()
    on, off = spatial[:, 0][where].mean().item(), spatial[:, 0][~where].mean().item()
    print("accuracy", accuracy, "gate on the patch", on, "off", off)
    assert accuracy > 0.98
    assert on > 1.3 * off
