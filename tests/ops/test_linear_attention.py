"""The engine of feature-map attention: every form equals the definition, in value and gradient; memory grows with the length alone."""

import pytest
import torch

from regard.ops._dispatch import explain, use_impl
from regard.ops.linear_attention import api, blockwise, chunk_size, linear_attention, prefix_softmax_attention


def value_and_gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_same(ours, theirs, bound=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= bound * max(b.abs().max(), 1), (a - b).abs().max()


@pytest.mark.parametrize("n", [1, 5, 64, 65, 200])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"normalize": True}, {"causal": True, "normalize": True, "key_eps": 1e-3}, {"normalize": True, "denom_min": 5.0}],
)
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_equal_the_definition(n, options, masked):
    torch.manual_seed(0)
    q, k, v = (torch.rand(2, 3, n, d, dtype=torch.float64) for d in (7, 7, 5))
    mask = torch.rand(2, 1, n) > 0.3 if masked else None

    def run(q, k, v):
        return linear_attention(q, k, v, mask=mask, **options)

    with use_impl("reference"):
        expected = value_and_gradients(run, q, k, v)
    assert_same(value_and_gradients(run, q, k, v), expected)


def test_no_key_gives_zeros_and_finite_gradients():
    q, k, v = (torch.rand(2, 2, 6, 4) for _ in range(3))
    mask = torch.zeros(2, 1, 6, dtype=torch.bool)
    out, *gradients = value_and_gradients(lambda q, k, v: linear_attention(q, k, v, mask=mask, normalize=True), q, k, v)
    assert (out == 0).all()
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_masked_may_be_anything(causal):
    """Padding may hold NaN or infinities, in keys and in values."""
    q, k, v = (torch.rand(1, 1, 6, 4) for _ in range(3))
    mask = torch.tensor([[[True, True, True, True, False, False]]])
    expected = linear_attention(q, k, v, mask=mask, causal=causal, normalize=True)
    k[:, :, 4], v[:, :, 5] = float("nan"), float("inf")
    assert torch.equal(linear_attention(q, k, v, mask=mask, causal=causal, normalize=True), expected)


def test_half_precision_sums_in_float32():
    """3000 positions of 1: a float16 sum would stop at 2048."""
    ones = torch.ones(1, 1, 3000, 1, dtype=torch.float16)
    assert linear_attention(ones, ones, ones)[0, 0, 0].item() == 3000
    assert linear_attention(ones, ones, ones, causal=True)[0, 0, -1].item() == 3000


@pytest.mark.parametrize("n", [1, 5, 8, 33, 64, 65, 200])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("masked", [False, True])
def test_prefix_softmax_equals_the_definition_for_any_range_of_keys(n, scale, masked):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 2, n, d, dtype=torch.float64) for d in (4, 4, 3))
    q, k = q.softmax(-1), k * scale
    mask = torch.rand(2, 1, n) > 0.3 if masked else None

    def run(q, k, v):
        return prefix_softmax_attention(q, k, v, mask=mask)

    with use_impl("reference"):
        expected = value_and_gradients(run, q, k, v)
    assert_same(value_and_gradients(run, q, k, v), expected)


def test_prefix_softmax_forgets_nothing_before_a_huge_key():
    """One key a thousand above the others must not swallow the outputs before it."""
    q, k, v = torch.full((1, 1, 20, 1), 1.0), torch.zeros(1, 1, 20, 1), torch.arange(20.0).reshape(1, 1, 20, 1)
    k[:, :, 10] = 1000.0
    out = prefix_softmax_attention(q, k, v).flatten()
    assert torch.allclose(out[:10], torch.arange(10) / 2)
    assert (out[10:] == 10).all()


def _core(q, k, v, w, mask):
    return linear_attention((q @ w.mT).exp(), (k @ w.mT).exp(), v, mask=mask.squeeze(-1), causal=True, normalize=True)


@pytest.mark.parametrize("limit", [1, 7 * 40, 10**6])
def test_blocks_equal_the_whole(monkeypatch, limit):
    """Any block size, with a projection shared by all heads (its gradient adds up) or one for each, and a mask shared by the heads."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(3, 4, 9, d, dtype=torch.float64) for d in (5, 5, 6))
    mask = torch.rand(3, 1, 9, 1) > 0.3
    for heads in (1, 4):
        w = torch.randn(1, heads, 7, 5, dtype=torch.float64)
        expected = value_and_gradients(lambda *t: _core(*t, mask), q, k, v, w)
        monkeypatch.setattr(api, "BLOCK", limit)
        with use_impl(blockwise="blocked"):
            assert_same(value_and_gradients(lambda *t: blockwise(_core, *t, mask, floats=40), q, k, v, w), expected)


def test_blocks_skip_what_needs_no_gradient(monkeypatch):
    monkeypatch.setattr(api, "BLOCK", 1)
    q, k, v, w = (torch.randn(2, 2, 6, 4) for _ in range(4))
    v.requires_grad_()
    out = blockwise(lambda q, k, v, w: linear_attention(q, k, v) + w, q, k, v, w, floats=10)
    out.sum().backward()
    assert v.grad is not None
    assert q.grad is None


def test_small_or_traced_calls_stay_whole(monkeypatch):
    class Once(torch.nn.Module):
        def forward(self, q):
            return blockwise(lambda q: q * 2, q, floats=10)

    q = torch.ones(2, 2, 3, 4)
    assert "whole" in [c.impl for c in explain(Once(), q)]
    monkeypatch.setattr(api, "BLOCK", 1)
    assert "blocked" in [c.impl for c in explain(Once(), q)]
    assert torch.equal(torch.func.vmap(Once())(q.expand(3, -1, -1, -1, -1)), 2 * q.expand(3, -1, -1, -1, -1))


def test_chunk_states_are_no_larger_than_what_they_sum():
    for m, e in ((16, 33), (110, 33), (128, 512), (256, 256), (8, 8)):
        size = chunk_size(m, e)
        assert size in (64, 128, 256)
        assert size == 256 or m * e <= size * (m + e)


def test_causal_memory_is_linear_with_a_small_constant():
    """The peak of a causal training step is a small multiple of its inputs: no (N, m, e) tensor, which here would be 64 times an input."""
    from torch.profiler import ProfilerActivity, profile

    q, k, v = (torch.rand(1, 2, 4096, 64, requires_grad=True) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        linear_attention(q, k, v, causal=True).sum().backward()
    events = sorted((e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
    peak = now = 0
    for _, change in events:
        now += change
        peak = max(peak, now)
    assert peak < 14 * q.nbytes, peak / q.nbytes
