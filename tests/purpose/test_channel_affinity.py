"""What channel attention does: it tells channels that repeat each other, at a cost linear in the positions."""

import time

import pytest
import torch

import regard


@pytest.mark.slow
@pytest.mark.parametrize("invert", [True, False])
def test_duplicated_channels(invert: bool) -> None:
    """Channels 0 and 1 equal, the others uncorrelated: the code's form gives 1 less weight from 0 than any other, the paper's more.

    Measured weight of channel 1 beside the others': 0.0005 beside 0.15 to 0.17 for the code's form, 0.50 beside 0.0016 for the paper's.
    """
    torch.manual_seed(0)
    x = 0.05 * torch.randn(1, 8, 48, 48)
    x[:, 1] = x[:, 0]
    _, weights = regard.create("channel_affinity", 8, invert=invert)(x, return_weights=True)
    twin, others = weights[0, 0, 1], weights[0, 0, 2:]
    assert (twin < others.min() / 10) if invert else (twin > 10 * others.max())


@pytest.mark.slow
def test_time_is_linear_in_the_positions() -> None:
    """Twice the positions (both beyond the caches), at most 2.5 times the time. Measured: 1.85."""
    net = regard.create("channel_affinity", 64, gamma_init=0.5)
    times = {}
    with torch.no_grad():
        for side in (384, 768) * 12:
            x = torch.randn(1, 64, 96, side)
            start = time.perf_counter()
            net(x)
            times[side] = min(time.perf_counter() - start, times.get(side, 1.0))
    assert times[768] / times[384] < 2.5
