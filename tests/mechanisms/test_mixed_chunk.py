"""FLASH: every option against literal loops, steps, the border of a chunk, names, wrong calls."""

import pytest
import torch
from safetensors.torch import load, save

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official


def make(**options):
    torch.manual_seed(0)
    module = regard.create("mixed_chunk", 9, **{"qk_dim": 6, "hidden_dim": 14, "chunk_size": 4, **options}).double().eval()
    for parameter in module.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return module


def turned(y, rope_dim):
    """Neighbouring pairs of the first channels, by position."""
    y = y.clone()
    position = torch.arange(y.shape[1], dtype=y.dtype)
    for pair in range(rope_dim // 2):
        angle = position * 10000.0 ** (-2 * pair / rope_dim)
        a, b = y[..., 2 * pair].clone(), y[..., 2 * pair + 1].clone()
        y[..., 2 * pair], y[..., 2 * pair + 1] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return y


def by_tokens(module, x, keys):
    """Token by token; R comes from the module, whose terms have tests of their own."""
    (_, n, dim), c = x.shape, module.chunk_size
    h = module.norm(x)
    if module.shift_tokens:
        half = -(-dim // 2)
        h = torch.cat((torch.nn.functional.pad(h[..., :half], (0, 0, 1, -1)), h[..., half:]), -1)
    u, v, z = torch.nn.functional.silu(module.proj(h)).split([module.hidden_dim, module.hidden_dim, module.qk_dim], -1)
    q, k, lq, lk = (turned(z * g + b, module.rope_dim) for g, b in zip(module.gamma, module.beta, strict=True))
    bias = torch.zeros(2 * c - 1).double() if module.rel_pos is None else module.rel_pos_bias(c)
    scale = {"none": 1.0, "lucidrains": 1 / (c if module.causal else n)}[module.linear_scale]
    out = torch.zeros_like(v)
    for b in range(x.shape[0]):
        for i in range(n):
            for j in range(n):
                if not keys[b, j]:
                    continue
                same, before = i // c == j // c, j // c < i // c
                if same and (j <= i or not module.causal):
                    out[b, i] += (q[b, i] @ k[b, j] / c + bias[c - 1 + j - i]).relu() ** 2 * v[b, j]
                if before if module.causal else (module.reduce_chunks or same):
                    out[b, i] += scale * (lq[b, i] @ lk[b, j]) * v[b, j]
    out = module.out_proj(u * out)
    return out + x if module.residual else out


OPTIONS = (
    {},
    {"causal": True, "norm": "scalenorm"},
    {"causal": True, "linear_scale": "none", "rope_dim": 4, "shift_tokens": True},
    {"reduce_chunks": False, "rel_pos": "rope", "residual": False},
    {"linear_scale": "none", "rel_pos": None, "norm": None, "rope_dim": 6},
)


@pytest.mark.parametrize("n", [1, 3, 8, 14])
@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_options_equal_the_equations(options, n):
    module, x, keys = make(**options), torch.randn(2, n, 9).double(), torch.rand(2, n) > 0.3
    keys[1] = True
    for mask in (None, keys):
        expected = by_tokens(module, x, torch.ones_like(keys) if mask is None else mask)
        out, a = module(x, key_mask=mask, return_weights=True)
        assert torch.allclose(out, expected, atol=1e-5 * expected.abs().max())  # rotary angles are float32
        some = torch.tensor([n - 1, 0])
        assert torch.allclose(module.weights(x, queries=some, key_mask=mask), a[:, :, some], atol=1e-13)


@pytest.mark.parametrize("activation", ["relu2", "laplace", "softmax"])
@torch.no_grad()
def test_steps_equal_the_whole_over_several_chunks(activation):
    module, x = make(causal=True, rope_dim=4, shift_tokens=True, activation=activation), torch.randn(2, 14, 9).double()
    whole, state = module(x), module.init_state(2)
    for t in range(14):
        state = type(state)(**load(save({name: s.contiguous() for name, s in state._asdict().items()})))
        out, state = module.step(x[:, t], state)
        assert torch.allclose(out, whole[:, t], atol=1e-10)


@torch.no_grad()
def test_nothing_leaks_across_the_border_of_a_chunk():
    module, x = make(causal=True).float(), torch.randn(2, 14, 9)
    whole = module(x)
    for t in range(1, 14):
        changed = x.clone()
        changed[:, t:] = 1e3
        assert torch.equal(module(changed)[:, :t], whole[:, :t])


@torch.no_grad()
def test_one_chunk_without_the_linear_part_is_gau():
    flash, gau = make(causal=True, chunk_size=11, rel_pos="rope"), None
    flash.gamma[2:].zero_()
    flash.beta[2:].zero_()
    gau = regard.create("gau", 9, qk_dim=6, hidden_dim=14, causal=True).double().eval()
    state = flash.state_dict()
    gau.load_state_dict({name: t[:2] if name in ("gamma", "beta") else t for name, t in state.items()})
    x = torch.randn(2, 11, 9).double()
    assert torch.allclose(flash(x), gau(x), atol=1e-12)


def test_lucidrains_names():
    module = make()
    state = to_official(module, "lucidrains/FLASH-pytorch")
    assert torch.equal(state["qk_offset_scale.gamma"][1], module.gamma[2])  # the linear query is second there
    assert torch.equal(state["to_hidden.0.weight"][:14], module.proj.weight[14:28])  # the value is first there
    assert torch.equal(state["to_qk.0.bias"], module.proj.bias[28:])
    x = torch.randn(1, 6, 9).double()
    other = load_official(
        regard.create("mixed_chunk", 9, qk_dim=6, hidden_dim=14, chunk_size=4).double(), {**state, "rotary_pos_emb.freqs": torch.ones(2)}
    )
    assert torch.equal(other(x), module(x))


def test_dropout_acts_in_training_alone():
    x, module = torch.randn(2, 9, 9).double(), make(dropout=0.5)
    assert torch.equal(module(x), make()(x))
    assert not torch.equal(module.train()(x), module(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rope_dim": 3}, "rope_dim=3"),
        ({"rope_dim": 8}, "rope_dim=8"),
        ({"qk_dim": 5, "rel_pos": "rope"}, "qk_dim=5"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"rel_pos": "toeplitz"}, "rel_pos='toeplitz'"),
        ({"linear_scale": "paper"}, "linear_scale='paper'"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(RegardError, match=said):
        make(**options)


def test_wrong_calls_are_named():
    x = torch.zeros(2, 5, 9).double()
    with pytest.raises(RegardError, match="attn_mask"):
        make()(x, attn_mask=torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(RegardError, match="context"):
        make()(x, x)
    with pytest.raises(RegardError, match="causal=True"):
        make().init_state(2)
