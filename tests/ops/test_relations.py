"""Relations and patches: the fast ways against the definitions, in pieces, with statistics, counted and bounded."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard import use_impl
from regard.ops.local_window import RELATIONS, Pairs, Patches, Relation, Window, pad, pair_differences, relate, relation_pieces
from regard.workbench.measure import peak_bytes

D = torch.float64
WINDOWS = [
    Window(3, padding="reflect"),
    Window(3, stride=2, dilation=2, padding="zero", offset_first=-2),
    Window(5, stride=2, padding="mask"),
    Window(1),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=D)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN."""
    plain = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: plain(*a, **k).fill_(float("nan")))


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in pieces of two rows of one image at one offset."""
    if request.param == "pieces":

        def small(sizes: tuple[int, int, int], unit: int, device: torch.device):
            for i in range(sizes[0]):
                for j in range(sizes[1]):
                    for k in range(0, sizes[2], 2):
                        yield slice(i, i + 1), slice(j, j + 1), slice(k, min(k + 2, sizes[2]))

        monkeypatch.setattr(relation_pieces, "chunks", small)


def both_ways(call, inputs: list[Tensor]) -> None:
    """Values and gradients of the pieces equal those of the reference."""

    def run(impl: str) -> list[Tensor]:
        xs = [x.clone().requires_grad_() for x in inputs]
        with use_impl(window_map=impl, window_moments=impl, window_accumulate=impl):
            ys = call(*xs)
        found = torch.autograd.grad(ys, xs, [randn(*y.shape, seed=5) for y in ys], allow_unused=True)
        return [*ys, *(g for g in found if g is not None)]

    expected = run("reference")
    for one, other in zip(run("pieces"), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_networks_on_pairs(relation: Relation, window: Window, pieces: None) -> None:
    phi, psi, places = randn(2, 3, 7, 9), randn(2, 3, 7, 9, seed=1), randn(2, 7, 9)
    rows = {"dot": 1, "concatenation": 6}.get(relation, 3) + 2
    w1, b1, w2, b2, scale, shift = (randn(*s, seed=2) for s in ((4, rows), (4,), (2, 4), (2,), (rows,), (rows,)))

    def call(phi, psi, places, w1, b1, w2, b2, scale, shift):
        pairs = relate(phi, psi, relation, window, places).affine(scale, shift)
        return pairs.map(w1, b1, w2, b2), *pairs.through(w1)[:2]

    both_ways(call, [phi, psi, places, w1, b1, w2, b2, scale, shift])


def values(pairs: Pairs) -> Tensor:
    """(rows, values) that count."""
    rows = pairs._all()
    seen = pairs.inside if pairs.inside.numel() else rows.new_ones(rows.shape[1], *rows.shape[3:])
    return rows.masked_select(seen[:, None].bool().expand(rows.shape)).view(rows.shape[0], -1)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_statistics_of_pairs(relation: Relation, window: Window) -> None:
    pairs = relate(3 + randn(2, 3, 8, 7), randn(2, 3, 8, 7, seed=1), relation, window, randn(2, 8, 7))
    weight = randn(4, pairs.left.shape[0] + pairs.given.shape[0])
    for found, wanted in ((pairs.statistics(), values(pairs)), (pairs.through(weight), weight @ values(pairs).relu())):
        torch.testing.assert_close(found[0], wanted.mean(1))
        torch.testing.assert_close(found[1], wanted.var(1, correction=0))
        assert found[2].item() == wanted.shape[1]


def patches(kind: str, phi: Tensor, psi: Tensor, window: Window) -> Patches:
    return pair_differences(phi, psi, window) if kind == "pairs" else Patches(pad(psi.transpose(0, 1), window), window)


@pytest.mark.parametrize("kind", ["pairs", "single"])
@pytest.mark.parametrize("window", [w for w in WINDOWS if w.kernel_size < 5], ids=str)
def test_networks_on_patches(kind: str, window: Window, pieces: None) -> None:
    phi, psi, k = randn(2, 3, 7, 8), randn(2, 3, 7, 8, seed=1), window.kernel_size**2
    numbers = k * k if kind == "pairs" else 3 * k

    def call(phi, psi, scale, shift, weight):
        return (patches(kind, phi, psi, window).accumulate(scale, shift, weight),)

    both_ways(call, [phi, psi, randn(numbers), randn(numbers, seed=1), randn(4, numbers)])


@pytest.mark.parametrize("kind", ["pairs", "single"])
def test_numbers_of_a_patch_are_in_the_papers_order(kind: str) -> None:
    """Each number alone, by a unit weight, against a literal loop; and its statistics."""
    window, phi, psi = Window(3, stride=2, padding="reflect"), 1 + randn(2, 2, 5, 6).abs(), 1 + randn(2, 2, 5, 6, seed=1).abs()
    around = [[pad(t, window)[..., y : y + 5 : 2, x : x + 6 : 2] for y in range(3) for x in range(3)] for t in (phi, psi)]
    if kind == "pairs":
        wanted = torch.stack([(q * k).sum(1) for q in around[0] for k in around[1]])
    else:
        wanted = torch.stack([k[:, c] for c in range(2) for k in around[1]])
    found, n = patches(kind, phi, psi, window), wanted.shape[0]
    assert found.numbers == n
    torch.testing.assert_close(found.accumulate(torch.ones(n, dtype=D), torch.zeros(n, dtype=D), torch.eye(n, dtype=D)), wanted)
    mean, variance, count = found.statistics()
    assert count.item() == wanted[0].numel()
    torch.testing.assert_close(mean, wanted.flatten(1).mean(1))
    torch.testing.assert_close(variance, wanted.flatten(1).var(1, correction=0))


def test_statistics_do_not_lose_a_small_variance_beside_a_large_mean() -> None:
    phi, psi = 1e3 + 1e-2 * randn(2, 1, 9, 9), 1e3 + 1e-2 * randn(2, 1, 9, 9, seed=1)
    pairs = relate(phi.float(), psi.float(), "hadamard", Window(3, padding="reflect"))
    torch.testing.assert_close(pairs.statistics()[1], values(pairs).double().var(1, correction=0), rtol=1e-2, atol=0)


def test_gradients_in_float64() -> None:
    window = Window(3, padding="mask")

    def call(phi: Tensor, psi: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        pairs = relate(phi, psi, "hadamard", window)
        mean, variance, _ = pairs.statistics()
        pairs = pairs.affine(1 / (variance + 1).sqrt(), -mean)
        level, spread, _ = pairs.through(w1)
        return pairs.map(w1 / (spread + 1).sqrt()[:, None], -level, w2, w2[:, 0])

    inputs = [randn(1, 2, 3, 4), randn(1, 2, 3, 4, seed=1), randn(2, 2), randn(2, 2, seed=1)]
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs])


def test_counts_the_products_of_the_network() -> None:
    window, phi = Window(3, padding="zero"), randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        relate(phi, phi, "subtraction", window).map(randn(4, 3), randn(4), randn(2, 4), randn(2))
    assert counter.get_total_flops() == 2 * 2 * 64 * 9 * (3 * 4 + 4 * 2)


def test_no_map_of_all_pairs_exists() -> None:
    """Forward and backward, statistics included, within the logits, their gradient and some maps; all pairs would be 29 MB once."""
    phi, window = randn(2, 16, 48, 48).float().requires_grad_(), Window(7, padding="reflect")
    w1, w2 = randn(16, 16).float(), randn(1, 16).float()

    def call() -> None:
        pairs = relate(phi, phi, "subtraction", window)
        pairs = pairs.affine(pairs.statistics()[1], pairs.statistics()[0])
        torch.autograd.grad(pairs.map(w1, pairs.through(w1)[0], w2, w2[:, 0]).sum(), phi)

    assert peak_bytes(call, phi.device) < 20e6
