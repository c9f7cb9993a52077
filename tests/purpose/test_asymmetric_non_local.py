"""What regions are for: a full non-local block when every position is one, at linear cost otherwise."""

import pytest
import torch

import regard
from regard.testing.checks.cost import count_flops


@pytest.mark.slow
def test_equals_a_full_non_local_block_and_grows_linearly() -> None:
    """Measured: equal to softmax over all 36 positions to 1e-6; FLOPs at 256x256 over those at 128x128: 4.00."""
    torch.manual_seed(0)
    module, x = regard.create("asymmetric_non_local", 8, pool_sizes=(6,), zero_init=False).eval(), torch.randn(2, 8, 6, 6)
    q, v = module.key[0](x).flatten(2), module.value[0](x.flatten(2).mT)
    context = module.out[0]((q.mT @ q / 2).softmax(2) @ v).mT.unflatten(2, (6, 6))
    torch.testing.assert_close(module(x), module.fuse(torch.cat((context, x), 1)))
    large = regard.create("asymmetric_non_local", 8, device="meta").eval()
    counts = [count_flops(large, {"x": torch.empty(1, 8, n, n, device="meta")}) for n in (128, 256)]
    assert counts[1] / counts[0] == pytest.approx(4, rel=0.02)
