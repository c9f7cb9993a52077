"""What only synthesizers have: scores from the query alone or from no input, mixtures of them, a largest length."""

import itertools

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.ops.linear_attention import api as linear
from regard.testing.subject import shuffle_

L = 12
MODES = ("dense", "random", "factorized_dense", "factorized_random", "vanilla")
MIXTURES = (("random", "vanilla"), ("dense", "vanilla"), ("factorized_random", "dense", "vanilla"), ("factorized_dense", "random"), MODES)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))


def make(mode: object, **options: object):
    torch.manual_seed(0)
    module = regard.create("synthesizer", 16, 2, **{"max_len": L, "mode": mode, "rank": 3, **options}).eval()
    shuffle_(module)
    return module


def brute_force(m, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """The weights by the specification's equations, number by number."""
    n, k, h = x.shape[1], context.shape[1], m.num_heads
    alphas = [1.0] * len(m.modes) if isinstance(m.mix, str) else m.mix.softmax(0)
    scores = torch.zeros(x.shape[0], h, n, k)
    for b, i, row, j in itertools.product(range(x.shape[0]), range(h), range(n), range(k)):
        for alpha, mode in zip(alphas, m.modes, strict=True):
            if mode == "vanilla":
                d = m.head_dim
                one = m.q_proj(x[b, row])[i * d : (i + 1) * d] @ m.k_proj(context[b, j])[i * d : (i + 1) * d] / d**0.5
            elif mode == "random":
                one = m.random.weight[i, row, j]
            elif mode == "factorized_random":
                one = m.factorized_random.r1[i, row] @ m.factorized_random.r2[i, j]
            else:
                part, e, at = getattr(m, mode), m.hidden_dim, 0 if m.share_w2 else i
                z = part.w1(x[b, row])[i * e : (i + 1) * e].relu()
                if mode == "dense":
                    one = z @ part.w2[at, :, j] + part.b2[at, j]
                else:
                    first, second = divmod(j, part.w2_b.shape[-1])
                    one = (z @ part.w2_a[at, :, first] + part.b2_a[at, first]) * (z @ part.w2_b[at, :, second] + part.b2_b[at, second])
            scores[b, i, row, j] += alpha * one
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("options", [{}, {"share_w2": True, "hidden_dim": 5, "mix": "sum", "causal": True}], ids=["plain", "other"])
@pytest.mark.parametrize("mode", [*MODES, *MIXTURES], ids=str)
@torch.no_grad()
def test_equations(x: Tensor, mode: object, options: dict[str, object]) -> None:
    m = make(mode, context_dim=6, **options)
    context = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))
    key_mask = torch.arange(7) < torch.tensor([[7], [4]])
    causal = torch.arange(7) <= torch.arange(9)[:, None] - 2 if m.causal else torch.ones(9, 7, dtype=torch.bool)
    for given in ({}, {"key_mask": key_mask}, {"attn_mask": torch.rand(9, 7, generator=torch.Generator().manual_seed(2)) > 0.3}):
        mask = causal & given.get("attn_mask", True) & given.get("key_mask", torch.ones(2, 7, dtype=torch.bool))[:, None, None]
        weights = brute_force(m, x, context, mask)
        out, found = m(x, context, return_weights=True, **given)
        torch.testing.assert_close(found, weights)
        v = m.v_proj(context).unflatten(2, (2, -1)).transpose(1, 2)
        torch.testing.assert_close(out, m.out_proj((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("mode", ["random", "factorized_random"])
def test_constant_weights_are_blind_to_the_input(x: Tensor, mode: str) -> None:
    m = make(mode)
    torch.testing.assert_close(m.weights(x), m.weights(torch.randn_like(x)), rtol=0, atol=0)
    one = torch.cat([m(x[:1]), m(x[1:])])  # several samples are columns of one product
    torch.testing.assert_close(m(x), one)


def test_frozen_random_is_no_parameter(x: Tensor) -> None:
    m = regard.create("synthesizer", 16, 2, max_len=L, mode="random", trainable_random=False)
    assert "random.weight" in m.state_dict() and "random.weight" not in dict(m.named_parameters())
    assert 0.8 < m.random.weight.std() < 1.2


@pytest.mark.parametrize("mode", ["random", "factorized_random", "factorized_dense", ("random", "vanilla")], ids=str)
def test_blocks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, x: Tensor, mode: object) -> None:
    m, results = make(mode), []
    for size in (1 << 40, 1):
        monkeypatch.setattr(linear, "BLOCK", size)
        monkeypatch.setattr(linear, "KEPT", size)
        m.zero_grad()
        for given in ({}, {"key_mask": torch.arange(9) < torch.tensor([[9], [5]])}):
            m(x, **given).square().sum().backward()
        results.append([p.grad.clone() for p in m.parameters()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", [*MODES, *MIXTURES], ids=str)
@torch.no_grad()
def test_steps(x: Tensor, mode: object) -> None:
    m = make(mode, causal=True)
    state, steps = m.init_state(2), []
    for t in range(9):
        out, state = m.step(x[:, t], state)
        steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 1), m(x))
    for _ in range(9, L):
        state = m.step(x[:, 0], state)[1]
    with pytest.raises(RegardError, match="13 positions, more than max_len=12"):
        m.step(x[:, 0], state)
    with pytest.raises(RegardError, match="causal=False"):
        make(mode).init_state(2)


def test_empty_rows_give_the_bias(x: Tensor) -> None:
    for mode in (*MODES, ("random", "vanilla")):
        m, key_mask = make(mode), torch.ones(2, 9, dtype=torch.bool)
        key_mask[1] = False
        out = m(x.requires_grad_(), key_mask=key_mask)
        torch.testing.assert_close(out[1], m.out_proj.bias.expand(9, 16))
        out.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in m.parameters())
        assert (m.weights(x, key_mask=key_mask)[1] == 0).all()


def test_dropout_acts_in_training_alone(x: Tensor) -> None:
    for mode in ("dense", "random", ("random", "vanilla")):
        m = make(mode, dropout=0.5)
        twice = torch.cat((x[:1], x[:1]))
        out = m.train()(twice)
        assert not torch.allclose(out[0], out[1])  # every sample has weights of its own dropped
        assert torch.equal(m.eval()(x), m(x))


def test_mesh_names(x: Tensor) -> None:
    m = make(("vanilla", "random"), qkv_bias=False, out_bias=False)
    theirs = to_official(m, "tensorflow/mesh")
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {
        **dict.fromkeys("qkvo", (16, 16)),
        "R": (L, 2, L),
        "alpha": (1,),
    }
    gate = theirs["alpha"].sigmoid()
    q, k = ((x @ theirs[name]).unflatten(2, (2, -1)) for name in "qk")
    scores = (1 - gate) * torch.einsum("bnhd,bmhd->bhnm", q, k) + gate * theirs["R"].transpose(0, 1)[:, :9, :9]
    torch.testing.assert_close(m.weights(x), scores.softmax(-1))
    other = load_official(regard.create("synthesizer", 16, 2, max_len=L, mode=("vanilla", "random"), qkv_bias=False, out_bias=False), theirs)
    torch.testing.assert_close(other(x), m(x))


def test_wrong_calls(x: Tensor) -> None:
    for options, words in (
        ({"mode": "sparse"}, "mode='sparse' is not one of"),
        ({"mode": ("dense", "dense")}, "names a mode twice"),
        ({"mode": ()}, "must name at least one"),
        ({"mix": "mean"}, "mix='mean'"),
        ({"factors": (5, 2)}, "factors=\\(5, 2\\) must be two numbers whose product is max_len=12"),
        ({"max_len": 0}, "max_len=0"),
        ({"rank": 0}, "rank=0"),
    ):
        with pytest.raises(RegardError, match=words):
            regard.create("synthesizer", 16, 2, **{"max_len": L, **options})
    m = make("dense")
    with pytest.raises(RegardError, match="x has 13 positions, more than max_len=12"):
        m(torch.randn(1, 13, 16))
    with pytest.raises(RegardError, match="context has 13 positions, more than max_len=12"):
        m(x, torch.randn(2, 13, 16))


def test_factors_near_the_root() -> None:
    for length, expected in ((12, (3, 4)), (16, (4, 4)), (13, (1, 13)), (18, (3, 6))):
        assert regard.create("synthesizer", 16, 2, max_len=length).factors == expected
