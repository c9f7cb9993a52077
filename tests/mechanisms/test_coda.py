"""What only de-attention has: signed weights, a mean over pairs, two layouts."""

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import RegardError, RegardTypeError


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))


def brute_force(m, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
    """The specification's equations, pair by pair."""
    q, k = (p.unflatten(2, (m.num_heads, -1)).transpose(1, 2) for p in (m.q_proj(x), m.k_proj(context)))
    out = torch.zeros(*q.shape[:3], k.shape[2])
    allowed = torch.ones(out.shape, dtype=torch.bool) if mask is None else mask.expand(out.shape)
    for b in range(out.shape[0]):
        for h in range(m.num_heads):
            far = [[-m.beta * (qi - kj).abs().sum() if allowed[b, h, i, j] else None for j, kj in enumerate(k[b, h])] for i, qi in enumerate(q[b, h])]
            every = [n for row in far for n in row if n is not None]
            for i, row in enumerate(far):
                counted = every if m.center_over == "matrix" else [n for n in row if n is not None]
                mean = torch.stack(counted).mean() if counted else torch.zeros(())
                for j, n in enumerate(row):
                    if n is not None:
                        gate = {"center": n - mean, "scale": n, "none": n}[m.normalization].sigmoid() * (2 if m.normalization == "scale" else 1)
                        out[b, h, i, j] = (m.alpha * q[b, h, i] @ k[b, h, j]).tanh() * gate
    return out


@pytest.mark.parametrize("normalization", ["center", "scale", "none"])
@pytest.mark.parametrize("over", ["matrix", "row"])
def test_equations(x: Tensor, normalization: str, over: str) -> None:
    m = regard.create("coda", 24, 3, head_dim=5, normalization=normalization, center_over=over, alpha=0.7, beta=0.2)
    mask = torch.rand(2, 3, 9, 6, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[1, 2, 4] = False
    context = torch.randn(2, 6, 24)
    with torch.no_grad():
        weights = brute_force(m, x, context, mask)
        v = m.v_proj(context).unflatten(2, (3, -1)).transpose(1, 2)
        out, found = m(x, context, attn_mask=mask, return_weights=True)
        torch.testing.assert_close(found, weights)
        torch.testing.assert_close(out, m.out_proj((weights @ v).transpose(1, 2).flatten(2)))


def test_defaults(x: Tensor) -> None:
    m = regard.create("coda", 24, 6)
    assert (m.alpha, m.beta, m.normalization, m.center_over) == (0.5, 0.5, "center", "matrix")
    assert regard.create("coda", 24).num_heads == 8
    pair = regard.create("coda", layout="pair", dim=24)
    assert (pair.alpha, pair.beta, pair.proj) == (1.0, 1.0, True)


def test_weights_have_signs(x: Tensor) -> None:
    weights = regard.create("coda", 24, 3)(3 * x, return_weights=True)[1]
    assert weights.min() < -0.1 and weights.max() > 0.1 and weights.abs().max() <= 1


def test_learned_factors_start_at_the_fixed_ones(x: Tensor) -> None:
    fixed, learned = regard.create("coda", 24, 6), regard.create("coda", 24, 6, alpha="learned", beta="learned")
    learned.load_state_dict(fixed.state_dict(), strict=False)
    torch.testing.assert_close(learned(x), fixed(x))
    learned(x).square().sum().backward()
    assert learned.alpha.shape == learned.beta.shape == (6,)
    assert learned.alpha.grad.abs().min() > 0 and learned.beta.grad.abs().min() > 0


def test_a_padded_query_counts_in_the_mean_unless_its_row_is_hidden(x: Tensor) -> None:
    m = regard.create("coda", 24, 3)
    real = torch.arange(9) < torch.tensor([[9], [6]])
    alone = m(x[1:, :6])
    assert not torch.allclose(m(x, key_mask=real)[1:, :6], alone, atol=1e-4)
    rows = real[:, None, :, None] & real[:, None, None]
    torch.testing.assert_close(m(x, attn_mask=rows)[1:, :6], alone)


def test_fully_masked_gives_the_bias(x: Tensor) -> None:
    m = regard.create("coda", 24, 3)
    out = m(x, key_mask=torch.zeros(2, 9, dtype=torch.bool))
    torch.testing.assert_close(out, m.out_proj.bias.expand(2, 9, 24))


def test_causal_needs_a_mean_that_does_not_look_ahead(x: Tensor) -> None:
    with pytest.raises(RegardError, match="center_over='row'"):
        regard.create("coda", 24, 3, causal=True)
    m = regard.create("coda", 24, 3, causal=True, center_over="row")
    torch.testing.assert_close(m(x[:, -2:], x), m(x)[:, -2:])
    regard.create("coda", 24, 3, causal=True, normalization="scale")


def test_pair_is_symmetric(x: Tensor) -> None:
    m = regard.create("coda", layout="pair", dim=24, alpha=0.3, beta=0.1)
    a, b = x, torch.randn(2, 5, 24)
    (a2, b2), w = m(a, b, return_weights=True)
    (b3, a3), w3 = m(b, a, return_weights=True)
    torch.testing.assert_close((a2, b2, w), (a3, b3, w3.mT))
    torch.testing.assert_close((a2, b2), (w @ b, w.mT @ a))
    torch.testing.assert_close(m(a=a, b=b), (a2, b2))


def test_pair_padding(x: Tensor) -> None:
    m = regard.create("coda", layout="pair", dim=24, alpha=0.3, beta=0.1)
    a, b = x, torch.randn(2, 5, 24)
    real_a, real_b = torch.arange(9) < torch.tensor([[9], [6]]), torch.arange(5) < torch.tensor([[4], [5]])
    (a2, b2), w = m(a, b, a_mask=real_a, b_mask=real_b, return_weights=True)
    for i, (n, k) in enumerate(((9, 4), (6, 5))):
        a3, b3 = m(a[i : i + 1, :n], b[i : i + 1, :k])
        torch.testing.assert_close((a2[i : i + 1, :n], b2[i : i + 1, :k]), (a3, b3))
    assert (w[1, 6:] == 0).all() and (a2[1, 6:] == 0).all() and (b2[0, 4:] == 0).all()


def test_pair_without_projections(x: Tensor) -> None:
    m = regard.create("coda", layout="pair", dim=24, proj=False, normalization="none")
    assert not list(m.parameters())
    far = torch.cdist(x, x, p=1)
    torch.testing.assert_close(m(x, x, return_weights=True)[1], (x @ x.mT).tanh() * (-far).sigmoid())


def test_finite_at_a_thousand(x: Tensor) -> None:
    for layout in ("sequence", "pair"):
        m, big = regard.create("coda", 24, layout=layout), (1e3 * x).requires_grad_()
        out = m(big) if layout == "sequence" else m(big, big)[0]
        out.sum().backward()
        assert out.isfinite().all() and big.grad.isfinite().all()


def test_dropout_acts_in_training_alone(x: Tensor) -> None:
    m = regard.create("coda", 24, 3, dropout=0.5)
    assert not torch.equal(m.train()(x), m(x))
    assert torch.equal(m.eval()(x), m(x))


def test_wrong_calls(x: Tensor) -> None:
    for options, error, words in (
        ({"normalization": "softmax"}, RegardError, "normalization='softmax'"),
        ({"center_over": "column"}, RegardError, "center_over='column'"),
        ({"alpha": "free"}, RegardTypeError, "alpha='free'"),
        ({"beta": True}, RegardTypeError, "beta=True"),
        ({"alpha": float("nan")}, RegardError, "alpha=nan"),
        ({"proj": False}, RegardError, "proj=False"),
        ({"layout": "map"}, RegardError, "layout='map'"),
        ({"layout": "pair", "num_heads": 4}, RegardError, "num_heads"),
        ({"layout": "pair", "causal": True}, RegardError, "causal"),
    ):
        with pytest.raises(error, match=words):
            regard.create("coda", 24, **options)
    m, pair = regard.create("coda", 24, 3), regard.create("coda", 24, layout="pair")
    for call, words in (
        (lambda: m(x, a=x), "takes no \\['a'\\]"),
        (lambda: pair(x, x, attn_mask=x[..., :9] > 0), "takes no \\['attn_mask'\\]"),
        (lambda: pair(x), "b must be a tensor, got NoneType"),
        (lambda: m(), "x must be a tensor, got NoneType"),
        (lambda: pair(x, x[:1]), "a has batch 2 but b has batch 1"),
        (lambda: pair(x, x, a_mask=torch.ones(2, 8, dtype=torch.bool)), "a_mask must have shape"),
        (lambda: pair.weights(x, x), "layout='pair'"),
    ):
        with pytest.raises(RegardError, match=words):
            call()
