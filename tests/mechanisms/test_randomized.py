"""Randomized attention: every kind of centre against its equations, the draw of keys, masks, weights of the very draws."""

import pytest
import torch

import regard
from regard import use_impl
from regard.errors import RegardError, RegardTypeError
from regard.ops.importance_sampling import draw_keys, draws
from regard.testing.checks.order import LargestBuffer


def make(**options):
    torch.manual_seed(0)
    return regard.create("randomized", 12, 2, **options).double().eval()


def by_queries(module, x, source, allowed, index, noise):
    """Query by query, draw by draw, as the definition reads; allowed (B, H, N, M)."""
    h, d, s = module.num_heads, module.head_dim, module.head_dim**-0.5
    q, k, v = (p(t).unflatten(2, (h, d)).transpose(1, 2) for p, t in ((module.q_proj, x), (module.k_proj, source), (module.v_proj, source)))
    out = torch.zeros_like(q)
    for b, i, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = allowed[b, i, n].nonzero()[:, 0]
        if not len(seen):
            continue
        keys, values, draws = k[b, i, seen], v[b, i, seen], max(module.num_samples, 1)
        for at in range(draws):
            if module.num_samples > 0:
                centre = k[b, i, index[b, i, n, at]]
            elif module.num_samples == -1:
                centre = (s * keys @ q[b, i, n]).softmax(0) @ keys
            else:
                centre = keys.mean(0)
            std = d**0.25 if module.noise_std == "unbiased" else module.noise_std
            w = q[b, i, n] + centre + std * noise[b, i, n, at]
            out[b, i, n] += (s * keys @ w - s * keys.square().sum(1) / 2).softmax(0) @ values / draws
    return module.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("num_samples", [1, 3, -1, 0])
@pytest.mark.parametrize("masks", [(), ("key",), ("attn",), ("key", "attn", "causal"), ("context", "causal")])
def test_equations(num_samples, masks):
    module = make(num_samples=num_samples, noise_std="unbiased", causal="causal" in masks)
    n, m = 7, 9 if "context" in masks else 7
    x, context = torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True), torch.randn(2, m, 12, dtype=torch.float64, requires_grad=True)
    source = context if "context" in masks else x
    allowed = torch.ones(2, 2, n, m, dtype=torch.bool)
    given = {"context": context} if "context" in masks else {}
    if "key" in masks:
        given["key_mask"] = torch.arange(m) < torch.tensor([[5], [m]])
        allowed &= given["key_mask"][:, None, None]
    if "attn" in masks:
        given["attn_mask"] = torch.rand(2, n, m) > 0.4
        given["attn_mask"][1, 3] = False
        allowed &= given["attn_mask"]
    if "causal" in masks:
        allowed = allowed & torch.ones(n, m, dtype=torch.bool).tril(m - n)
    draws = max(num_samples, 1)
    index = allowed.double().clamp_min(1e-9).flatten(0, 2).multinomial(draws, replacement=True).reshape(2, 2, n, draws)
    noise = torch.randn(2, 2, n, draws, 6, dtype=torch.float64)
    if num_samples > 0:
        given["sample_index"] = index
    out, weights = module(x, noise=noise, return_weights=True, **given)
    expected = by_queries(module, x, source, allowed, index, noise)
    assert torch.allclose(out, expected, atol=1e-11)
    g = torch.randn_like(out)
    leaves = (x, context) if "context" in masks else (x,)
    for a, b in zip(torch.autograd.grad(out, leaves, g, retain_graph=True), torch.autograd.grad(expected, leaves, g), strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    assert (weights[~allowed] == 0).all()
    v = module.v_proj(source).unflatten(2, (2, 6)).transpose(1, 2)
    assert torch.allclose(module.out_proj((weights @ v).transpose(1, 2).flatten(2)), out, atol=1e-11)
    rows = torch.tensor([3, 0])
    assert torch.allclose(module.weights(x, queries=rows, noise=noise, **given), weights[:, :, rows], atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 2, -1, 0])
