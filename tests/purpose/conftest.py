"""Tasks that several purpose tests share."""

from collections.abc import Callable

import pytest
import torch

import regard


def _accuracy(id: str | None, seed: int, **options: object) -> float:
    torch.manual_seed(seed)
    attention = regard.create(id, 16, **options) if id else torch.nn.Identity()
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 16, 1), torch.nn.ReLU(), attention, torch.nn.Conv2d(16, 2, 1))

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(n, 4, 6, 6)
        shift = torch.randint(0, 2, (n,)) - 0.5
        x[:, 0] += shift[:, None, None]
        return x, (torch.where(shift[:, None, None] > 0, x[:, 1], x[:, 2]) > 0).long()

    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(400):
        x, y = batch(64)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        x, y = batch(1000)
        return (net.eval()(x).argmax(1) == y).float().mean().item()


@pytest.fixture
def cue_accuracy() -> Callable[..., float]:
    """The cue task: whether channel 1 or channel 2 labels a pixel is told by the mean of channel 0 over its image.

    (id or None, seed, **options) -> accuracy of a network of two 1x1 convolutions with that attention between them; 4 s on one thread.
    """
    return _accuracy
