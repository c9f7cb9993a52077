"""Counts are right on cases that can be worked out by hand; statistics agree with tables."""

import math

import pytest
import torch
from torch import Tensor, nn

from regard.workbench.measure import Rates, count, latencies, peak_bytes, quartiles
from regard.workbench.stats import crossover, estimate, growth, t_quantile

KIB = 1024


def test_peak_memory_of_a_known_case() -> None:
    x = torch.zeros(KIB)  # there before

    def call() -> Tensor:
        a = x + 1  # 4 KiB
        b = a * 2  # 8
        del a  # 4
        b.view(32, 32).t()[:5].add_(1)  # a view, in place: nothing
        d = torch.cat((b, b))  # 12
        del b  # 8
        return d[:1]

    assert peak_bytes(call, torch.device("cpu")) == 12 * KIB


def test_peak_memory_sees_inside_operators() -> None:
    q = torch.randn(1, 1, 512, 8)
    written_out = peak_bytes(lambda: (q @ q.mT).softmax(-1) @ q, torch.device("cpu"))
    fused = peak_bytes(lambda: nn.functional.scaled_dot_product_attention(q, q, q), torch.device("cpu"))
    assert written_out >= 2 * 512 * 512 * 4
    assert 512 * 8 * 4 < fused < written_out / 2


def test_count_of_an_attention_and_of_a_linear() -> None:
    model = nn.Linear(16, 32)
    x = torch.randn(8, 16)
    counted = count(model, (x,))
    assert counted.flops == 2 * 8 * 16 * 32
    assert counted.peak_bytes == 8 * 32 * 4
    assert counted.least_bytes == 4 * (8 * 16 + 16 * 32 + 32 + 8 * 32)

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    found = count(Attention(), (torch.randn(2, 4, 10, 8), torch.randn(2, 4, 20, 8)))
    assert found.flops == 2 * 2 * (2 * 4 * 10 * 20 * 8), "the CPU kernel counts as the two products it stands for"


def test_growth_of_a_known_quadratic() -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1)

    lengths = [64, 128, 256]
    costs = [count(Scores(), (torch.randn(1, n, 8),)) for n in lengths]
    assert growth(lengths, [c.flops for c in costs]) == pytest.approx(2)
    assert growth(lengths, [c.peak_bytes for c in costs]) == pytest.approx(2, abs=0.02)
    assert growth([64], [1.0]) is None
    assert growth([64, 128, 256], [1.0, math.nan, 4.0]) == pytest.approx(1)


def test_interval_by_student() -> None:
    for freedom, value in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)):
        assert t_quantile(freedom) == pytest.approx(value, abs=5e-5)
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert estimate([1.5]).half_width is None


def test_crossover_is_where_it_stays_faster() -> None:
    base = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}
    assert crossover({1: 0.5, 2: 3.0, 4: 3.0, 8: 3.0}, base) == 4
    assert crossover({1: 2.0, 2: 3.0, 4: 5.0, 8: 9.0}, base) is None
    assert crossover({1: 0.1, 2: 0.1, 4: 0.1, 8: 0.1}, base) == 1
    assert crossover({}, base) is None


def test_floor_is_the_larger_of_the_two() -> None:
    linear = count(nn.Linear(16, 32), (torch.randn(8, 16),))
    assert Rates(gflops=1e-3, gbytes=1e9).floor_ms(linear) == pytest.approx(linear.flops / 1e6 * 1e3)
    assert Rates(gflops=1e9, gbytes=1e-3).floor_ms(linear) == pytest.approx(linear.least_bytes / 1e6 * 1e3)


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    found = latencies({n: (lambda n=n: order.append(n)) for n in "ab"}, seconds=0.0, device=torch.device("cpu"), rounds=(3, 10))
    assert "".join(order) == "ab" + "ab" * 3
    assert [len(times) for times in found.values()] == [3, 3]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
