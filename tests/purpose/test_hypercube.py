"""What the hypercube is for: every token reached in log2 n layers, at nearly linear cost, by a graph worth more than the complete one."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch

import regard
from regard.ops.softmax_attention.hypercube import HypercubePattern
from regard.ops.softmax_attention.patterns import sparse_attend

pytestmark = pytest.mark.slow


def test_as_many_layers_as_bits_reach_every_token_and_fewer_do_not() -> None:
    """block_size=1, N = 2^5: five layers give every output a gradient from every input, four give none from the token opposite on the cube."""
    bits, width = 5, 4
    torch.manual_seed(0)
    layers = [regard.create("hypercube", width, 2, block_size=1).double() for _ in range(bits)]

    def reached(count: int) -> torch.Tensor:
        def run(x: torch.Tensor) -> torch.Tensor:
            for layer in layers[:count]:
                x = layer(x[None])[0]
            return x

        jacobian = torch.autograd.functional.jacobian(run, torch.randn(2**bits, width, dtype=torch.double))
        return jacobian.abs().sum((1, 3)) > 0

    assert reached(bits).all()
    before = reached(bits - 1)
    assert (~before).sum(1).unique().tolist() == [1]


def test_time_grows_nearly_linearly_and_far_below_the_dense_mask() -> None:
    """Forward, 8 heads of 32, block_size=16, one thread, CPU seconds: 0.026 at N = 4096 (masked 0.32), 0.055 at 8192, 0.115 at 16384."""

    def run(n: int) -> Callable[[], object]:
        q, k, v = (torch.randn(1, n, 8, 32).transpose(1, 2) for _ in range(3))
        return lambda: sparse_attend(q, k, v, HypercubePattern(16))

    q, k, v = (torch.randn(1, 8, 4096, 32) for _ in range(3))
    mask = HypercubePattern(16).mask(4096, 8)[None]
    runs = [run(4096), run(8192), run(16384), lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(6):
        for call, found in zip(runs, times, strict=True):
            start = time.process_time()
            call()
            found.append(time.process_time() - start)
    four, eight, sixteen, dense = (statistics.median(found[1:]) for found in times)
    print(f"{four:.3f}, {eight:.3f}, {sixteen:.3f} s: {eight / four:.2f} and {sixteen / eight:.2f} times; masked at 4096 {dense:.3f} s")
    assert eight / four < 2.4 and sixteen / eight < 2.4 and dense > 4 * four


def test_large_cubes_are_worth_more_than_the_complete_graph() -> None:
    """nip, our rebuilding of the paper's score, of cubes of 2^4, ..., 2^10 tokens: 0.49, 0.59, 0.77, 1.10, 1.62, 2.50, 3.97; complete 1."""
    scores = [regard.nip(regard.hypercube_layout(2**bits))[0] for bits in range(4, 11)]
    print(", ".join(f"{score:.2f}" for score in scores))
    assert scores == sorted(scores) and all(score > 1 for score in scores[3:])
