"""Pooling by distance: both forms against loops, at the extremes of widths and weights, in memory, and as an operator."""

import math

import pytest
import torch
from torch import Tensor

from regard.errors import RegardError
from regard.ops._dispatch import explain, use_impl
from regard.ops.distance_pool import LOWEST, distance_pool, distance_weights, tiles
from regard.workbench.measure import allocations

CASES = [
    ((1, 37), None, False),
    ((1, 37), 4, False),
    ((1, 37), None, True),
    ((1, 37), 0, True),
    ((1, 200), 70, False),
    ((1, 200), 9, True),
    ((5, 7), None, False),
    ((11, 19), 3, False),
    ((19, 33), 40, False),
]


def drawn(grid: tuple[int, int], seed: int = 0, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = grid[0] * grid[1]
    x = torch.randn(2, n, channels, generator=generator, dtype=torch.double)
    log_w = torch.nn.functional.logsigmoid(3 * torch.randn(2, n, generator=generator, dtype=torch.double))
    sigma = max(grid) * 0.2 * torch.rand(2, n, generator=generator, dtype=torch.double) + 0.05
    return x, log_w, 0.5 / sigma.square()


def by_loops(x: Tensor, log_w: Tensor, sharpness: Tensor, grid: tuple[int, int], window: int | None, causal: bool) -> Tensor:
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            total = 0.0
            for j in range(x.shape[1]):
                down, across = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
                if (window is not None and max(abs(down), abs(across)) > window) or (causal and j > i):
                    continue
                weight = math.exp(log_w[b, j].item() - sharpness[b, i].item() * (down**2 + across**2))
                out[b, i] += weight * x[b, j]
                total += weight
            out[b, i] /= total
    return out


@pytest.mark.parametrize("impl", ["reference", "tiles"])
@pytest.mark.parametrize(("grid", "window", "causal"), [c for c in CASES if c[0][0] * c[0][1] < 50])
def test_equals_the_loops(impl: str, grid: tuple[int, int], window: int | None, causal: bool) -> None:
    inputs = drawn(grid)
    with use_impl(distance_pool=impl):
        found = distance_pool(*inputs, grid, window=window, causal=causal)
    torch.testing.assert_close(found, by_loops(*inputs, grid, window, causal), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("grid", "window", "causal"), CASES)
def test_tiles_equal_the_reference_with_gradients(grid: tuple[int, int], window: int | None, causal: bool) -> None:
    found = []
    for impl in ("reference", "tiles"):
        inputs = [t.requires_grad_() for t in drawn(grid)]
        with use_impl(distance_pool=impl):
            out = distance_pool(*inputs, grid, window=window, causal=causal)
        found.append([out, *torch.autograd.grad(out, inputs, torch.sin(torch.arange(out.numel()).double()).view_as(out))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_tiles_of_a_map_in_channel_order() -> None:
    x, log_w, sharpness = drawn((9, 21))
    channels_first = x.mT.contiguous().mT
    with use_impl(distance_pool="tiles"):
        torch.testing.assert_close(distance_pool(channels_first, log_w, sharpness, (9, 21)), distance_pool(x, log_w, sharpness, (9, 21)))


@pytest.mark.parametrize("impl", ["reference", "tiles"])
def test_extremes_are_exact_in_float32(impl: str) -> None:
    """The narrowest Gaussian gives the token itself whatever its weight, the widest the weighted mean; keys that are not there give nothing."""
    n = 300
    x = torch.randn(1, n, 4)
    log_w = torch.linspace(-900, 0, n)[None].clone()
    with use_impl(distance_pool=impl):
        torch.testing.assert_close(distance_pool(x, log_w, torch.full((1, n), 5e5)), x)
        flat = torch.full((1, n), 1e-12)
        torch.testing.assert_close(distance_pool(x, log_w, flat), (log_w.softmax(-1) @ x).expand(1, n, 4), rtol=1e-4, atol=1e-5)
        log_w[:, ::2] = LOWEST
        changed = x.clone()
        changed[:, ::2] = 1e6
        out = distance_pool(x, log_w, flat)
        assert torch.equal(distance_pool(changed, log_w, flat), out)
        assert distance_pool(x, torch.full((1, n), LOWEST), flat).isfinite().all()
        assert distance_pool(x * float("nan"), log_w, torch.full((1, n), float("nan"))).isnan().all()


def test_narrow_gaussians_reach_few_keys_and_lose_nothing() -> None:
    n = 2000
    generator = torch.Generator().manual_seed(0)
    x, log_w = torch.randn(1, n, 4, generator=generator), torch.nn.functional.logsigmoid(torch.randn(1, n, generator=generator))
    sharpness = 0.5 / (1 + 9 * torch.rand(1, n, generator=generator)).square()
    grid = tiles.Grid(1, n, -1, False, 1)
    work = list(tiles._pieces(grid, log_w.unflatten(1, (1, n)), sharpness.unflatten(1, (1, n))))
    assert max(piece.squares.shape[1] for piece in work) < 128 + 2 * 90
    exact = distance_weights(log_w.double(), sharpness.double()) @ x.double()
    with use_impl(distance_pool="tiles"):
        found = distance_pool(x, log_w, sharpness)
    assert (found - exact).abs().max() < 1e-6


def test_no_large_buffer_at_4096_positions() -> None:
    x, log_w, sharpness = (t.float() for t in drawn((1, 4096), channels=16))
    inputs = [x.requires_grad_(), log_w.requires_grad_(), sharpness.requires_grad_()]
    assert max(allocations(lambda: distance_pool(*inputs).sum().backward())) < 8e6


def test_rows_are_those_of_the_whole() -> None:
    _, log_w, sharpness = drawn((5, 7))
    rows = torch.tensor([33, 0, 12])
    whole = distance_weights(log_w, sharpness, (5, 7), window=3)
    torch.testing.assert_close(distance_weights(log_w, sharpness[:, rows], (5, 7), window=3, queries=rows), whole[:, rows])
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 35, dtype=torch.double))


def test_operator_is_sound() -> None:
    x, log_w, sharpness = (t.requires_grad_() for t in drawn((1, 11)))
    torch.library.opcheck(torch.ops.regard.distance_pool.default, (x, log_w, sharpness, 1, 3, True))


def test_choice_is_explained_and_wrong_calls_are_named() -> None:
    class Pool(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return distance_pool(*inputs)

    assert [c.impl for c in explain(Pool(), *drawn((1, 30)))] == ["reference"]
    assert [c.impl for c in explain(Pool(), *drawn((1, 600)))] == ["tiles"]
    with pytest.raises(RegardError, match="for sequences"):
        distance_pool(*drawn((5, 7)), (5, 7), causal=True)
