"""Block patterns under softmax attention: every form against the dense mask, and the mask against the definition."""

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import RegardError
from regard.ops import _dispatch
from regard.ops._dispatch import use_impl
from regard.ops.softmax_attention.blocks import Columns, Residues, Rows, Windows, block_attend, block_attention
from regard.ops.softmax_attention.patterns import KINDS, MODES, SparsePattern, sparse_attend, sparse_pattern

PATTERNS = [
    SparsePattern("strided", 7),
    SparsePattern("strided", 40, head_mode="split"),
    SparsePattern("strided", 1),
    SparsePattern("strided", None, causal=False),
    SparsePattern("strided", 8, head_mode="interleaved", layer_index=1, causal=False),
    SparsePattern("local", 34),
    SparsePattern("local", 5, causal=False),
    SparsePattern("fixed", 8, 2, 2),
    SparsePattern("fixed", 7, 3, head_mode="split"),
    SparsePattern("fixed", 8, 2, 4, head_mode="interleaved", layer_index=1),
    SparsePattern("fixed", 8, 2, 2, causal=False),
    SparsePattern("fixed", None, 1, head_mode="split", causal=False),
    SparsePattern("fixed", 3, 1),
]


def qkv(n: int, heads: int = 4, d: int = 4, batch: int = 2, dtype: torch.dtype = torch.double) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(batch, n, heads, d, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def both(pattern: SparsePattern, n: int, key_mask: torch.Tensor | None = None) -> list[list[torch.Tensor]]:
    """Output and gradients by the definition and by blocks."""
    found = []
    for impl in ("reference", "blocks"):
        q, k, v = qkv(n)
        with use_impl(sparse_attention=impl):
            out = sparse_attend(q, k, v, pattern, key_mask=key_mask)
        generator = torch.Generator().manual_seed(5)
        cotangent = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)])
    return found


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_blocks_equal_the_dense_mask(pattern: SparsePattern) -> None:
    for n in (1, 2, 30, 64, 131):
        hidden = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.4
        hidden[0] = True
        for key_mask in (None, ~hidden):
            for name, a, b in zip(("out", "q", "k", "v"), *both(pattern, n, key_mask), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, msg=lambda m, name=name, n=n: f"{name} at N={n}: {m}")


