"""Pairwise affinities: every way of computing them equals the written-out weights, in value and gradient."""

import pytest
import torch
from torch.autograd import gradcheck

from regard.ops import pairwise_affinity as op
from regard.ops._dispatch import use_impl
from regard.ops.pairwise_affinity import api, ordered


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


CASES = {
    "attention": (lambda q, k, v: op.pairwise_attention(q, k, v, scale=0.7), lambda d: ((2, 5, d), (2, 7, d), (2, 7, 3))),
    "dot": (op.pairwise_dot, lambda d: ((2, 5, d), (2, 7, d), (2, 7, 3))),
    "relu": (op.pairwise_relu, lambda d: ((2, 5), (2, 7), (2, 7, 3))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("d", [1, 3, 6])
def test_equals_the_reference_in_value_and_gradient(name: str, d: int) -> None:
    call, shapes = CASES[name]
    args = [rows(*shape, seed=i) for i, shape in enumerate(shapes(d))]
    out = call(*args)
    with use_impl("reference"):
        expected = call(*args)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out, args, cotangent), torch.autograd.grad(expected, args, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert gradcheck(call, args)


@pytest.mark.parametrize("kind", ["softmax", "dot", "relu"])
def test_weights_are_those_used(kind: str) -> None:
    number = kind == "relu"
    a, b = (rows(2, 5), rows(2, 7, seed=1)) if number else (rows(2, 5, 3), rows(2, 7, 3, seed=1))
    v = rows(2, 7, 4, seed=2)
    call = {"softmax": op.pairwise_attention, "dot": op.pairwise_dot, "relu": op.pairwise_relu}[kind]
    weights = op.affinity_weights(a, b, kind)
    assert weights.shape == (2, 5, 7)
    torch.testing.assert_close(call(a, b, v), weights @ v, rtol=0, atol=1e-12)


def test_ordered_form_with_ties_and_on_the_threshold() -> None:
    """Equal keys, and queries that are exactly minus a key: relu is zero there, so is its derivative."""
    b = torch.tensor([[0.5, -1.0, 0.5, 2.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[-0.5, 1.0, -2.0, -3.0, 0.0, 7.0]], dtype=torch.float64, requires_grad=True)
    v = rows(1, 6, 2)
    found = torch.autograd.grad(op.pairwise_relu(a, b, v).square().sum(), (a, b, v))
    expected = torch.autograd.grad(((a[:, :, None] + b[:, None]).relu() / 6 @ v).square().sum(), (a, b, v))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert op.pairwise_relu(a.detach() - 100, b, v).abs().max() == 0, "a query that reaches no key gathers nothing"


def test_ordered_form_keeps_float32_accuracy_far_from_zero() -> None:
    """a near 1000 and b near -1000: the two prefix sums would cancel if b were not centred."""
    a, b = rows(1, 300) + 1000, rows(1, 400, seed=1) - 1000
    v = rows(1, 400, 8, seed=2)
    a, b = a.float(), b.float()
    exact = op.affinity_weights(a.double(), b.double(), "relu") @ v
    found = op.pairwise_relu(a, b, v.float()).double()
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_ordered_form_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, v = rows(5, 6), rows(5, 7, seed=1), rows(5, 7, 3, seed=2)
    whole = op.pairwise_relu(a, b, v)
    monkeypatch.setattr(ordered, "CHUNK_BYTES", 800)
    torch.testing.assert_close(op.pairwise_relu(a, b, v), whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_no_weights_are_stored(name: str) -> None:
    """Peak of the allocator's events stays far below the N x M weights."""
    call, _ = CASES[name]
    n = 3000
    shapes = ((1, n), (1, n), (1, n, 4)) if name == "relu" else ((1, n, 4),) * 3
    args = [rows(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.autograd.grad(call(*args).sum(), args)
    events = profiler.profiler.kineto_results.events()
    largest = max(e.nbytes() for e in events if e.name() == "[memory]")
    assert largest < 4 * n * n / 8


def test_half_precision_sums_in_float32() -> None:
    """Sums of 4096 terms of size 100 leave the range of float16; their mean does not."""
    q, k, v = torch.ones(1, 2, 1).half(), torch.full((1, 4096, 1), 100.0).half(), torch.full((1, 4096, 3), 10.0).half()
    torch.testing.assert_close(op.pairwise_dot(q, k, v), torch.full((1, 2, 3), 1000.0).half())
    torch.testing.assert_close(op.pairwise_relu(q[..., 0], k[..., 0], v), torch.full((1, 2, 3), 1010.0).half())
    big = op.affinity_weights(torch.full((1, 1, 64), 100.0).half(), torch.full((1, 2, 64), 100.0).half(), "softmax")
    assert big.isfinite().all()


def test_small_maps_in_training_keep_their_weights() -> None:
    q, k, v = (rows(1, 30, 4, dtype=torch.float32, seed=i) for i in range(3))
    assert api._choose_attention(q, k, v)[0] == "reference"
    with torch.no_grad():
        assert api._choose_attention(q, k, v)[0] == "fused"
    large = rows(1, 2000, 4, dtype=torch.float32)
    assert api._choose_attention(large, large, large)[0] == "fused"
    torch.testing.assert_close(op.pairwise_attention(q, k, v), op.pairwise_attention(*(t.detach() for t in (q, k, v))))


@pytest.mark.parametrize("name", CASES)
def test_vmap(name: str) -> None:
    call, shapes = CASES[name]
    args = [rows(3, *shape, seed=i).detach() for i, shape in enumerate(shapes(3))]
    expected = torch.stack([call(*(t[i] for t in args)) for i in range(3)])
    with pytest.warns(UserWarning, match="batching rule") if name == "attention" else torch.no_grad():
        found = torch.func.vmap(call)(*args)
    torch.testing.assert_close(found, expected)
