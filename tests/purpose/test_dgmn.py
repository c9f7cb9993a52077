"""What predicted places are for: a pixel reaches what lies where no regular tap is, in a direction that the content tells."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard


def colours(batch: int, generator: torch.Generator, side: int = 12) -> tuple[Tensor, Tensor]:
    """Random colour maps with the direction of their image in four channels, one-hot; the target is the colour 3 pixels that way, 0 outside."""
    colour, way = torch.rand(batch, 3, side, side, generator=generator), torch.randint(0, 4, (batch,), generator=generator)
    padded = F.pad(colour, (3, 3, 3, 3))
    moved = torch.stack([padded[..., y : y + side, x : x + side] for y, x in ((0, 3), (6, 3), (3, 0), (3, 6))], 1)
    told = F.one_hot(way, 4).float()[:, :, None, None].expand(-1, -1, side, side)
    return torch.cat([colour, told], 1), moved[torch.arange(batch), way]


def error(deform: str) -> float:
    torch.manual_seed(0)
    block = regard.create("dgmn", 16, dilations=(1, 2, 4, 6), deform=deform, official_affinity4=False)
    net = torch.nn.Sequential(torch.nn.Conv2d(7, 16, 1), torch.nn.ReLU(), block, torch.nn.Conv2d(16, 3, 1))
    optimizer, generator = torch.optim.Adam(net.parameters(), 3e-3), torch.Generator().manual_seed(1)
    for _ in range(250):
        x, y = colours(16, generator)
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        x, y = colours(500, torch.Generator().manual_seed(2))
        return F.mse_loss(net(x), y).item()


@pytest.mark.slow
def test_reaches_where_no_tap_is() -> None:
    """Measured, mean squared error after 250 steps of 16 maps of 12 x 12: deformatt 0.0019, deform 0.013, none 0.078.

    The spec has 0.010, 0.250 and 0.251 for its toy, whose colours it does not give. With these, uniform in [0, 1], "deform" learns too, but less.
    """
    found = {deform: error(deform) for deform in ("deformatt", "deform", "none")}
    print(found)
    assert found["deformatt"] < 0.1 * found["none"]


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4])
def test_without_offsets_it_is_the_regular_taps(groups: int) -> None:
    """Measured: the same filters on deformable samples with offsets of zero and on the plain unfold differ by less than 1e-15."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)
    plain = regard.create("dgmn", 8, groups=groups, deform="none").double()
    sampled = regard.create("dgmn", 8, groups=groups, deform="deform").double()
    for ours, theirs in zip(sampled.filter_convs, plain.joint_convs, strict=True):
        ours.weight.data.copy_(theirs.weight.data)
    torch.testing.assert_close(sampled(x), plain(x), rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [(1, 0), (-2, 3)])
def test_a_constant_offset_is_a_shift(shift: tuple[int, int]) -> None:
    """Measured: offsets of a whole number of pixels give, in the interior, the messages of the shifted map; difference below 1e-15."""
    torch.manual_seed(0)
    net = regard.create("dgmn", 8, groups=2, dilations=(1, 2), variant="fast", norm_groups=2).double()
    x = torch.randn(2, 8, 16, 15, dtype=torch.float64)
    offset = torch.tensor(shift, dtype=torch.float64).repeat(9)[None, :, None, None].expand(2, -1, 16, 15)
    weights = net.joint_convs[1](x)[:, :18].unflatten(1, (2, 9))
    there = regard.ops.deform.deform_apply(weights, x, offset, 3, padding=2, dilation=2)
    moved = regard.ops.local_window.window_apply(weights, x.roll((-shift[0], -shift[1]), (2, 3)), regard.ops.local_window.Window(3, dilation=2))
    inside = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(there[inside], moved[inside], rtol=0, atol=1e-13)
    assert (there - moved).abs().max() > 0.1
