"""Samples off the grid: the fast way against the definition, the places that are special, and wrong calls."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import RegardError, use_impl
from regard.ops import deform_conv2d, deform_unfold
from regard.ops.deform import deform_apply, samples

# batch, channels, height, width, kernel, stride, padding, dilation, offset groups, groups, out channels
CASES = [
    (2, 4, 7, 6, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 3),
    (1, 6, 5, 9, (3, 3), (2, 2), (2, 2), (2, 2), 3, 2, 4),
    (2, 12, 6, 7, (1, 3), (2, 1), (0, 2), (1, 3), 6, 4, 8),
    (3, 2, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 1),
    (1, 8, 9, 8, (5, 5), (1, 1), (2, 2), (1, 1), 2, 8, 8),
    (1, 4, 2, 40, (3, 3), (1, 1), (7, 7), (7, 7), 2, 1, 3),
]


def made(case: tuple, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random arguments; every fifth offset is a whole number."""
    batch, channels, height, width, kernel, stride, padding, dilation, offset_groups, groups, out = case
    taps = kernel[0] * kernel[1]
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)]
    torch.manual_seed(0)
    offset = 2 * torch.randn(batch, 2 * offset_groups * taps, *size, dtype=dtype)
    offset.view(-1)[::5] = offset.view(-1)[::5].round()
    tensors = {"x": torch.randn(batch, channels, height, width, dtype=dtype), "offset": offset}
    tensors["weight"], tensors["bias"] = torch.randn(out, channels // groups, *kernel, dtype=dtype), torch.randn(out, dtype=dtype)
    tensors["mask"] = torch.randn(batch, offset_groups * taps, *size, dtype=dtype)
    tensors["weights"] = torch.randn(batch, 2, taps, *size, dtype=dtype)
    return tensors


def functions(case: tuple) -> dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]]:
    kernel, stride, padding, dilation, offset_groups, groups = case[4:10]
    place = {"stride": stride, "padding": padding, "dilation": dilation}
    out: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
        "unfold": (lambda x, offset: deform_unfold(x, offset, kernel, **place, offset_groups=offset_groups), ("x", "offset")),
        "v1": (lambda x, o, w: deform_conv2d(x, o, w, **place, groups=groups, offset_groups=offset_groups), ("x", "offset", "weight")),
        "v2": (
            lambda x, o, w, b, m: deform_conv2d(x, o, w, b, m, **place, groups=groups, offset_groups=offset_groups),
            ("x", "offset", "weight", "bias", "mask"),
        ),
    }
    if offset_groups == 1:
        out["apply"] = (lambda x, o, w: deform_apply(w, x, o, kernel, **place), ("x", "offset", "weights"))
        out["apply, one group"] = (lambda x, o, w: deform_apply(w[:, :1], x, o, kernel, **place), ("x", "offset", "weights"))
    return out


