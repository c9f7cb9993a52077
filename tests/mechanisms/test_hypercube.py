"""What only `hypercube` has: the graph against its Gray code, the score of graphs, patterns as data for other kernels and for pictures."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard import registry
from regard.errors import RegardError, RegardTypeError
from regard.ops._dispatch import explain, use_impl
from regard.ops.softmax_attention.flex import flex_block_mask
from regard.ops.softmax_attention.hypercube import HypercubePattern, Mirrors
from regard.ops.softmax_attention.patterns import SparsePattern, sparse_attend
from regard.testing import CHECKS, Subject, run


def test_the_layout_is_the_hypercube_in_gray_order() -> None:
    for n in range(1, 40):
        layout = regard.hypercube_layout(n)
        for i, j in itertools.product(range(n), range(n)):
            apart = bin((i ^ i >> 1) ^ (j ^ j >> 1)).count("1")
            assert layout[i, j].item() == (apart <= 1)
        assert torch.equal(layout, regard.hypercube_layout(64)[:n, :n]) and torch.equal(layout, layout.T)
        assert layout.diagonal(1).all() and layout.sum(1).max() <= (n - 1).bit_length() + 1
    with pytest.raises(RegardError, match="num_blocks=0"):
        regard.hypercube_layout(0)


@pytest.mark.parametrize(("n", "size"), [(1, 4), (7, 1), (16, 4), (19, 4), (64, 4), (131, 16), (40, 64)])
def test_every_form_equals_the_dense_mask(n: int, size: int) -> None:
    pattern, hidden = HypercubePattern(size), torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.4
    hidden[1] = True
    for key_mask in (None, ~hidden):
        found: list[list[Tensor]] = []
        for impl in ("reference", "dense", "blocks"):
            generator = torch.Generator().manual_seed(n)
            q, k, v, g = (torch.randn(2, n, 3, 4, generator=generator, dtype=torch.double).transpose(1, 2).requires_grad_() for _ in range(4))
            with use_impl(sparse_attention=impl):
                out = sparse_attend(q, k, v, pattern, key_mask=key_mask)
            found.append([out, *torch.autograd.grad(out, (q, k, v), g.detach())])
        for others in zip(*found, strict=True):
            for other in others[1:]:
                torch.testing.assert_close(other, others[0], rtol=1e-10, atol=1e-10)


def test_neighbours_are_a_linear_map_with_its_adjoint() -> None:
    x = torch.randn(2, 28, 2, 3, dtype=torch.double, requires_grad=True)
    view = Mirrors(4, 2, 3, 3, 6)
    part = view.take(x)
    assert part.shape == (6, 2, 16, 3)
    cotangent = torch.randn_like(part)
    (expected,) = torch.autograd.grad(part, x, cotangent)
    total = torch.ones_like(x.detach())
    view.add(total, cotangent)
    torch.testing.assert_close(total, 1 + expected)


@pytest.mark.parametrize("check", [n for n in CHECKS if n not in ("compiles_whole", "exports_with_free_sizes", "attn_mask_hides_pairs")])
def test_single_tokens_pass_the_suite(check: str) -> None:
    """block_size=1. That attn_mask hides pairs is tested by the suite on a pair, (3, 1), that is none of this cube."""
    options = {"dim": 12, "num_heads": 2, "block_size": 1}
    card, kind = registry.card("hypercube"), registry.get("hypercube")
    (outcome, *_) = [*run(Subject("tokens", kind, options, "sequence", card.capabilities(kind(**options)), card, lenient=True), [check]), None]
    assert outcome is None or outcome.status != "fail", outcome.message


def test_long_sequences_equal_the_dense_mask_with_padding() -> None:
    module = regard.create("hypercube", 16, 2, block_size=8)
    key_mask = torch.arange(700)[None] < torch.tensor([[700], [433]])
    found = []
    for impl in ("blocks", "reference"):
        x = torch.randn(2, 700, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with use_impl(sparse_attention=impl):
            out = module(x, key_mask=key_mask)
        found.append([out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "blocks" in str(explain(module, x)[0]) and "dense" in str(explain(module, x[:, :500])[0])


def test_dropout_trains_and_rests() -> None:
    module = regard.create("hypercube", 8, 2, dropout=0.5)
    x = torch.randn(1, 300, 8)
    assert (module(x) - module(x)).abs().max() > 1e-3
    module.eval()
    assert torch.equal(module(x), module(x))


def cube(bits: int) -> Tensor:
    return regard.hypercube_layout(2**bits).double()


def test_nip_by_hand_and_by_its_order_of_graphs() -> None:
    for n in (1, 2, 12):
        for cost in ("max", "mean"):
            score, layers = regard.nip(torch.ones(n, n), cost=cost)
            assert abs(score - 1) < 1e-12 and layers == 1
    # Of a path of three with loops, two layers: the worst pair gets 1/2 * 1/3; 3 min = 1/2, cost 2 * 3 / 3.
    path = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    assert regard.nip(path, max_layers=2) == (pytest.approx(0.25), 2)
    assert regard.nip(path, max_layers=1) == (0.0, 0) == regard.nip(torch.eye(4))
    window = (torch.arange(128)[:, None] - torch.arange(128)).abs() <= 3
    hub = window.clone()
    hub[:4], hub[:, :4] = True, True
    scores = [regard.nip(graph)[0] for graph in (window, hub, torch.ones(128, 128), cube(7))]
    assert scores == sorted(scores) and scores[0] < 1e-3 and 0.01 < scores[1] < 0.5 and scores[3] > 1


@pytest.mark.parametrize(
    ("graph", "options", "text"),
    [
        (torch.ones(2, 3), {}, r"square, \(n, n\), got \(2, 3\)"),
        (-torch.eye(2), {}, "negative"),
        (torch.tensor([[1, 0], [0, 0]]), {}, "row of zeros, 1"),
        (torch.eye(2), {"cost": "sum"}, "cost='sum'"),
        (torch.eye(2), {"max_layers": 0}, "max_layers=0"),
    ],
)
def test_wrong_graphs_are_named(graph: Tensor, options: dict[str, Any], text: str) -> None:
    with pytest.raises(RegardError, match=text):
        regard.nip(graph, **options)
    with pytest.raises(RegardTypeError, match="must be a tensor"):
        regard.nip([[1]])  # type: ignore[arg-type]


PATTERNS: list[Any] = [HypercubePattern(4), HypercubePattern(1), SparsePattern("strided", 5), SparsePattern("local", 4, causal=False)]
PATTERNS += [SparsePattern("fixed", 6, 2, 2), SparsePattern("strided", None, head_mode="split"), SparsePattern("all")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_as_flex_block_masks(pattern: Any) -> None:
    """The relation that FlexAttention is given, taken pair by pair, is the dense mask; no tile with an allowed pair is skipped."""
    from torch.nn.attention.flex_attention import create_mask

    n, heads = 150, 4
    key_mask = torch.rand(2, n) < 0.6
    for mask in (None, key_mask):
        expected = pattern.mask(n, heads).expand(heads, n, n)[None]
        expected = expected if mask is None else expected & mask[:, None, None]
        given = flex_block_mask(pattern, n, heads, "cpu", mask)
        assert torch.equal(create_mask(given.mask_mod, expected.shape[0], heads, n, n, device="cpu"), expected)
        tiles = torch.nn.functional.pad(expected, (0, 106, 0, 106)).unflatten(-1, (2, 128)).unflatten(-3, (2, 128)).any(-1).any(-2)
        assert torch.equal(given.to_dense().bool(), tiles)


def test_flex_is_for_cuda() -> None:
    q = torch.randn(1, 2, 8, 4)
    with use_impl(sparse_attention="flex"), pytest.raises(RegardError, match="runs on CUDA"):
        sparse_attend(q, q, q, HypercubePattern(2))


def test_patterns_are_drawn_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at, pattern in enumerate((regard.create("hypercube", 8, 2), regard.create("sparse", 8, 2, head_mode="split"), SparsePattern("fixed", 4))):
        path = regard.plot_pattern(pattern, 40, tmp_path / f"{at}.png")
        assert path.read_bytes().startswith(b"\x89PNG") and len([*tmp_path.iterdir()]) == at + 1
    with pytest.raises(RegardError, match="MultiHeadAttention has no pattern"):
        regard.plot_pattern(regard.create("multi_head", 8, 2), 8, path)
    with pytest.raises(RegardError, match="n=0"):
        regard.plot_pattern(SparsePattern(), 0, path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RegardError, match="plot_pattern needs matplotlib"):
        regard.plot_pattern(SparsePattern(), 8, path)


@pytest.mark.parametrize(
    ("options", "text"), [({"num_heads": 3}, "not divisible by num_heads=3"), ({"block_size": 0}, "block_size=0"), ({"dropout": 1.0}, "dropout=1.0")]
)
def test_wrong_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RegardError, match=text):
        regard.create("hypercube", 8, **options)


def test_wrong_calls_are_named() -> None:
    module, x = regard.create("hypercube", 8, 2), torch.randn(2, 5, 8)
    with pytest.raises(RegardError, match="takes no context"):
        module(x, x)
    with pytest.raises(RegardError, match="attn_mask must broadcast"):
        module(x, attn_mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(RegardTypeError, match="causal"):
        regard.create("hypercube", 8, 2, causal=True)
