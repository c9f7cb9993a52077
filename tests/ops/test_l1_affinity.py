"""The chunked way equals the definition however its parts fall, and the mean by sorting that over all pairs."""

import itertools

import pytest
import torch
from torch import Tensor

from regard.errors import RegardError
from regard.ops._dispatch import use_impl
from regard.ops.l1_affinity import chunked, l1_attention, l1_weights, reference
from regard.ops.l1_affinity.distances import distance_backward, mean_distance, mean_distance_backward
from regard.workbench.measure import allocations

B, H, N, M, D = 2, 3, 11, 7, 5


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (B, H, N, D), "k": (B, H, M, D), "a": (B, H, N, 4), "b": (B, H, M, 4), "v": (B, H, M, 6), "u": (B, H, N, 2), "beta": (H,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for name, shape in shapes.items()}


def masks(which: str) -> dict[str, Tensor]:
    rows, keys = torch.arange(N) < torch.tensor([[N], [8]]), torch.arange(M) < torch.tensor([[4], [M]])
    pairs = torch.rand(B, 1, N, M, generator=torch.Generator().manual_seed(1)) > 0.4
    pairs[0, 0, 2] = False
    found = {"rows": rows, "keys": keys, "pairs": pairs}
    return {name: found[name] for name in which.split("+") if name}


def both(impl: str, t: dict[str, Tensor], **options: object) -> list[Tensor]:
    """Outputs and gradients."""
    with use_impl(l1_affinity=impl):
        out = l1_attention(t["q"], t["k"], t["v"], far=(t["a"], t["b"]), u=t["u"], beta=t["beta"], **options)
    cotangents = [torch.randn(o.shape, generator=torch.Generator().manual_seed(2), dtype=o.dtype) for o in out]
    return [*out, *torch.autograd.grad(out, list(t.values()), cotangents)]


@pytest.mark.parametrize("limits", [(1 << 19, 1 << 21), (20, 1 << 21), (20, 30)], ids=["whole", "spans", "sorted"])
@pytest.mark.parametrize("which", ["", "keys", "rows+keys", "pairs", "rows+keys+pairs"])
def test_parts_equal_the_whole(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], which: str) -> None:
    monkeypatch.setattr(chunked, "_limits", lambda x: limits)
    for normalization, over, causal in itertools.product(("center", "scale", "none"), ("matrix", "row"), (False, True)):
        if causal and normalization == "center" and over == "matrix":
            continue
        options = {"normalization": normalization, "center_over": over, "causal": causal, **masks(which)}
        expected, found = both("reference", inputs(), **options), both("chunked", inputs(), **options)
        for name, one, other in zip(("out", "back", *inputs()), found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda m, name=name, o=options: f"{name} {o}: {m}")


def test_the_sorted_mean_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_limits", lambda x: (20, 30))
    monkeypatch.setattr(chunked, "mean_distance", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    t, options = inputs(), {"normalization": "center", "center_over": "matrix", "beta": 1.0}
    with pytest.raises(ZeroDivisionError):
        l1_attention(t["q"], t["k"], t["v"], **options)
    l1_attention(t["q"], t["k"], t["v"], pairs=torch.ones(1, 1, N, M, dtype=torch.bool), **options)


@pytest.mark.parametrize("which", ["", "keys", "rows", "rows+keys"])
def test_mean_by_sorting(which: str) -> None:
    t, mask = inputs(), masks(which)
    a, b = t["a"], torch.cat((t["b"][:, :, :-2], t["a"][:, :, :2]), 2)  # two ties
    rows, keys = mask.get("rows"), mask.get("keys")
    whole = torch.ones(B, 1, N, M, dtype=torch.bool)
    whole = whole if rows is None else whole & rows[:, None, :, None]
    whole = whole if keys is None else whole & keys[:, None, None]
    torch.testing.assert_close(mean_distance(a, b, rows, keys), reference.mean(reference.distance(a, b), whole, "matrix"))


def test_equal_values_have_no_slope() -> None:
    a = torch.tensor([[[[0.0], [1.0]]]])
    da, db = distance_backward(torch.tensor([[[[2.0, 3.0], [5.0, 7.0]]]]), a, a)
    assert da.flatten().tolist() == [-3.0, 5.0]
    assert db.flatten().tolist() == [-5.0, 3.0]


def test_chosen_rows() -> None:
    t, rows = inputs(), torch.tensor([9, 0])
    for over, causal, which in itertools.product(("matrix", "row"), (False, True), ("", "keys", "rows+keys+pairs")):
        given = {"far": (t["a"], t["b"]), "beta": t["beta"], "normalization": "center", "center_over": over, "causal": causal, **masks(which)}
        if not (causal and over == "matrix"):
            torch.testing.assert_close(l1_weights(t["q"], t["k"], queries=rows, **given), l1_weights(t["q"], t["k"], **given)[:, :, rows])


def test_no_gradient_of_the_gradient() -> None:
    t = inputs()
    out, _ = l1_attention(t["q"], t["k"], t["v"], beta=1.0, normalization="scale", center_over="row")
    (first,) = torch.autograd.grad(out.sum(), t["q"], create_graph=True)
    with pytest.raises(RegardError, match="differentiable once"):
        torch.autograd.grad(first.sum(), t["k"])


def test_function_transforms_work() -> None:
    t = inputs()

    def loss(q: Tensor) -> Tensor:
        return l1_attention(q, t["k"].detach(), t["v"].detach(), beta=1.0, normalization="center", center_over="matrix")[0].square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(t["q"].detach()), torch.autograd.grad(loss(t["q"]), t["q"])[0])


def test_no_large_buffer() -> None:
    """1536 x 1536 distances are 9 MB a head: none is held whole, forward or backward."""
    q, k, v = (torch.randn(1, 2, 1536, 4).requires_grad_() for _ in range(3))

    def step() -> None:
        out, _ = l1_attention(q, k, v, beta=1.0, normalization="center", center_over="matrix")
        out.sum().backward()

    step()
    assert max(allocations(step)) <= 3 << 20


def test_half_precision_sums_in_float32() -> None:
    t = {name: x.detach().bfloat16() for name, x in inputs().items()}
    options = {"beta": 1.0, "normalization": "center", "center_over": "matrix"}
    out = l1_attention(t["q"], t["k"], t["v"], **options)[0]
    exact = l1_attention(t["q"].float(), t["k"].float(), t["v"].float(), **options)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16(), rtol=0, atol=0)


def test_gradient_of_the_mean_by_sorting_where_values_are_equal() -> None:
    a, b = torch.tensor([[[[0.0], [1.0], [1.0]]]]), torch.tensor([[[[1.0], [3.0]]]])
    da, db = mean_distance_backward(torch.full((1, 1, 1, 1), 6.0), a, b, None, None)
    assert da.flatten().tolist() == [-2.0, -1.0, -1.0]
    assert db.flatten().tolist() == [1.0, 3.0]