def numbers(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output and all gradients."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [samples.BUDGET, 2000])
def test_fast_way_is_the_definition(case: tuple, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "BUDGET", budget)
    tensors = made(case)
    for name, (function, takes) in functions(case).items():
        ours = numbers(function, [tensors[t] for t in takes])
        with use_impl("reference"):
            theirs = numbers(function, [tensors[t] for t in takes])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("way", ["gather", "reference"])
def test_no_offset_is_a_plain_convolution(way: str) -> None:
    x, w, b = torch.randn(2, 6, 9, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    offset = torch.zeros(2, 18, 5, 4)
    with use_impl(deform_conv2d=way, deform_unfold=way):
        plain = F.conv2d(x, w, b, 2, 2, 2, 2)
        torch.testing.assert_close(deform_conv2d(x, offset, w, b, stride=2, padding=2, dilation=2, groups=2), plain, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(deform_unfold(x, offset, 3, 2, 2, 2), F.unfold(x, 3, 2, 2, 2))


@pytest.mark.parametrize("way", ["gather", "reference"])
@pytest.mark.parametrize(
    ("at", "value", "slope"),
    [
        (-1.5, 0, 0),
        (-1, 0, 0),  # where grid_sample has a slope
        (-0.75, 0.25 * 3, 3),
        (0, 3, 5 - 3),  # on a pixel: towards the next
        (1, 5, 11 - 5),
        (1.5, 8, 6),
        (2, 11, -11),
        (2.25, 0.75 * 11, -11),
        (3, 0, 0),
        (1e30, 0, 0),
        (math.inf, 0, 0),
        (-math.inf, 0, 0),
        (math.nan, 0, 0),
    ],
)
def test_places_along_a_line(way: str, at: float, value: float, slope: float) -> None:
    """The map 3, 5, 11; exact one-sided slopes, none outside, and nothing read out of bounds."""
    for along in (0, 1):
        x = torch.tensor([3.0, 5, 11]).view((1, 1, 3, 1) if along == 0 else (1, 1, 1, 3)).requires_grad_()
        shape = (1, 2, 3, 1) if along == 0 else (1, 2, 1, 3)
        offset = torch.zeros(shape)
        offset[0, along].view(-1)[0] = at
        offset.requires_grad_()
        with use_impl(deform_unfold=way):
            y = deform_unfold(x, offset, 1)[0, 0, 0]
        y.backward()
        assert x.grad is not None and offset.grad is not None
        assert y.item() == pytest.approx(value)
        assert offset.grad[0, along].view(-1)[0].item() == pytest.approx(slope)
        assert offset.grad[0, 1 - along].isfinite().all()
        assert x.grad.isfinite().all()
        assert x.grad.sum().item() == pytest.approx(0 if at != at or abs(at) > 2.5 or at <= -1 else 1 - max(0, -at, at - 2))


def test_diverging_offsets_leave_finite_gradients() -> None:
    tensors = made(CASES[0], torch.float32)
    tensors["offset"].view(-1)[::3] = torch.tensor([math.inf, -math.inf, math.nan, 3e38]).repeat(tensors["offset"].numel())[
        : tensors["offset"].numel()
    ][::3]
    for function, takes in functions(CASES[0]).values():
        ours = numbers(function, [tensors[t] for t in takes])
        with use_impl("reference"):
            theirs = numbers(function, [tensors[t] for t in takes])
        for a, b in zip(ours, theirs, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradcheck() -> None:
    tensors = made(CASES[1])
    tensors["offset"] += 0.3 * (tensors["offset"] == tensors["offset"].round())
    function, takes = functions(CASES[1])["v2"]
    assert torch.autograd.gradcheck(function, [tensors[t].requires_grad_() for t in takes])


def test_half_precision_keeps_places_in_float32() -> None:
    x, offset = torch.randn(1, 2, 1, 1000), torch.full((1, 2, 1, 1000), 0.25)
    half = deform_unfold(x.bfloat16(), offset.bfloat16(), 1)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), deform_unfold(x.bfloat16().float(), offset, 1), atol=0.02, rtol=0.02)


def test_nothing_of_the_size_of_the_samples_is_kept() -> None:
    x, offset, w = torch.randn(2, 32, 20, 20, requires_grad=True), torch.randn(2, 18, 20, 20, requires_grad=True), torch.randn(8, 32, 3, 3)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = deform_conv2d(x, offset, w.requires_grad_(), padding=1)
        deform_apply(y[:, None, :1].expand(-1, 1, 9, -1, -1), x, offset, 3, padding=1)
    assert kept
    assert max(kept) <= x.numel()


def test_transforms() -> None:
    case = CASES[0]
    function, takes = functions(case)["v2"]
    tensors = [made(case)[t] for t in takes]
    stacked = [torch.stack([t, t + 0.1]) for t in tensors]
    expected = torch.stack([function(*(t[i] for t in stacked)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(function)(*stacked), expected)
    slopes = torch.func.vmap(torch.func.grad(lambda *t: function(*t).square().sum()))(*stacked)
    for i in range(2):
        mine = [t[i].clone().requires_grad_() for t in stacked]
        torch.testing.assert_close(slopes[i], torch.autograd.grad(function(*mine).square().sum(), mine[0])[0])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(numbers(compiled, tensors), numbers(function, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda x, o: deform_unfold(x, o, 2), "kernel_size=2"),
        (lambda x, o: deform_unfold(x, o, 3), r"offset must be \(2, 18, 5, 4\)"),
        (lambda x, o: deform_unfold(x, o, 3, padding=1, offset_groups=4), "channels=6 is not divisible by offset_groups=4"),
        (lambda x, o: deform_unfold(x, o, 3, stride=0, padding=1), "stride"),
        (lambda x, o: deform_unfold(x, o, 9), "does not fit"),
        (lambda x, o: deform_unfold(x.long(), o, 3, padding=1), "floating"),
        (lambda x, o: deform_conv2d(x, o, torch.ones(4, 6, 3, 3), padding=1, groups=2), "weight must be"),
        (lambda x, o: deform_conv2d(x, o, torch.ones(4, 6, 2, 2), padding=1), "must be odd"),
        (lambda x, o: deform_conv2d(x, o, torch.ones(4, 6, 3, 3), torch.ones(3), padding=1), "bias must be"),
        (lambda x, o: deform_conv2d(x, o, torch.ones(4, 6, 3, 3), mask=torch.ones(2, 18, 7, 6), padding=1), "mask must be"),
        (lambda x, o: deform_apply(torch.ones(2, 4, 9, 7, 6), x, o, 3, padding=1), "groups=4"),
        (lambda x, o: deform_apply(torch.ones(2, 2, 9, 7, 5), x, o, 3, padding=1), "weights must be"),
    ],
)
def test_wrong_calls(call: Callable[[Tensor, Tensor], Tensor], text: str) -> None:
    with pytest.raises(RegardError, match=text):
        call(torch.ones(2, 6, 7, 6), torch.zeros(2, 18, 7, 6))


def test_second_derivatives_are_answered() -> None:
    x, offset = torch.randn(1, 2, 3, 3, requires_grad=True), torch.zeros(1, 18, 3, 3, requires_grad=True)
    (slope,) = torch.autograd.grad(deform_unfold(x, offset, 3, padding=1).square().sum(), x, create_graph=True)
    with pytest.raises(regard.RegardError, match="differentiable once"):
        slope.sum().backward()
