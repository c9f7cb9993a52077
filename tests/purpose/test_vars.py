"""What recurrent sparse reconstruction is for: it descends its objective, its code is as sparse as lam asks, its time is linear in the tokens."""

import itertools
import statistics
import time

import pytest
import torch

import regard
from regard.ops.sparse_recon import reference, sparse_recon

pytestmark = pytest.mark.slow


def test_every_step_lowers_the_objective() -> None:
    """0.5 |v - P z|^2 + lam |z|_1, soft threshold, U = I, mean of 16 heads: 377.9 at z_0, then 255.1, 248.2, ... 243.7 after 20 steps."""
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(4, 4, 64, 8, generator=generator, dtype=torch.double) for _ in range(2))
    random = torch.randn(4, 8, 16, generator=generator, dtype=torch.double)
    p = reference.dictionary(q, random, None)
    values = []
    for steps in range(21):
        options = {"mixing": torch.eye(16).double(), "threshold": torch.tensor([0.3]).double(), "step": torch.ones(1).double()}
        out, z = sparse_recon(q, v, random, **options, steps=steps, shrink="relu")
        torch.testing.assert_close(out, p @ z)
        values.append(0.5 * (v - out).square().sum((2, 3)) + 0.3 * z.abs().sum((2, 3)))
    print([round(value.mean().item(), 1) for value in values])
    assert all(bool((after <= before + 1e-9).all()) for before, after in itertools.pairwise(values))
    assert values[-1].mean() < 0.9 * values[0].mean()


@pytest.mark.parametrize("variant", ["d", "s"])
def test_larger_lam_gives_a_sparser_code(variant: str) -> None:
    """Shares of zeros at lam = 0.01, 0.1, 0.3, 1, 3: d 0.00, 0.04, 0.22, 0.84, 1.00; s 0.01, 0.16, 0.60, 0.97, 1.00."""
    x, shares = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0)), []
    for lam in (0.01, 0.1, 0.3, 1.0, 3.0):
        torch.manual_seed(0)
        module = regard.create("vars", variant, 32, 4, grid_size=8, lam=lam, shrink="relu").eval()
        with torch.no_grad():
            shares.append((module(x, return_code=True)[1] == 0).float().mean().item())
    print(variant, [round(share, 3) for share in shares])
    assert all(a < b for a, b in itertools.pairwise(shares)) and shares[0] < 0.2 < 0.8 < shares[-1]


def test_time_grows_linearly() -> None:
    """d, 8 heads of 32, one thread, CPU seconds: 4096 tokens take 11 times as long as 256, softmax attention over all pairs 94 times."""
    torch.set_num_threads(1)

    def seconds(id: str, n: int) -> float:
        module, x, found = regard.create(id, dim=256, num_heads=8).eval(), torch.randn(1, n, 256), []
        with torch.no_grad():
            module(x)
            for _ in range(7):
                start = time.process_time()
                module(x)
                found.append(time.process_time() - start)
        return statistics.median(found)

    growth = {id: seconds(id, 4096) / seconds(id, 256) for id in ("vars", "multi_head")}
    print(growth)
    assert growth["vars"] < 24 and growth["vars"] < growth["multi_head"]
