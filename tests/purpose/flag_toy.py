"""Maps with one flagged pixel whose colour every pixel must give: a message for the whole map."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def flags(batch: int, generator: torch.Generator, side: int = 12) -> tuple[Tensor, Tensor]:
    """One random pixel carries a flag and a colour; every pixel must give that colour."""
    x = torch.zeros(batch, 4, side, side)
    place = torch.randint(side * side, (batch,), generator=generator)
    colour = 2 * torch.rand(batch, 3, generator=generator) - 1
    x.flatten(2)[torch.arange(batch), :, place] = torch.cat([torch.ones(batch, 1), colour], 1)
    return x, colour[:, :, None, None].expand(-1, -1, side, side)


def train(body: nn.Module) -> float:
    """Test error after 400 steps of a 1x1 convolution, ReLU, `body`, a 1x1 convolution."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Conv2d(4, 32, 1), nn.ReLU(), body, nn.Conv2d(32, 3, 1))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(400):
        x, y = flags(32, generator)
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        x, y = flags(512, torch.Generator().manual_seed(2))
        return F.mse_loss(net(x), y).item()