@pytest.mark.parametrize("pattern", PATTERNS[::3], ids=str)
def test_blocks_in_plain_torch_equal_the_dense_mask(pattern: SparsePattern, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of other devices, run here."""
    monkeypatch.setattr(_dispatch, "on_cpu", lambda x: False)
    key_mask = torch.rand(2, 67, generator=torch.Generator().manual_seed(2)) < 0.6
    key_mask[1] = False
    for a, b in zip(*both(pattern, 67, key_mask), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_the_pattern_is_the_definition() -> None:
    n, l, c, stripes = 17, 5, 2, 2
    for kind, mode, layer, causal in itertools.product(KINDS, MODES, (0, 1), (True, False)):
        given = sparse_pattern(n, 4, kind, l, c, stripes, mode, layer, causal)
        for h, i, j in itertools.product(range(4), range(n), range(n)):
            near = abs(i - j) < l if kind != "fixed" else i // l == j // l
            s = h % stripes
            far = (i - j) % l == 0 if kind == "strided" else l - (s + 1) * c <= j % l < l - s * c
            uses = {"merged": (True, True), "split": (h % 2 == 0, h % 2 == 1), "interleaved": (layer == 0, layer == 1)}[mode]
            if kind == "local":
                uses = (True, False)
            expected = ((uses[0] and near) or (uses[1] and far) or kind == "all") and (j <= i or not causal)
            assert given[h, i, j].item() == expected, (kind, mode, layer, causal, h, i, j)


VIEWS = [Rows(2, 9), Windows(4, 3, 4, 4), Windows(0, 3, 4, 12), Residues(4, 6)]
VIEWS += [Columns(6, 3, ((1, 2), (4, 5))), Columns(6, 4, ((0,), (3,)), own=True)]


@pytest.mark.parametrize("view", VIEWS, ids=str)
def test_views_are_linear_maps_with_their_adjoints(view: Any) -> None:
    x = torch.randn(2, 24, 2, 3, dtype=torch.double, requires_grad=True)
    part = view.take(x)
    cotangent = torch.randn_like(part)
    (expected,) = torch.autograd.grad(part, x, cotangent)
    total = torch.ones_like(x.detach())
    view.add(total, cotangent)
    torch.testing.assert_close(total, 1 + expected)


def test_gradcheck() -> None:
    q, k, v = qkv(9, 2, 2, 1)
    key_mask = torch.arange(9)[None] != 1
    options = SparsePattern("fixed", 4).numbers()
    assert torch.autograd.gradcheck(lambda *x: block_attend(*x, "sparse", options, scale=0.7, key_mask=key_mask), (q, k, v))


def test_second_derivatives_are_refused() -> None:
    q, k, v = qkv(9, 2, 2, 1)
    out = block_attend(q, k, v, "sparse", SparsePattern("strided", 4).numbers(), scale=0.7)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RegardError, match="differentiable once"):
        gradient.sum().backward()


def test_rows_without_keys_are_zero_and_silent() -> None:
    q, k, v = qkv(12)
    pattern = SparsePattern("fixed", 5, 1, head_mode="interleaved", layer_index=1)
    with use_impl(sparse_attention="blocks"):
        out = sparse_attend(q, k, v, pattern)
    assert out[:, :, :4].abs().max() == 0 and out[:, :, 4].abs().min() > 0
    grads = torch.autograd.grad(out[:, :, :4].sum(), (q, k, v))
    assert all(g.abs().max() == 0 for g in grads)


def test_large_scores_and_half_precision() -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv(70))
        found = []
        for impl, cast in (("reference", torch.double), ("blocks", dtype)):
            with use_impl(sparse_attention=impl):
                out = sparse_attend(*(x.to(cast) for x in (q, k, v)), SparsePattern("strided", 9))
            found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
        for a, b in zip(*found, strict=True):
            assert (a.double() - b.double()).abs().max() <= bound * a.double().abs().max()
    q, k, v = (1e3 * x.float() for x in qkv(70))
    with use_impl(sparse_attention="blocks"):
        assert sparse_attend(q, k, v, SparsePattern("strided", 9)).isfinite().all()


def test_any_strides() -> None:
    found = []
    for impl in ("reference", "blocks"):
        q, k, v = (torch.randn(2, 4, 8, 40, generator=torch.Generator().manual_seed(i)).mT.requires_grad_() for i in range(3))
        with use_impl(sparse_attention=impl):
            out = sparse_attend(q, k, v, SparsePattern("fixed", 6, 2))
        found.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_memory_and_work_stay_below_the_square() -> None:
    n, pattern = 2048, SparsePattern("strided", 32)
    q, k, v = (torch.randn(1, 2, n, 8) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        sparse_attend(q, k, v, pattern)
    least = 4 * 8 * 2 * int(pattern.mask(n, 2).sum())
    assert least < counter.get_total_flops() < 4 * least < 4 * 8 * 2 * n * n
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = sparse_attend(q.requires_grad_(), k, v, pattern)
        out.sum().backward()
    live = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert 0 < most < n * n


def test_vmap_equals_a_loop() -> None:
    q, k, v = (torch.stack([x.detach()[:, :, :40] for x in xs]) for xs in zip(*(qkv(40 + i, 2) for i in range(3)), strict=True))
    options = SparsePattern("strided", 6).numbers()

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return block_attend(q, k, v, "sparse", options, scale=0.5).square().sum()

    gradient = torch.func.grad(loss, (0, 1, 2))
    found = torch.func.vmap(gradient, (0, None, 2))(q, k[0], v.movedim(0, 2))
    for i in range(3):
        for a, b in zip(found, gradient(q[i], k[0], v[i]), strict=True):
            torch.testing.assert_close(a[i], b)
    plain = torch.func.vmap(lambda q: block_attention(q, k[0], v[0], None, "sparse", list(options), 0.5)[0], 1)(q.movedim(0, 1))
    for i in range(3):
        torch.testing.assert_close(plain[i], block_attention(q[i], k[0], v[0], None, "sparse", list(options), 0.5)[0])


def test_operator_is_well_formed() -> None:
    q, k, v = (x.detach().transpose(1, 2) for x in qkv(20, 2))
    options = list(SparsePattern("strided", 6).numbers())
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(block_attention, (q, k, v, key_mask, "sparse", options, 0.5), test_utils=tests)


@pytest.mark.compile
def test_compiles_and_exports_with_a_free_length_by_blocks() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return sparse_attend(q, k, v, SparsePattern())

    q, k, v = (x.detach().float() for x in qkv(300, 2))
    length = torch.export.Dim("length", min=2, max=5000)
    program = torch.export.export(Module(), (q, k, v), dynamic_shapes=({2: length},) * 3)
    assert any("block_attention" in str(node.target) for node in program.graph.nodes)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (300, 37, 512):
        q, k, v = (x.detach().float().requires_grad_() for x in qkv(n, 2))
        expected = Module()(q, k, v)
        torch.testing.assert_close(program.module()(q, k, v), expected)
        out = compiled(q, k, v)
        torch.testing.assert_close(out, expected)
        for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(a, b)


def test_the_choice_is_told_and_final() -> None:
    def chosen(n: int, pattern: SparsePattern, **options: Any) -> str:
        q, k, v = (x.detach().float() for x in qkv(n, 2))

        class Module(torch.nn.Module):
            def forward(self) -> torch.Tensor:
                return sparse_attend(q, k, v, pattern, **options)

        return str(_dispatch.explain(Module())[0])

    assert chosen(255, SparsePattern()).startswith("sparse_attention: dense (below 256 positions")
    assert chosen(256, SparsePattern()).startswith("sparse_attention: blocks")
    assert chosen(300, SparsePattern("strided", 200)).startswith("sparse_attention: dense")
    assert "dropout" in chosen(600, SparsePattern(), dropout=0.1)
    assert "every pair" in chosen(600, SparsePattern("all"))
    q, k, v = qkv(8)
    with use_impl(sparse_attention="blocks"), pytest.raises(RegardError, match="no attn_mask"):
        sparse_attend(q, k, v, SparsePattern(), dropout=0.5)
    with use_impl(sparse_attention="blocks"), pytest.raises(RegardError, match="all"):
        sparse_attend(q, k, v, SparsePattern("all"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "star"}, "pattern='star'"),
        ({"head_mode": "both"}, "head_mode='both'"),
        ({"stride": 0}, "stride=0"),
        ({"kind": "fixed", "stride": 7, "summary": 4, "num_stripes": 2}, "summary=4 times num_stripes=2 must be at most stride=7"),
        ({"summary": 0}, "summary=0"),
        ({"layer_index": -1}, "layer_index=-1"),
    ],
)
def test_wrong_patterns_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RegardError, match=text):
        SparsePattern(**options)
