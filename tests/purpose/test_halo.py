"""What blocks are for: cost per pixel that does not grow with the map; the price is equivariance to shifts by whole blocks only."""

import statistics
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regard


@pytest.mark.slow
def test_equivariance_to_shifts_by_a_block() -> None:
    """Measured: moving the input by 4 = b pixels moves the interior of the output exactly (error 0); by 1 pixel it changes it by 2.0."""
    torch.manual_seed(0)
    net = regard.create("halo", 8, num_heads=2, block_size=4, halo_size=1).double().eval()
    x = torch.randn(1, 8, 24, 24, dtype=torch.float64)

    def change(pixels: int) -> float:
        moved = net(x.roll((pixels, pixels), (2, 3))).roll((-pixels, -pixels), (2, 3))
        return (moved - net(x))[:, :, 8:16, 8:16].abs().max().item()

    print("shifted by 4", change(4), "by 1", change(1))
    assert change(4) < 1e-12
    assert change(1) > 0.1


@pytest.mark.slow
def test_time_per_pixel_is_constant() -> None:
    """Measured, one thread: CPU time per pixel at 128 x 128 over that at 32 x 32: 0.96 (dense attention: 16). Counted FLOPs: exactly 1."""
    net = regard.create("halo", 64, num_heads=4).eval()
    maps = {side: torch.randn(1, 64, side, side) for side in (32, 128)}
    flops, times = {}, {side: [] for side in maps}
    with torch.no_grad():
        for side, x in maps.items():
            with FlopCounterMode(display=False) as counter:
                net(x)
            flops[side] = counter.get_total_flops() / side**2
        for _ in range(15):
            for side, x in maps.items():
                start = time.process_time()
                for _ in range(128 // side):
                    net(x)
                times[side].append((time.process_time() - start) / (side * 128))
    assert flops[128] == flops[32]
    print("time per pixel", statistics.median(times[128]) / statistics.median(times[32]))
    assert statistics.median(times[128]) < 1.3 * statistics.median(times[32])
