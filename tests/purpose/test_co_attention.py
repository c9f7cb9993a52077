"""What co-attention is for: finding what two pictures share."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard

CHANNELS, WIDTH, SIDE = 16, 32, 12


def scenes(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two maps with one 3 x 3 object in common, at different places, over clutter of three such objects that only one map has. And its mask in a."""
    maps, mask = [], torch.zeros(batch, 1, SIDE, SIDE)
    common = 4 * F.normalize(torch.randn(batch, CHANNELS, generator=generator), dim=1)
    for which in range(2):
        x = 0.1 * torch.randn(batch, CHANNELS, SIDE, SIDE, generator=generator)
        for i in range(batch):
            cells = torch.randperm(16, generator=generator)[:4]
            for j, cell in enumerate(cells.tolist()):
                row, column = 3 * (cell // 4), 3 * (cell % 4)
                own = common[i] if j == 0 else 4 * F.normalize(torch.randn(CHANNELS, generator=generator), dim=0)
                x[i, :, row : row + 3, column : column + 3] += own[:, None, None]
                if j == 0 and which == 0:
                    mask[i, 0, row : row + 3, column : column + 3] = 1
        maps.append(x)
    return maps[0], maps[1], mask


class Mean(nn.Module):
    """The same fusion with the map's own mean in the place of the summary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.conv(torch.cat([a.mean((2, 3), keepdim=True).expand_as(a), a], 1))).relu(), b


def train(relate: nn.Module, steps: int = 1000) -> float:
    """Intersection over union on unseen scenes."""
    generator = torch.Generator().manual_seed(1)
    embed = nn.Conv2d(CHANNELS, WIDTH, 1)
    head = nn.Sequential(nn.Conv2d(WIDTH, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1))
    optimizer = torch.optim.Adam([*embed.parameters(), *relate.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        a, b, mask = scenes(16, generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(head(relate(embed(a), embed(b))[0]), mask).backward()
        optimizer.step()
        schedule.step()
    relate.eval()
    with torch.no_grad():
        a, b, mask = scenes(256, torch.Generator().manual_seed(2))
        found = head(relate(embed(a), embed(b))[0]) > 0
        return ((found & (mask > 0)).sum() / (found | (mask > 0)).sum()).item()


@pytest.mark.slow
def test_the_common_object_is_found() -> None:
    """Measured intersection over union: 0.92 (0.84 with another seed); with the mean in the place of the summary 0.0, nothing is found."""
    torch.manual_seed(0)
    ours = train(regard.create("co_attention", WIDTH))
    torch.manual_seed(0)
    mean = train(Mean())
    assert ours > 0.8
    assert mean < 0.5
