"""Luna's claim: softmax-style attention whose cost doubles when the length doubles, and a memory that can copy what it is shown."""

import time

import pytest
import torch

import regard

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("causal", [False, True])
def test_time_doubles_with_the_length(causal):
    """Measured, CPU time from 1024 to 8192 positions: 6.4 to 9.5 times (causal 8.2 to 9.5), on a loaded machine; doubling would be 8 times."""
    module, sizes = regard.create("luna", 64, 4, memory_len=16, causal=causal).eval(), (1024, 2048, 4096, 8192)
    inputs, best = [torch.randn(2, n, 64) for n in sizes], [float("inf")] * 4
    with torch.no_grad():
        for _ in range(15):
            for i, x in enumerate(inputs):
                start = time.process_time()
                module(x)
                best[i] = min(best[i], time.process_time() - start)
    assert best[-1] / best[0] < 2.3**3


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
