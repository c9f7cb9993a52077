"""GAU: every option against the equations, the relative terms, masks, chosen rows, wrong calls."""

import itertools

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.workbench.candidates import parse


def make(**options):
    torch.manual_seed(0)
    module = regard.create("gau", 10, **{"qk_dim": 6, "hidden_dim": 14, "max_len": 24, **options}).double().eval()
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def rope(t, position):
    """Half-split rotation of one vector."""
    half = t.shape[0] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=t.dtype) / half)
    a, b = t[:half], t[half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


def relative(module, i, j):
    if module.rel_pos == "rope":
        return rope(module.rel_pos_bias.a, i) @ rope(module.rel_pos_bias.b, j)
    if module.rel_pos == "toeplitz":
        return module.rel_pos_bias.rel_pos_bias[module.max_len - 1 + j - i]
    if module.rel_pos == "t5":  # all offsets here are below the first logarithmic bucket
        bucket = max(i - j, 0) if module.causal else 16 * (j > i) + abs(i - j)
        return module.qk_dim**0.5 * module.rel_pos_bias.weight[bucket, 0]
    return torch.zeros((), dtype=torch.float64)


def by_pairs(module, x, keys, pairs):
    """Pair by pair, as the definition reads."""
    h = module.norm(x)
    u, v, z = torch.nn.functional.silu(module.proj(h)).split([module.hidden_dim, module.hidden_dim, module.qk_dim], -1)
    q, k = z * module.gamma[0] + module.beta[0], z * module.gamma[1] + module.beta[1]
    a, n = torch.zeros(*x.shape[:2], x.shape[1], dtype=x.dtype), x.shape[1]
    for b, i in itertools.product(range(x.shape[0]), range(n)):
        seen = [j for j in range(n) if keys[b, j] and pairs[i, j] and (j <= i or not module.causal)]
        count = max(int(keys[b].sum()), 1)
        if not seen:
            continue
        scale = module.qk_dim**-0.5 if module.activation == "softmax" else 1 / count
        scores = torch.stack([q[b, i] @ k[b, j] * scale + relative(module, i, j) for j in seen])
        normal = torch.distributions.Normal(0.5**0.5, (4 * torch.pi) ** -0.5)
        a[b, i, seen] = {"relu2": lambda t: t.relu() ** 2, "laplace": normal.cdf, "softmax": lambda t: t.softmax(0)}[module.activation](scores)
    out = module.out_proj(u * (a @ v))
    return out + x if module.residual else out, a[:, None]


@pytest.mark.parametrize("rel_pos", ["rope", "toeplitz", "t5", None])
@pytest.mark.parametrize("activation", ["relu2", "laplace", "softmax"])
@torch.no_grad()
def test_options_equal_the_equations(rel_pos, activation):
    for causal, norm, residual in ((False, "layernorm", True), (True, "scalenorm", False), (True, None, True)):
        module, x = make(rel_pos=rel_pos, activation=activation, causal=causal, norm=norm, residual=residual), torch.randn(3, 8, 10).double()
        keys, pairs = torch.rand(3, 8) > 0.3, torch.rand(8, 8) > 0.2
        keys[1:] = False
        keys[2, 0] = True
        out, a = module(x, key_mask=keys, attn_mask=pairs, return_weights=True)
        expected, weights = by_pairs(module, x, keys, pairs)
        assert torch.allclose(a, weights, atol=1e-6)  # rotary angles are float32
        assert torch.allclose(out, expected, atol=1e-5 * expected.abs().max())
        rows = module.weights(x, queries=torch.tensor([5, 0]), key_mask=keys, attn_mask=pairs[None, None])
        assert torch.allclose(rows, a[:, :, [5, 0]], atol=1e-14)


def test_scale_norm_is_its_equation():
    module, x = make(norm="scalenorm"), torch.randn(2, 3, 10).double()
    x[0, 0] = 0
    assert torch.allclose(module.norm(x), x / (x.norm(dim=-1, keepdim=True) / 10**0.5).clamp_min(1e-5) * module.norm.g)


@torch.no_grad()
def test_t5_buckets_grow_logarithmically():
    table = make(rel_pos="t5").rel_pos_bias
    table.weight.copy_(torch.arange(32.0)[:, None])
    bucket = (table(200) / table.scale).round().long()
    assert bucket[199 - torch.tensor([0, 7, 8, 15, 16, 127, 199])].tolist() == [0, 7, 8, 9, 10, 15, 15]
    assert bucket[199 + torch.tensor([1, 7, 8, 199])].tolist() == [17, 23, 24, 31]


@torch.no_grad()
def test_a_prefix_is_that_of_the_whole_once_scores_have_the_same_scale():
    """n is the length of the whole: a prefix of t has scores N / t times as large. Queries scaled by t / N make up for it."""
    module, x = make(causal=True), torch.randn(2, 20, 10).double()
    whole = module(x)
    assert not torch.allclose(module(x[:, :7]), whole[:, :7])
    module.gamma[0].mul_(7 / 20)
    module.beta[0].mul_(7 / 20)
    assert torch.allclose(module(x[:, :7]), whole[:, :7], atol=1e-12)
    softmax = make(causal=True, activation="softmax")
    assert torch.allclose(softmax(x[:, :7]), softmax(x)[:, :7], atol=1e-12)


def test_dropouts_act_in_training_alone():
    x = torch.randn(2, 9, 10).double()
    for options in ({"dropout": 0.5}, {"hidden_dropout": 0.5}):
        module = make(**options)
        assert torch.equal(module(x), module(x)) and torch.equal(module(x), make()(x))
        module.train()
        assert not torch.equal(module(x), module(x))


def test_apollo_names_need_no_norm():
    module, other = make(rel_pos="toeplitz"), make(rel_pos="toeplitz", residual=False)
    state = {n: t + 1 for n, t in to_official(module).items() if not n.startswith("norm")}
    assert sorted(state) == ["beta", "gamma", "out_proj.bias", "out_proj.weight", "proj.bias", "proj.weight", "rel_pos_bias.rel_pos_bias"]
    assert torch.equal(load_official(other, state).gamma, module.gamma + 1)


def test_the_workbench_lends_no_heads():
    assert "num_heads" not in parse("gau").lent(type("Setting", (), {"num_heads": 4, "causal": False, "host": "tokens", "longest": 9})())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_heads": 2}, "num_heads=2"),
        ({"qk_dim": 5}, "qk_dim=5"),
        ({"rel_pos": "toeplitz", "max_len": None}, "max_len"),
        ({"rel_pos": "alibi"}, "rel_pos='alibi'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"hidden_dropout": -0.1}, "hidden_dropout=-0.1"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(RegardError, match=said):
        make(**options)


def test_wrong_calls_are_named():
    with pytest.raises(RegardError, match="25 is longer than max_len=24"):
        make(rel_pos="toeplitz")(torch.zeros(1, 25, 10).double())
    x = torch.zeros(2, 5, 10).double()
    with pytest.raises(RegardError, match="context"):
        make()(x, x)
    with pytest.raises(RegardError, match="attn_mask must broadcast"):
        make()(x, attn_mask=torch.ones(4, 5, dtype=torch.bool))
