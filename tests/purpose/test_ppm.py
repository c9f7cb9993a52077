"""What pyramid pooling is for: a position knows the map it is in."""

import pytest
import torch
import torch.nn.functional as F

import regard


def accuracy(levels: bool) -> float:
    """A 1x1 classifier of every position, label: the sign that most positions of its map have."""
    torch.manual_seed(0)

    def batch():
        x = torch.randn(64, 4, 8, 8)
        label = torch.randint(2, (64,))
        x[:, 0] += 0.3 * (2 * label - 1)[:, None, None]
        return x, label[:, None, None].expand(-1, 8, 8)

    head = regard.create("ppm", 4) if levels else torch.nn.Identity()
    model = torch.nn.Sequential(head, torch.nn.Conv2d(8 if levels else 4, 2, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    x, y = batch()
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


@pytest.mark.slow
def test_every_position_learns_the_class_of_its_map() -> None:
    """Measured: 0.997 of the positions with the levels, 0.617 without."""
    assert accuracy(True) > 0.9
    assert accuracy(False) < 0.7


@pytest.mark.slow
def test_constant_maps_stay_constant() -> None:
    """Measured: exact to 1e-6; the level of one bin is constant over any map."""
    module = regard.create("ppm", 8).eval()
    out = module(torch.ones(1, 8, 9, 7))
    torch.testing.assert_close(out, out[:, :, :1, :1].expand_as(out), rtol=1e-5, atol=1e-6)
    one = module(torch.randn(1, 8, 9, 7))[:, 8:10]
    torch.testing.assert_close(one, one[:, :, :1, :1].expand_as(one), rtol=1e-5, atol=1e-6)
