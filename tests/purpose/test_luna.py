"""Luna's claim: softmax-style attention whose cost doubles when the length doubles, and a memory that can copy what it is shown."""

import time

import pytest
import torch

import regard

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("causal", [False, True])
def test_time_doubles_with_the_length(causal):
    """Measured, CPU time on a loaded machine: 1.7, 2.1, 2.3 for each doubling from 1024 to 8192, causal 2.1, 2.6, 1.7."""
    module, times = regard.create("luna", 64, 4, memory_len=16, causal=causal).eval(), []
    with torch.no_grad():
        for n in (1024, 2048, 4096, 8192):
            x, best = torch.randn(2, n, 64), float("inf")
            for _ in range(6):
                start = time.process_time()
                module(x)
                best = min(best, time.process_time() - start)
            times.append(best)
    assert (times[-1] / times[0]) ** (1 / 3) < 2.3


def test_a_memory_as_long_as_the_input_copies_it():
    """With slots chosen one to one (large orthogonal queries), out_i is token j: measured error 4e-22."""
    n, d = 8, 16
    module = regard.create("luna", d, 1, memory_len=n, learned_memory=False)
    with torch.no_grad():
        for name in ("pq_proj", "pc_proj", "q_proj", "c_proj", "out_proj"):
            layer = getattr(module, name)
            layer.weight.copy_(torch.eye(d))
            layer.bias.zero_()
    tokens = torch.eye(n, d)[None]
    wanted = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    queries = 200.0 * tokens[:, wanted]
    out = module(queries, tokens, memory=200.0 * tokens)
    assert torch.allclose(out, tokens[:, wanted], atol=1e-5)