def test_weights_are_those_of_the_draws_made(num_samples):
    module, x = make(num_samples=num_samples).train(), torch.randn(2, 9, 12, dtype=torch.float64)
    out, weights = module(x, return_weights=True)
    v = module.v_proj(x).unflatten(2, (2, 6)).transpose(1, 2)
    assert torch.allclose(module.out_proj((weights @ v).transpose(1, 2).flatten(2)), out)
    assert not torch.allclose(module(x), out)
    twice = [module(x, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*twice)


@pytest.mark.parametrize("impl", ["reference", "inverse", "race"])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_are_drawn_with_their_probabilities(impl, causal, monkeypatch):
    monkeypatch.setitem(draws.BLOCK, True, 40)
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 9, 4)
    mask = torch.rand(2, 1, 6, 9) > 0.3
    allowed = mask & torch.ones(6, 9, dtype=torch.bool).tril(3) if causal else mask.expand(2, 2, 6, 9)
    p = (0.5 * q @ k.mT).masked_fill(~allowed, -torch.inf).softmax(-1)
    with use_impl(draw_keys=impl):
        index = draw_keys(q, k, 5_000, mask=mask, causal=causal)
    seen = torch.nn.functional.one_hot(index, 9).double().mean(3)
    assert (seen[~allowed.expand_as(p)] == 0).all()
    assert (seen - p).abs().max() < 0.04  # five standard deviations


def test_no_share_of_the_total_falls_on_a_hidden_key():
    p, points = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]), torch.tensor([[0.0, 0.4999, 0.75, 1 - 2**-24]])
    assert draws._inverse(p, points).tolist() == [[1, 1, 3, 3]]


def test_blocks_draw_what_the_whole_draws(monkeypatch):
    q, k = torch.randn(2, 2, 33, 4), torch.randn(2, 2, 9, 4)
    with use_impl("reference"):
        whole = draw_keys(q, k, 3, causal=True, generator=torch.Generator().manual_seed(1))
    monkeypatch.setitem(draws.BLOCK, True, 200)
    assert torch.equal(draw_keys(q, k, 3, causal=True, generator=torch.Generator().manual_seed(1)), whole)


def test_no_buffer_holds_all_pairs():
    module, x = regard.create("randomized", 16, 1), torch.randn(1, 2048, 16)
    with LargestBuffer() as largest:
        module(x).sum().backward()
    assert largest.elements <= draws.BLOCK[True]


def test_expected_key_in_eval_is_attention_with_other_queries():
    """num_samples=-1 is softmax attention with queries mu and a bias of each key."""
    module, x = make(num_samples=-1), torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = (p(x).unflatten(2, (2, 6)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(q + sdpa(q, k, k), k, v, attn_mask=-0.5 * 6**-0.5 * k.square().sum(-1).unsqueeze(2))
    assert torch.allclose(module(x), module.out_proj(out.transpose(1, 2).flatten(2)))


def test_nothing_allowed_gives_zeros_before_the_projection():
    for num_samples in (1, -1, 0):
        module, x = make(num_samples=num_samples), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
        mask = torch.tensor([[False] * 5, [True] * 5])
        out = module(x, key_mask=mask)
        assert torch.allclose(out[0], module.out_proj.bias.expand_as(out[0]))
        out.sum().backward()
        assert x.grad.isfinite().all()


def test_dropout_drops_output_channels_in_training():
    module, x = make(num_samples=-1, noise_std=0.0, dropout=0.5), torch.randn(2, 7, 12, dtype=torch.float64)
    whole, out = module(x), module.train()(x)
    dropped = out == 0
    assert 0.2 < dropped.double().mean() < 0.8
    assert torch.allclose(out[~dropped], 2 * whole[~dropped])


def test_wrong_calls():
    module, x = make(), torch.randn(2, 4, 12, dtype=torch.float64)
    index = torch.zeros(2, 2, 4, dtype=torch.long)
    with pytest.raises(RegardError, match="sample_index must have shape"):
        module(x, sample_index=index[:, :1])
    with pytest.raises(RegardTypeError, match="int32"):
        module(x, sample_index=index.int())
    with pytest.raises(RegardError, match="noise must have shape"):
        module(x, noise=torch.zeros(2, 2, 4, 5, dtype=torch.float64))
    with pytest.raises(RegardError, match=r"0\.\.3"):
        module(x, sample_index=index + 4, validate=True)
    with pytest.raises(RegardError, match="mask hides"):
        module(x, sample_index=index, key_mask=torch.arange(4).expand(2, 4) > 0, validate=True)
    with pytest.raises(RegardError, match="num_samples=-1"):
        make(num_samples=-1)(x, sample_index=index)
    for options, words in (({"num_samples": -2}, "num_samples=-2"), ({"noise_std": "big"}, "'big'"), ({"noise_std": -1.0}, "-1.0")):
        with pytest.raises(RegardError, match=words):
            make(**options)
