"""What the head is for: a pixel's class that only the rest of the picture tells; its convolutions alone cannot know it."""

import pytest
import torch
import torch.nn.functional as F

import regard


def scenes(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One random pixel of 16 x 16 carries a mark of one of two kinds; every pixel must give its kind."""
    x = 0.1 * torch.randn(batch, 4, 16, 16, generator=generator)
    kind = torch.randint(2, (batch,), generator=generator)
    place = torch.randint(256, (batch,), generator=generator)
    x.flatten(2)[torch.arange(batch), kind, place] += 4
    return x, kind[:, None, None].expand(-1, 16, 16)


def error(attention: bool) -> float:
    torch.manual_seed(0)
    net = regard.create("dual", 4, hidden_channels=16, out_channels=2, dropout=0.0)
    for block in (net.position, net.channel):
        torch.nn.init.constant_(block.gamma, 1.0 if attention else 0.0)
        block.gamma.requires_grad_(attention)
    optimizer, generator = torch.optim.Adam(net.parameters(), 5e-3), torch.Generator().manual_seed(1)
    for _ in range(150):
        x, y = scenes(16, generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        x, y = scenes(128, torch.Generator().manual_seed(2))
        return (net.eval()(x).argmax(1) != y).float().mean().item()


@pytest.mark.slow
def test_a_mark_far_away_is_seen() -> None:
    """Share of wrong pixels after 150 steps, measured: 0.00 with attention, 0.45 with both gains held at 0."""
    found, without = error(True), error(False)
    assert found < 0.05 and without > 0.3
