"""Two tasks that ask each pixel which of its eight neighbours to look at; shared by the purpose tests of the neighbourhood mechanisms.

Maps are 10 x 10, colours uniform in [-1, 1]; what a layer does at the border does not count: targets exist for the 8 x 8 pixels that have all
neighbours. Nets are 1x1 convolution to 32 channels, ReLU, the layer under test, 1x1 convolution to 3.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Task = Callable[[int], tuple[Tensor, Tensor]]
SIDE, WIDTH = 10, 32


def _neighbours(x: Tensor) -> Tensor:
    """(n, c, H, W) -> (n, 8, c, H - 2, W - 2)."""
    around = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    return torch.stack([x[..., i : i + SIDE - 2, j : j + SIDE - 2] for i, j in around], 1)


def flagged(n: int) -> tuple[Tensor, Tensor]:
    """A flag on a fifth of the pixels and three colours, (n, 4, H, W) -> the mean colour of the flagged neighbours, 0 if there is none."""
    colours, flags = 2 * torch.rand(n, 3, SIDE, SIDE) - 1, (torch.rand(n, 1, SIDE, SIDE) < 0.2).float()
    return torch.cat([flags, colours], 1), _neighbours(colours * flags).sum(1) / _neighbours(flags).sum(1).clamp(min=1)


def pointed(n: int) -> tuple[Tensor, Tensor]:
    """A one-hot direction (one of 8) and three colours, (n, 11, H, W) -> the colour of the neighbour in that direction."""
    colours = 2 * torch.rand(n, 3, SIDE, SIDE) - 1
    direction = F.one_hot(torch.randint(8, (n, SIDE, SIDE)), 8).movedim(-1, 1).float()
    return torch.cat([direction, colours], 1), (_neighbours(colours) * direction[:, :, None, 1:-1, 1:-1]).sum(1)


def error(task: Task, layer: Callable[[], nn.Module], *, seed: int = 0, steps: int = 400) -> tuple[float, float]:
    """Mean squared error on fresh maps after `steps` of Adam (3e-3, 32 maps each), and that of predicting zero. In train mode throughout."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(task(1)[0].shape[1], WIDTH, 1), nn.ReLU(), layer(), nn.Conv2d(WIDTH, 3, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        x, y = task(32)
        optimizer.zero_grad()
        F.mse_loss(net(x)[..., 1:-1, 1:-1], y).backward()
        optimizer.step()
    x, y = task(500)
    with torch.no_grad():
        return F.mse_loss(net(x)[..., 1:-1, 1:-1], y).item(), y.square().mean().item()


def convolution() -> nn.Module:
    """What the tasks are compared with."""
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
