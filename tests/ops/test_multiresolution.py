"""Multiresolution attention: every form against the definition, and the definition against loops over its formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import RegardError
from regard.ops._dispatch import explain, use_impl
from regard.ops.multiresolution import Resolution, multiresolution, multiresolution_weights, refined_blocks

CASES = [
    (24, Resolution(4, blocks_per_row=2)),
    (23, Resolution(4, blocks_per_row=2)),
    (24, Resolution(4, 9, coarse=False, diagonal_blocks=3)),
    (50, Resolution(7, blocks_per_row=1, first_blocks=1, diagonal_blocks=1)),
    (40, Resolution(4, 5)),
    (40, Resolution(4, 5, coarse=False)),
    (64, Resolution(8, 500)),
    (9, Resolution(16)),
    (11, Resolution(1, blocks_per_row=3)),
]


def qkv(n: int, dtype: torch.dtype = torch.double, heads: int = 3, d: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [2 * torch.randn(2, n, heads, d, generator=generator, dtype=dtype).transpose(1, 2) for _ in range(3)]


def mask_of(n: int) -> Tensor:
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) < 0.6
    mask[1] = torch.arange(n) < n // 3
    return mask


def run(impl: str, n: int, resolution: Resolution, key_mask: Tensor | None) -> list[Tensor]:
    q, k, v = (x.requires_grad_() for x in qkv(n))
    with use_impl(multiresolution=impl):
        out = multiresolution(q, k, v, resolution, scale=0.7, key_mask=key_mask)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), cotangent)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n", "resolution"), CASES, ids=str)
def test_every_form_equals_the_definition(n: int, resolution: Resolution, masked: bool) -> None:
    """`rows` puts log-sum-exp in the place of the maximum: its 1e-6 in the denominator differs by up to 1e-6."""
    key_mask = mask_of(n) if masked else None
    expected = run("reference", n, resolution, key_mask)
    for impl, bound in (("pairs", 1e-10), ("rows", 1e-5)):
        for name, a, b in zip("oqkv", expected, run(impl, n, resolution, key_mask), strict=True):
            assert (a - b).abs().max() <= bound * a.abs().max().clamp(min=1e-3), (impl, name)


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: list[bool], r: Resolution, scale: float) -> Tensor:
    """One head, (N, d) of whole blocks, by the formula."""
    b, n, t = r.block_size, len(q) // r.block_size, []
    spans = [range(i * b, (i + 1) * b) for i in range(n)]
    q, k, v = (x * torch.tensor(mask, dtype=x.dtype)[:, None] for x in (q, k, v))
    t = [sum(mask[c] for c in span) for span in spans]
    mean = [[x[list(span)].sum(0) / (t[i] + 1e-6) for i, span in enumerate(spans)] for x in (q, k, v)]
    low = [[scale * float(mean[0][i] @ mean[1][j]) for j in range(n)] for i in range(n)]
    priority = {}
    for i in range(n):
        for j in range(n):
            p = low[i][j] - max(low[i]) - (1e4 if t[i] * t[j] == 0 else 0)
            p += 5e3 if r.diagonal_blocks and abs(i - j) <= r.diagonal_blocks // 2 else 0
            priority[i, j] = p + 5e3 * (i < r.first_blocks) + 5e3 * (j < r.first_blocks)
    count = min(r.num_blocks or n * r.blocks_per_row, n * n)
    fine = set(sorted(priority, key=lambda at: -priority[at])[:count])
    out = torch.zeros_like(v)
    for i, span in enumerate(spans):
        for row in span:
            scores = {c: scale * float(q[row] @ k[c]) for j in range(n) if (i, j) in fine for c in spans[j] if mask[c]}
            most = max([*scores.values(), *([max(low[i])] if r.coarse else [])], default=0.0)
            top, total = torch.zeros_like(v[0]), 1e-6
            for c, s in scores.items():
                top, total = top + math.exp(s - most) * v[c], total + math.exp(s - most)
            for j in range(n):
                if r.coarse and (i, j) not in fine:
                    w = t[j] * math.exp(low[i][j] - most)
                    top, total = top + w * mean[2][j], total + w
            out[row] = top / total * mask[row]
    return out


@pytest.mark.parametrize("resolution", [CASES[0][1], CASES[2][1], Resolution(4, 24, first_blocks=1, diagonal_blocks=1)], ids=str)
def test_the_definition_is_the_formula(resolution: Resolution) -> None:
    q, k, v = qkv(24)
    key_mask = mask_of(24)
    with use_impl(multiresolution="reference"):
        out = multiresolution(q, k, v, resolution, scale=0.7, key_mask=key_mask)
    for s in range(2):
        for h in range(3):
            expected = by_loops(q[s, h], k[s, h], v[s, h], key_mask[s].tolist(), resolution, 0.7)
            torch.testing.assert_close(out[s, h], expected, rtol=1e-9, atol=1e-9)


def test_all_blocks_are_exact_attention_and_chosen_blocks_are_counted() -> None:
    q, k, v = qkv(30)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for coarse in (True, False):
        torch.testing.assert_close(multiresolution(q, k, v, Resolution(5, 36, coarse=coarse), scale=5**-0.5), exact, rtol=1e-5, atol=1e-5)
    assert refined_blocks(q, k, Resolution(5, 7), scale=1.0).sum((-1, -2)).unique().tolist() == [7]
    assert refined_blocks(q, k, Resolution(5, blocks_per_row=2), scale=1.0).sum((-1, -2)).unique().tolist() == [12]
    assert refined_blocks(q, k, Resolution(5, 6, diagonal_blocks=1), scale=1.0).diagonal(0, -2, -1).all()
    first = refined_blocks(q, k, Resolution(5, 11, first_blocks=1), scale=1.0)
    assert first[..., 0, :].all() and first[..., :, 0].all() and first.sum() == 6 * 11


def test_ties_lose_no_block() -> None:
    """Equal scores everywhere: the blocks that are not refined still count, whichever they are."""
    q, k, v = (torch.zeros(1, 1, 16, 2, dtype=torch.double), torch.zeros(1, 1, 16, 2, dtype=torch.double), qkv(16, heads=1, d=2)[2][:1])
    for impl in ("reference", "pairs", "rows"):
        with use_impl(multiresolution=impl):
            out = multiresolution(q, k, v, Resolution(4, 5), scale=1.0)
        torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), rtol=1e-5, atol=1e-5)


def test_weights_and_chosen_rows_are_what_multiplies_the_values() -> None:
    for masked in (False, True):
        q, k, v = qkv(23)
        options: dict[str, Any] = {"scale": 0.7, "key_mask": mask_of(23) if masked else None}
        for resolution in (CASES[1][1], Resolution(4, 8, coarse=False)):
            weights = multiresolution_weights(q, k, resolution, **options)
            torch.testing.assert_close(weights @ v, multiresolution(q, k, v, resolution, **options), rtol=1e-5, atol=1e-5)
            rows = torch.tensor([22, 0, 9])
            torch.testing.assert_close(multiresolution_weights(q, k, resolution, queries=rows, **options), weights[:, :, rows])


def test_gradcheck_and_half_precision() -> None:
    resolution = Resolution(3, blocks_per_row=2)
    inputs = tuple(x[:1, :2].contiguous().requires_grad_() for x in qkv(10))
    assert torch.autograd.gradcheck(lambda *x: multiresolution(*x, resolution, scale=0.7), inputs, atol=1e-5)
    q, k, v = (x.to(torch.bfloat16) for x in qkv(64))
    exact = multiresolution(*(x.double() for x in (q, k, v)), resolution, scale=0.7)
    for impl in ("rows", "pairs", "reference"):
        with use_impl(multiresolution=impl):
            out = multiresolution(q, k, v, resolution, scale=0.7)
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() < 1e-2 * exact.abs().max()


def test_hidden_tokens_are_silent_and_all_hidden_is_zero() -> None:
    key_mask = mask_of(23)
    key_mask[1] = False
    for impl in ("reference", "pairs", "rows"):
        q, k, v = (x.requires_grad_() for x in qkv(23))
        with use_impl(multiresolution=impl):
            out = multiresolution(q, k, v, CASES[1][1], scale=1e3, key_mask=key_mask)
        grads = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert out[1].abs().max() == 0
        for x in (out, *grads):
            assert x.isfinite().all() and x.transpose(1, 2)[~key_mask].abs().max() == 0


def test_memory_and_work() -> None:
    n, heads, d, b = 2048, 2, 8, 32
    q, k, v = (torch.randn(1, heads, n, d) for _ in range(3))
    resolution = Resolution(b)
    with FlopCounterMode(display=False) as counter:
        multiresolution(q, k, v, resolution, scale=1.0)
    blocks = n // b
    assert counter.get_total_flops() == heads * d * (4 * 4 * blocks * b * b + 4 * blocks**2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        multiresolution(q.requires_grad_(), k, v, resolution, scale=1.0).sum().backward()
    live = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    assert 0 < most < 2 * n * n


def test_operator_is_well_formed() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().requires_grad_() for x in qkv(20))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.regard.multiresolution_rows.default, (q, k, v, mask_of(20), Resolution(4).numbers(), 0.5), test_utils=tests)


@pytest.mark.compile
@pytest.mark.parametrize("impl", ["rows", "pairs"])
def test_compiles_and_exports_with_a_free_length(impl: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return multiresolution(q, k, v, Resolution(4, blocks_per_row=2), scale=0.5)

    with use_impl(multiresolution=impl):
        inputs = tuple(x.float() for x in qkv(24))
        length = torch.export.Dim("length", min=2, max=5000) if impl == "rows" else torch.export.Dim.AUTO
        program = torch.export.export(Module(), inputs, dynamic_shapes=({2: length},) * 3)
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (24, 37, 8, 5, *((3,) if impl == "rows" else ())):
            inputs = tuple(x.float().requires_grad_() for x in qkv(n))
            expected = Module()(*inputs)
            torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-4, atol=1e-4)
            out = compiled(*inputs)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
            for a, b in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", ["rows", "pairs"])
def test_transforms(impl: str) -> None:
    q, k, v = (torch.stack((x, 2 * x)) for x in qkv(20))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return multiresolution(q, k, v, Resolution(4, blocks_per_row=2), scale=0.5).square().sum()

    gradient = torch.func.grad(loss, (0, 1, 2))
    with use_impl(multiresolution=impl):
        together = torch.func.vmap(gradient)(q, k, v)
        for i in range(2):
            for a, b in zip(together, gradient(q[i], k[i], v[i]), strict=True):
                torch.testing.assert_close(a[i], b)


def test_second_derivatives_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(9))
    (gradient,) = torch.autograd.grad(multiresolution(q, k, v, Resolution(4), scale=1.0).square().sum(), q, create_graph=True)
    with pytest.raises(RegardError, match="differentiable once"):
        gradient.sum().backward()


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    q, k, v = (x.float()[:1, :1] for x in qkv(24))
    torch.manual_seed(0)
    plain = multiresolution(q, k, v, CASES[0][1], scale=0.1)
    drawn = torch.stack([multiresolution(q, k, v, CASES[0][1], scale=0.1, dropout=0.3) for _ in range(600)])
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2
    assert (drawn.mean(0) - plain).abs().max() < 0.15 * drawn.std(0).max()


def test_the_choice_is_told_and_final() -> None:
    def chosen(**options: Any) -> str:
        class Module(torch.nn.Module):
            def forward(self) -> Tensor:
                return multiresolution(*(x.float() for x in qkv(8)), Resolution(4), scale=1.0, **options)

        return str(explain(Module())[0])

    assert chosen().startswith("multiresolution: rows")
    assert chosen(dropout=0.5).startswith("multiresolution: pairs (dropout")
    with use_impl(multiresolution="rows"), pytest.raises(RegardError, match="without dropout"):
        chosen(dropout=0.5)


@pytest.mark.parametrize("option", ["block_size", "num_blocks", "blocks_per_row"])
def test_wrong_options_are_named(option: str) -> None:
    with pytest.raises(RegardError, match=f"{option}=0"):
        Resolution(**{option: 0})
    with pytest.raises(RegardError, match="first_blocks=-1"):
        Resolution(first_blocks=-1)
