"""What the non-local block is for: one layer carries a value over any distance, and two of its modes stay cheap on large maps."""

import time

import pytest
import torch
from torch import nn

import regard

CODES, LENGTH = 8, 96


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["embedded_gaussian", "dot_product", "concatenation"])
def test_a_value_is_copied_over_any_distance_in_one_block(mode: str) -> None:
    """Channels: the code a position has, the code it asks for, a value. Weights set by hand, 28 distances from 3 to 84.

    Measured: exact in every mode. Three convolutions of size 3 reach a distance of 3: beyond it their gradient is zero.
    """
    net = regard.create("non_local", 2 * CODES + 1, dims=1, hidden_channels=CODES, mode=mode, use_scale=False)
    codes = 1 if mode == "concatenation" else CODES  # an additive score can ask for one code
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for i in range(codes):
            net.phi.weight[i, i] = 1.0
            net.theta.weight[i, CODES + i] = 30.0 if mode == "embedded_gaussian" else 1.0
        net.g.weight[0, -1] = 1.0
        net.out.weight[-1, 0] = 1.0 if mode == "embedded_gaussian" else LENGTH  # the other modes divide by the number of keys
        if mode == "concatenation":
            net.theta.bias[0] = -1.0  # relu(asks + has - 1)
            net.concat_project.weight[0, 0] = net.concat_project.weight[0, CODES] = 1.0
    convolutions = nn.Sequential(*(nn.Conv1d(2 * CODES + 1, 2 * CODES + 1, 3, padding=1) for _ in range(3)))
    worst = 0.0
    for distance in range(3, 87, 3):
        x = torch.zeros(1, 2 * CODES + 1, LENGTH)
        sender, receiver, code = 5, 5 + distance, distance % codes
        x[0, code, sender], x[0, CODES + code, receiver], x[0, -1, sender] = 1.0, 1.0, 0.75
        worst = max(worst, abs(net(x)[0, -1, receiver].item() - 0.75))
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(convolutions(x)[0, :, receiver].sum(), x)
        assert (gradient[0, :, sender].abs().max().item() > 0) == (distance <= 3)
    assert worst < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dot_product", "concatenation"])
def test_linear_modes_on_four_times_the_positions(mode: str) -> None:
    """Forward and backward of 64 x 64 against 128 x 128: least CPU time of 25 runs, measured 3.1 to 5.3 times as long; N^2 would be 16
    times. (128 x 128 against 256 x 256, out of cache: 5.0 to 5.6.)"""
    net = regard.create("non_local", 32, mode=mode, zero_init=False)

    def seconds(side: int) -> float:
        x, times = torch.randn(1, 32, side, side, requires_grad=True), []
        for _ in range(25):
            start = time.process_time()
            torch.autograd.grad(net(x).sum(), x)
            times.append(time.process_time() - start)
        return min(times)

    seconds(64)
    ratio = seconds(128) / seconds(64)
    assert ratio < 6
