"""Efficient attention: both layouts are one function, the causal form equals every prefix, masks count keys."""

import pytest
import torch
from safetensors.torch import load, save

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.ops.linear_attention import api


def make(**options):
    torch.manual_seed(0)
    return regard.create("efficient", **options).double().eval()


TOKENS = {"dim": 12, "key_dim": 8, "value_dim": 16, "num_heads": 2}
MAP = {"channels": 12, "key_channels": 8, "value_channels": 16, "num_heads": 2}


def dense(module, x, context, mask):
    """The implied (N, M) weights, rho_q rho_k^T, for each head."""
    made = module.queries(x), module.keys(context), module.values(context)
    q, k, v = (t.unflatten(2, (module.num_heads, -1)).transpose(1, 2) for t in made)
    if module.normalization == "softmax":
        pairs = q.softmax(-1) @ k.masked_fill(~mask[:, None, :, None], -torch.inf).softmax(-2).mT
        assert torch.allclose(pairs.sum(-1), torch.ones_like(pairs[..., 0]))
    else:
        pairs = q @ (k * mask[:, None, :, None]).mT / mask.sum(1)[:, None, None, None]
    return module.reprojection((pairs @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_equals_the_dense_weights(normalization):
    module = make(**TOKENS, normalization=normalization)
    x, context = (torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True) for n in (5, 9))
    mask = torch.rand(2, 9) > 0.3
    out, expected = module(x, context, key_mask=mask), dense(module, x, context, mask)
    assert torch.allclose(out, expected, atol=1e-12)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (x, context), g), torch.autograd.grad(expected, (x, context), g), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert torch.allclose(make(**TOKENS, normalization=normalization, residual=True)(x), module(x) + x)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("last", [False, True])
def test_a_map_is_its_pixels(shape, last):
    """One, two and three axes, in both memory formats, with the weights of the token layout."""
    tokens, maps = make(**TOKENS, residual=True), make(**MAP)
    load_official(maps, to_official(tokens))
    x = torch.randn(2, *shape, 12, dtype=torch.float64) if last else torch.randn(2, 12, *shape, dtype=torch.float64)
    x = x.movedim(-1, 1) if last else x
    expected = tokens(x.flatten(2).mT).mT.reshape(x.shape)
    out = maps(x)
    assert torch.allclose(out, expected, atol=1e-12)
    if last and len(shape) > 1:
        assert out.stride(1) == 1, "channels_last in, channels_last out"


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_causal_equals_every_prefix(scale):
    causal, plain = make(**TOKENS, causal=True), make(**TOKENS)
    x, mask = scale * torch.randn(2, 70, 12, dtype=torch.float64), torch.rand(2, 70) > 0.3
    out = causal(x, key_mask=mask)
    for t in (1, 2, 9, 64, 65, 70):
        assert torch.allclose(out[:, t - 1], plain(x[:, t - 1 : t], x[:, :t], key_mask=mask[:, :t])[:, 0], atol=1e-9 * scale)


def test_steps_equal_the_whole():
    module, x = make(**TOKENS, causal=True, residual=True), 100 * torch.randn(2, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        whole, state = module(x), module.init_state(2)
        for t in range(12):
            state = type(state)(**load(save({n: s.contiguous() for n, s in state._asdict().items()})))
            out, state = module.step(x[:, t], state)
            assert torch.allclose(out, whole[:, t], atol=1e-9)


def test_blocks_change_nothing(monkeypatch):
    module, x = make(**TOKENS, causal=True), torch.randn(3, 40, 12, dtype=torch.float64, requires_grad=True)
    mask, results = torch.rand(3, 40) > 0.3, []
    for block in (api.BLOCK, 1):
        monkeypatch.setattr(api, "BLOCK", block)
        out = module(x, key_mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("options", [TOKENS, {**TOKENS, "normalization": "scaling"}, {**TOKENS, "causal": True}], ids=str)
def test_the_core_alone(options):
    module, x = make(**options), torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = (f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (module.queries, module.keys, module.values))
    assert torch.allclose(module.reprojection(module.attend(q, k, v).transpose(1, 2).flatten(2)), module(x), atol=1e-12)


def test_equal_keys_are_mean_pooling():
    module = make(**TOKENS)
    torch.nn.init.zeros_(module.keys.weight)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    assert torch.allclose(module(x), module.reprojection(module.values(x).mean(1, keepdim=True)).expand_as(x), atol=1e-12)


def test_no_key_at_all_gives_the_bias():
    for options in (TOKENS, {**TOKENS, "normalization": "scaling"}, {**TOKENS, "causal": True}):
        module, x = make(**options), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
        out = module(x, key_mask=torch.zeros(2, 5, dtype=torch.bool))
        assert torch.allclose(out, module.reprojection.bias.expand_as(out))
        out.sum().backward()
        assert (x.grad == 0).all()


def test_the_layout_follows_the_width_that_is_given():
    assert regard.create("efficient", channels=8).layout == "map"
    assert regard.create("efficient", dim=8).layout == "sequence"
    assert regard.create("efficient", channels=8).num_heads == 1
    assert regard.create("efficient", dim=8).num_heads == 8
    assert regard.create("efficient", "map", 8, 4, 6).value_channels == 6
    assert regard.create("efficient", channels=8).residual
    assert not regard.create("efficient", dim=8).residual


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((64,), {}, "channels= .* or dim="),
        ((), {}, "channels=... .* or dim="),
        (("sequence",), {"channels": 8}, "sequence"),
        ((), {"channels": 8, "dim": 8}, "of the other layout"),
        ((), {"dim": 8, "key_channels": 4}, "of the other layout"),
        ((), {"dim": 12, "num_heads": 5}, "key width=12 is not divisible by num_heads=5"),
        ((), {"dim": 8, "normalization": "l2"}, "normalization='l2'"),
        ((), {"dim": 8, "causal": True, "normalization": "scaling"}, "causal=True"),
        ((), {"channels": 8, "causal": True}, "causal=True"),
    ],
)
def test_wrong_options(arguments, options, words):
    with pytest.raises(RegardError, match=words):
        regard.create("efficient", *arguments, **options)


def test_wrong_calls():
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    with pytest.raises(RegardError, match="attn_mask"):
        make(**TOKENS)(x, attn_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(RegardError, match="context"):
        make(**TOKENS, causal=True)(x, x)
    with pytest.raises(RegardError, match="key_mask"):
        make(**MAP)(x.mT, key_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(RegardError, match="causal=True"):
        make(**TOKENS).init_state(1)
