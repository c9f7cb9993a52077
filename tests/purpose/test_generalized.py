"""What generalized attention is for: its terms are different tools, some of them far cheaper than the whole."""

import time

import pytest
import torch

import regard


def module(kind: str, channels: int = 16, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    net = regard.create("generalized", channels, num_heads=4, attention_type=kind, **options)
    torch.nn.init.constant_(net.gamma, 0.7)
    return net


@pytest.mark.slow
def test_saliency_adds_the_same_everywhere() -> None:
    """Exact for "0010": one vector for the whole map; every other type differs from place to place."""
    x = torch.randn(2, 16, 7, 9, dtype=torch.float64)
    for kind, same in (("0010", True), ("1000", False), ("0100", False), ("0001", False)):
        net = module(kind, kv_stride=1).double()
        update = net(x) - x
        assert bool((update - update[:, :, :1, :1]).abs().max() < 1e-12) == same


@pytest.mark.slow
def test_position_alone_is_a_fixed_affine_map() -> None:
    """f(x + y) + f(0) = f(x) + f(y) for "0001", to 1e-12; "0010" misses it."""
    x, y = torch.randn(2, 2, 16, 7, 9, dtype=torch.float64)
    for kind, affine in (("0001", True), ("0010", False)):
        f = module(kind).double()
        assert bool((f(x + y) + f(0 * x) - f(x) - f(y)).abs().max() < 1e-12) == affine


@pytest.mark.slow
def test_time_on_four_times_the_positions() -> None:
    """Forward of 48 x 48 against 96 x 96, least CPU time of 7 runs: measured 2.4 times as long for "0010", 13.5 times for "1111"."""

    def seconds(kind: str, side: int) -> float:
        net, x, times = module(kind, 32), torch.randn(1, 32, side, side), []
        for _ in range(7):
            start = time.process_time()
            with torch.no_grad():
                net(x)
            times.append(time.process_time() - start)
        return min(times)

    linear, quadratic = (seconds(kind, 96) / seconds(kind, 48) for kind in ("0010", "1111"))
    assert linear < 8 < quadratic
