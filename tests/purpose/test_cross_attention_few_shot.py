"""What few-shot cross attention is for: what two maps share stands out, though it is a small part of both."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard

CHANNELS, SIDE, PATCH, WAYS, QUERIES = 16, 6, 2, 5, 10


def episodes(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One map a class and ten queries. A class is a direction drawn for its episode, on a 2 x 2 patch anywhere; all else is clutter."""

    def directions(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, CHANNELS, generator=generator), dim=-1)

    label = torch.randint(WAYS, (batch, QUERIES), generator=generator)
    kind = torch.cat([torch.arange(WAYS).expand(batch, -1), label], 1)
    maps = directions(batch, WAYS + QUERIES, SIDE, SIDE)
    own = directions(batch, WAYS).gather(1, kind[..., None].expand(-1, -1, CHANNELS))
    corner = torch.randint(SIDE - PATCH + 1, (2, batch, WAYS + QUERIES, 1, 1), generator=generator)
    row, column = torch.arange(SIDE)[:, None] - corner[0], torch.arange(SIDE) - corner[1]
    inside = (row >= 0) & (row < PATCH) & (column >= 0) & (column < PATCH)
    maps = torch.where(inside[..., None], own[:, :, None, None] + 0.3 * maps, maps).movedim(-1, 2)
    return maps[:, :WAYS], maps[:, WAYS:], label


class Net(nn.Module):
    """Cosine of the means of class map and query map, after an embedding, with the attention or without."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.embed, self.scale = nn.Conv2d(CHANNELS, 32, 1), nn.Parameter(torch.tensor(10.0))
        self.attention = regard.create("cross_attention_few_shot") if attends else None

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        p, q = (self.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in (support, query))
        if self.attention is not None:
            one, other = self.attention(p, q, pooled=True)
        else:
            one, other = p.mean((-2, -1))[:, None], q.mean((-2, -1))[:, :, None]
        return self.scale * F.cosine_similarity(one, other, dim=-1)


def train(net: nn.Module, steps: int = 400) -> float:
    """Accuracy on unseen classes."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        support, query, label = episodes(16, generator)
        optimizer.zero_grad()
        F.cross_entropy(net(support, query).flatten(0, 1), label.flatten()).backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        support, query, label = episodes(200, torch.Generator().manual_seed(2))
        return (net(support, query).argmax(-1) == label).float().mean().item()


@pytest.mark.slow
def test_the_shared_patch_decides() -> None:
    """Measured accuracy among five 0.766 (0.768 with another seed); without the attention 0.605 (0.606). 8 s on one thread.

    Three times as many steps give 0.779.
    """
    torch.manual_seed(0)
    ours = train(Net(attends=True))
    torch.manual_seed(0)
    plain = train(Net(attends=False))
    assert ours > 0.72
    assert ours > plain + 0.1
