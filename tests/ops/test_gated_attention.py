"""Gated attention: blocks equal the definition in value and gradient, for every option, size and cut; nothing large is made."""

import itertools

import pytest
import torch

from regard.errors import RegardError
from regard.ops import _dispatch
from regard.ops.gated_attention import ACTIVATIONS, cuts, gated_attention, gated_weights
from regard.workbench.measure import allocations


def inputs(b=3, n=37, s=4, e=6, length=None, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, lq, lk = (torch.randn(b, n, s, dtype=dtype, requires_grad=True) for _ in range(4))
    v = torch.randn(b, n, e, dtype=dtype, requires_grad=True)
    bias = torch.randn(2 * (length or n) - 1, dtype=dtype, requires_grad=True)
    return q, k, v, bias, lq, lk


def both_ways(tensors, run):
    """Output and gradients by blocks and by the definition."""
    found = []
    for impl in ("blocks", "reference"):
        with _dispatch.use_impl(gated_attention=impl):
            out = run()
        g = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        found.append([out, *torch.autograd.grad(out, tensors, g)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("limit", [200, 2800, 1 << 20])  # some rows, two samples, all
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_blocks_equal_the_definition(monkeypatch, act, limit):
    monkeypatch.setattr(cuts, "CPU_LIMIT", limit)
    keys, pairs = torch.rand(3, 37) > 0.3, torch.rand(1, 37, 37) > 0.2
    keys[1] = False
    for causal, hidden_keys, hidden_pairs in itertools.product((False, True), (None, keys), (None, pairs, pairs[:, :1])):
        q, k, v, bias, *_ = tensors = inputs()
        options = {"bias": bias, "key_mask": hidden_keys, "attn_mask": hidden_pairs, "act": act, "causal": causal}
        for a, b in both_ways(tensors[:4], lambda q=q, k=k, v=v, options=options: gated_attention(q, k, v, **options)):
            assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("limit", [16, 130, 1 << 20])
@pytest.mark.parametrize("chunk", [1, 8, 37, 50])
def test_chunks_equal_the_definition(monkeypatch, chunk, limit):
    monkeypatch.setattr(cuts, "CPU_LIMIT", limit)
    keys = torch.rand(3, 37) > 0.3
    for (causal, own), mask in itertools.product(((True, False), (False, True), (False, False)), (None, keys)):
        q, k, v, bias, lq, lk = tensors = inputs(length=chunk)
        options = {"bias": bias, "linear": (lq, lk), "chunk": chunk, "key_mask": mask, "causal": causal, "own_chunk": own}
        for a, b in both_ways(tensors, lambda q=q, k=k, v=v, options=options: gated_attention(q, k, v, **options)):
            assert torch.allclose(a, b, atol=1e-10)


def test_long_causal_rows_are_cut():
    q, k, v, bias, *_ = tensors = inputs(b=2, n=300)
    for a, b in both_ways(tensors[:4], lambda: gated_attention(q, k, v, bias=bias, causal=True)):
        assert torch.allclose(a, b, atol=1e-8)


def test_a_chunk_sees_nothing_of_its_own_sums():
    """Bit for bit: the sum before a chunk is not made by taking the chunk away again."""
    q, k, v, bias, lq, lk = (t.detach() for t in inputs(length=8, dtype=torch.float32))
    options = {"bias": bias, "chunk": 8, "causal": True}
    whole = gated_attention(q, k, v, linear=(lq, lk), **options)
    lk, v = lk.clone(), v.clone()
    lk[:, 24:], v[:, 24:] = 1e6, -1e6
    assert torch.equal(gated_attention(q, k, v, linear=(lq, lk), **options)[:, :24], whole[:, :24])


@pytest.mark.parametrize("chunk", [None, 8])
def test_weights_are_what_multiplies_the_values(chunk):
    q, k, v, bias, lq, lk = inputs(length=chunk)
    keys, linear = torch.rand(3, 37) > 0.3, (lq, lk) if chunk else None
    options = {"bias": bias, "key_mask": keys, "chunk": chunk, "causal": True}
    a = gated_weights(q, k, linear=linear, **options)
    assert torch.allclose(a @ v, gated_attention(q, k, v, linear=linear, **options), atol=1e-12)
    some = torch.tensor([30, 2, 2])
    chosen = (lq[:, some], lk) if chunk else None
    assert torch.allclose(gated_weights(q[:, some], k, queries=some, linear=chosen, **options), a[:, some], atol=1e-14)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_dropout_is_the_same_in_the_backward_pass(monkeypatch, act):
    """A v is linear in v: its gradient says which weights fell out. On average the weights stay what they are."""
    monkeypatch.setattr(cuts, "CPU_LIMIT", 200)
    q, k, v, bias, *_ = inputs(b=2, n=21)
    v = torch.eye(21, dtype=torch.float64).repeat(2, 1, 1).requires_grad_()
    total, full = 0, gated_weights(q, k, bias=bias, act=act)
    for _ in range(300):
        out = gated_attention(q, k, v, bias=bias, act=act, dropout=0.4)
        g = torch.randn_like(out)
        (dv,) = torch.autograd.grad(out, v, g)
        assert torch.allclose(dv, out.detach().mT @ g, atol=1e-10)
        total = total + out.detach()
    assert not torch.equal(gated_attention(q, k, v, bias=bias, act=act, dropout=0.4), out)
    assert (total / 300 - full).abs().mean() < 0.1 * full.abs().mean()

    def loss(q):
        torch.manual_seed(3)
        return gated_attention(q, k.detach(), v.detach(), bias=bias.detach(), act=act, dropout=0.4)

    assert torch.autograd.gradcheck(loss, (q,), fast_mode=True)


def test_no_large_temporary():
    q, k, v, bias, *_ = inputs(b=1, n=3000, s=8, e=8, dtype=torch.float32)

    def run():
        out = gated_attention(q, k, v, bias=bias, causal=True)
        torch.autograd.grad(out.sum(), (q, k, v, bias))

    assert max(allocations(run)) <= 4 * cuts.CPU_LIMIT


def test_half_precision_sums_in_float32():
    torch.manual_seed(0)
    q, k, lq, lk = (torch.rand(1, 4096, 4, dtype=torch.bfloat16) for _ in range(4))
    v = torch.rand(1, 4096, 4, dtype=torch.bfloat16)
    options = {"linear": (lq, lk), "chunk": 4, "causal": True}
    exact = gated_attention(*(t.double() for t in (q, k, v)), linear=(lq.double(), lk.double()), chunk=4, causal=True)
    assert ((gated_attention(q, k, v, **options).double() - exact).abs() / exact.abs().max()).max() < 6e-3


def test_second_derivatives_are_refused():
    q, k, v, *_ = inputs(n=5)
    (g,) = torch.autograd.grad(gated_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RegardError, match="differentiable once"):
        g.sum().backward()
