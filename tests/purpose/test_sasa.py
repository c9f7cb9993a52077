"""What attention over a window is for: choosing among neighbours by content and by place, at parameters that do not grow with the window."""

import pytest
import torch

import regard

from .neighbour_toys import WIDTH, convolution, error, flagged, pointed


def layer() -> torch.nn.Module:
    return regard.create("sasa", WIDTH, kernel_size=3, num_heads=4)


@pytest.mark.slow
def test_mean_of_flagged_neighbours() -> None:
    """Mean squared errors, measured: sasa 0.0045, 3x3 convolution 0.039, zero 0.181 (card: 0.0003, 0.034, 0.18)."""
    (ours, zero), (other, _) = error(flagged, layer), error(flagged, convolution)
    print("flagged", ours, other, zero)
    assert ours < 0.01
    assert other > 0.02


@pytest.mark.slow
def test_neighbour_in_a_direction() -> None:
    """Mean squared errors, measured: sasa 0.0006, without relative term 0.293, 3x3 convolution 0.294, zero 0.334 (card: 0.0003, -, 0.243, 0.33)."""
    (ours, zero), (other, _) = error(pointed, layer), error(pointed, convolution)
    blind, _ = error(pointed, lambda: regard.create("sasa", WIDTH, kernel_size=3, num_heads=4, relative=False))
    print("pointed", ours, blind, other, zero)
    assert ours < 0.01
    assert min(other, blind) > 0.1


@pytest.mark.slow
def test_equivariant_inside_and_bounded_outside() -> None:
    """Measured: moving the map moves the interior of the output exactly (error below 1e-12); the receptive field is exactly k x k."""
    torch.manual_seed(0)
    net = regard.create("sasa", 8, kernel_size=5, num_heads=2).double()
    x = torch.randn(1, 8, 15, 15, dtype=torch.float64, requires_grad=True)
    moved = net(x.roll((1, 2), (2, 3))).roll((-1, -2), (2, 3))
    assert (moved - net(x))[:, :, 4:-4, 4:-4].abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(net(x)[:, :, 7, 7].square().sum(), x)
    reached = gradient.abs().sum((0, 1)) > 0
    expected = torch.zeros_like(reached)
    expected[5:10, 5:10] = True
    assert bool((reached == expected).all())


@pytest.mark.slow
def test_parameters_do_not_grow_with_the_window() -> None:
    """Measured: 3 x 3 to 11 x 11 adds 64 parameters of the tables, O / N = 8 for each row and column; a convolution grows 13-fold."""
    counts = {k: sum(p.numel() for p in regard.create("sasa", 64, kernel_size=k).parameters()) for k in (3, 11)}
    assert counts[11] - counts[3] == 8 * (11 - 3)
