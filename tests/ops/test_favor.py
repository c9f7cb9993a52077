"""Positive random features in pieces: the numbers of the features, whatever the pieces, the masks and the range of the keys."""

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.ops._dispatch import explain, use_impl
from regard.ops.linear_attention import favor

OPTIONS = [{}, {"eps": 1e-3, "per_head_features": True}, {"eps": 1e-3, "eps_inside_ratio": False, "denom_min": 0.02}]


def make(**options):
    torch.manual_seed(0)
    return regard.create("performer", 12, 3, num_features=5, **options).double().eval()


def both_ways(module, *inputs, **masks):
    found = []
    leaves = [*inputs, *(p for p in module.parameters())]
    for impl in ("pieces", "features"):
        with use_impl(favor_attention=impl):
            out = module(*inputs, **masks)
        found.append([out, *torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape).cos()).sum(), leaves)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("floats", [1, 700, 2**19])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_equal_features(monkeypatch, options, masked, floats):
    monkeypatch.setattr(favor, "FLOATS", floats)
    module, x, context = make(**options), torch.randn(3, 50, 12).double().requires_grad_(), torch.randn(3, 37, 12).double()
    context[:, 20] *= 6  # the largest key comes late
    context.requires_grad_()
    mask = None
    if masked:
        mask = torch.rand(3, 37) > 0.3
        mask[1], mask[2, :33] = False, False
    for a, b in both_ways(module, x, context, key_mask=mask):
        assert torch.allclose(a, b, atol=1e-10), (a - b).abs().max()


def test_masked_keys_may_hold_anything():
    module, x = make(), torch.randn(2, 40, 12).double()
    q, k, v = (torch.randn(2, 3, 40, 4).double() for _ in range(3))
    mask = torch.arange(40).expand(2, -1) < 30
    k[:, :, 30:], v[:, :, 30:] = float("nan"), float("inf")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = module.attend(*leaves, key_mask=mask)
    assert torch.allclose(out, module.attend(q, k[:, :, :30], v[:, :, :30]), atol=1e-12)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), leaves)
    assert dq.isfinite().all()
    assert (dk[:, :, 30:] == 0).all() and (dv[:, :, 30:] == 0).all()
    assert module(x).isfinite().all()


def test_half_precision_sums_in_float32():
    module, x = make(), torch.randn(2, 300, 12)
    half = module.bfloat16()(x.bfloat16())
    exact = module.float()(x.bfloat16().float())
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() < 0.03 * exact.abs().max()


def test_no_features_are_kept():
    module, x, kept = regard.create("performer", 32, 2, num_features=64), torch.randn(1, 500, 32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(x)
    assert max(kept) < 2 * 500 * 64


def test_learned_projections_keep_their_gradient():
    module, x = make(learnable_features=True), torch.randn(2, 9, 12).double()
    module(x).sum().backward()
    assert module.projection.grad.abs().max() > 0
    assert ("favor_attention", "features") in [(c.op, c.impl) for c in explain(module, x)]
    with torch.no_grad():
        assert ("favor_attention", "pieces") in [(c.op, c.impl) for c in explain(module, x)]


def test_a_second_derivative_says_the_way_out():
    module, x = make(), torch.randn(1, 5, 12).double().requires_grad_()
    (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RegardError, match="use_impl"):
        g.square().sum().backward()
    with use_impl("reference"):
        (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
    assert x.grad.isfinite().all()
