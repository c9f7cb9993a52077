"""Probabilistic attention: every option against the equations, pair by pair; what EM does to padding, corrections and keys nobody asks for."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import use_impl
from regard.errors import RegardError
from regard.ops import _dispatch
from regard.ops.mixture_attention import Mixture, adapt_keys, columns, mixture_attend, mixture_weights, propagate_values

B, H, N, M, D, E = 2, 2, 5, 6, 4, 3


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def core(n: int = N, m: int = M) -> tuple[Tensor, Tensor, Tensor]:
    return noise(B, H, n, D), noise(B, H, m, D, seed=1), noise(B, H, m, E, seed=2)


def posterior(q, k, v, *, alpha=0.4, beta=0.0, magnitude=True, prior=None, v_init=None, q_pos=None, k_pos=None, v_pos=None, mask=None) -> Tensor:
    """The log weights as defined, one pair at a time."""
    b, h, n, m = *q.shape[:3], k.shape[2]
    alpha, beta = (torch.as_tensor(a, dtype=torch.float64).expand(b, h, m) for a in (alpha, beta))
    out = torch.zeros(b, h, n, m, dtype=torch.float64)
    for s in range(b):
        for g in range(h):
            for i in range(n):
                for j in range(m):
                    a, c, x, y, u = alpha[s, g, j], beta[s, g, j], q[s, g, i], k[s, g, j], v[s, g, j]
                    w = -a / 2 * (x - y).square().sum()
                    if v_init is not None:
                        w = w - c / 2 * (v_init[s, g, i] - u).square().sum()
                    if q_pos is not None:
                        w = w - a / 2 * (x - q_pos[i, j]).square().sum()
                    if k_pos is not None:
                        w = w - a / 2 * (y - k_pos[i, j]).square().sum()
                    if prior is not None:
                        w = w + prior[s, g, i, j].log()
                    elif magnitude:
                        w = w + a / 2 * y.square().sum() + c / 2 * (u if v_pos is None else u + v_pos[i, j]).square().sum()
                        w = w if q_pos is None else w + a / 2 * q_pos[i, j].square().sum()
                        w = w if k_pos is None else w + a / 2 * (y.square().sum() + k_pos[i, j].square().sum())
                    out[s, g, i, j] = w if mask is None or mask.expand(b, h, n, m)[s, g, i, j] else -torch.inf
    return out.softmax(-1).nan_to_num(0.0)


PAIRS = noise(B, H, N, M, seed=5).sigmoid()
MASK = noise(B, 1, N, M, seed=7) > -0.8
MASK[0, 0, 2] = False
PER_KEY = noise(B, H, M, seed=3).exp()
CASES = {
    "dot product": {},
    "gaussian": {"magnitude": False},
    "beta without v_init": {"beta": 0.3},
    "beta, gaussian, without v_init": {"beta": 0.3, "magnitude": False},
    "v_init": {"beta": 0.3, "v_init": noise(B, H, N, E)},
    "v_init, gaussian": {"beta": 0.3, "v_init": noise(B, H, N, E), "magnitude": False},
    "v_init, beta 0": {"v_init": noise(B, H, N, E), "magnitude": False},
    "a precision of each head": {"alpha": noise(H, 1).exp(), "beta": noise(H, 1).exp(), "magnitude": False},
    "alpha of each key": {"alpha": PER_KEY, "magnitude": False},
    "alpha of each key, magnitudes": {"alpha": PER_KEY, "beta": 0.2},
    "both of each key": {"alpha": PER_KEY, "beta": PER_KEY.flip(2), "v_init": noise(B, H, N, E), "magnitude": False},
    "both of each key, magnitudes": {"alpha": PER_KEY, "beta": PER_KEY.flip(2), "v_init": noise(B, H, N, E)},
    "mask": {"magnitude": False, "mask": MASK},
    "prior": {"prior": PAIRS, "beta": 0.2, "v_init": noise(B, H, N, E)},
    "prior, mask": {"prior": PAIRS.masked_fill(PAIRS < 0.3, 0.0), "mask": MASK, "magnitude": False},
    "places": {"q_pos": noise(N, M, D), "k_pos": noise(N, M, D, seed=1), "magnitude": False, "alpha": PER_KEY},
    "places, magnitudes": {"q_pos": noise(N, M, D), "k_pos": noise(N, M, D, seed=1), "beta": 0.2},
    "value places": {"v_pos": noise(N, M, E), "beta": 0.2},
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_outputs_are_the_equations(name):
    options, (q, k, v) = CASES[name], core()
    mixture, expected = Mixture(**{"alpha": 0.4, **options}), posterior(q, k, v, **options)
    for impl in ("reference",) if mixture.by_pairs else ("reference", "factors"):
        with use_impl(mixture_attention=impl):
            torch.testing.assert_close(mixture_weights(q, k, v, mixture), expected)
            out = mixture_attend(q, k, v, mixture)
        torch.testing.assert_close(out[..., :E], expected @ v)
        if mixture.v_pos is not None:
            torch.testing.assert_close(out[..., E:], torch.einsum("bhnm,nme->bhne", expected, mixture.v_pos))
    chosen = torch.tensor([3, 0, 3])
    torch.testing.assert_close(mixture_weights(q[:, :, chosen], k, v, mixture.rows(chosen)), expected[:, :, chosen])


def test_the_way_of_other_devices_is_the_same(monkeypatch):
    (q, k, v), mixture = core(), Mixture(0.4, magnitude=False, mask=MASK)
    expected, moved = mixture_attend(q, k, v, mixture), adapt_keys(q, k, v, mixture, 2)
    monkeypatch.setattr(_dispatch, "on_cpu", lambda x: False)
    torch.testing.assert_close(mixture_attend(q, k, v, mixture), expected)
    torch.testing.assert_close(adapt_keys(q, k, v, mixture, 2), moved)


@pytest.mark.parametrize("anchor", ["current", "initial"])
@pytest.mark.parametrize("theta", [None, 0.7, noise(M, 1).exp()], ids=["flat", "number", "tensor"])
@pytest.mark.parametrize("name", [n for n in CASES if n != "value places"])
def test_keys_adapt_as_the_equations_say(name, theta, anchor):
    options, (q, k, v) = CASES[name], core()
    counts = torch.tensor([[True] * 5, [True, True, False, True, False]])
    expected = k
    alpha = torch.as_tensor(options.get("alpha", 0.4), dtype=torch.float64).expand(B, H, M)[..., None]
    for _ in range(2):
        w = posterior(q, expected, v, **options) * counts[:, None, :, None]
        total, mass = w.mT @ q, w.sum(2)[..., None]
        base = expected if anchor == "current" else k
        moved = total / mass if theta is None else (theta * base + alpha * total) / (theta + alpha * mass)
        expected = torch.where(mass > 0, moved, base)
    found = adapt_keys(q, k, v, Mixture(**{"alpha": 0.4, **options}), 2, precision=theta, anchor=anchor, query_mask=counts)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("phi", [None, 0.7, noise(M, 1).exp()], ids=["flat", "number", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_values_spread_as_the_equations_say(name, phi):
    options, (q, k, v) = CASES[name], core()
    known, fixed = noise(B, H, N, E, seed=9), torch.tensor([[True, False, False, True, False], [False, True, True, False, True]])
    beta, expected = torch.as_tensor(options.get("beta", 0.0), dtype=torch.float64).expand(B, H, M)[..., None], v
    for _ in range(2):
        w = posterior(q, k, expected, **options) * fixed[:, None, :, None]
        total, mass = w.mT @ known, w.sum(2)[..., None] + 1e-20
        expected = total / mass if phi is None else (phi * expected + beta * total) / (phi + beta * mass)
    mixture = Mixture(**{"alpha": 0.4, **options})
    torch.testing.assert_close(propagate_values(q, k, v, mixture, 2, known=known, known_mask=fixed, precision=phi), expected)


def test_only_the_known_queries_are_worked_on():
    q, k, v = core(64, 48)
    fixed = torch.zeros(B, 64, dtype=torch.bool)
    fixed[0, :3] = fixed[1, 9] = True
    with FlopCounterMode(display=False) as counter:
        propagate_values(q, k, v, Mixture(0.4), 4, known=noise(B, H, 64, E), known_mask=fixed)
    assert counter.get_total_flops() == 2 * B * H * 3 * 48 * (D + E + 1)  # once: without v_init the weights stay as they are


def test_a_sample_without_corrections_keeps_its_values_whatever_its_companions():
    q, k, v = core()
    fixed = torch.zeros(B, N, dtype=torch.bool)
    assert torch.equal(propagate_values(q, k, v, Mixture(0.4), 2, known=q[..., :E], known_mask=fixed), v)
    fixed[1, 2] = True
    out = propagate_values(q, k, v, Mixture(0.4), 2, known=q[..., :E], known_mask=fixed)
    assert torch.equal(out[0], v[0])
    torch.testing.assert_close(out[1], q[1, :, 2:3, :E].expand(-1, M, -1))  # one known token, no prior: all keys take its value


def test_a_key_that_no_query_may_see_stays():
    q, k, v = core()
    mask = torch.ones(1, 1, 1, M, dtype=torch.bool)
    mask[..., 4] = False
    out = adapt_keys(q, k, v, Mixture(0.4, mask=mask), 1)
    assert torch.equal(out[:, :, 4], k[:, :, 4]) and bool((out[:, :, :4] != k[:, :, :4]).all())


@pytest.mark.parametrize("tile", [5, 12, 40, 2**19])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_change_nothing(tile, masked, monkeypatch):
    monkeypatch.setattr(columns, "TILE", tile)
    q, k, v = (x.requires_grad_() for x in (noise(B, H, N, D), noise(B, H, M, D, seed=1), noise(B, H, N, E)))
    mask = MASK if masked else None
    scores = q @ k.mT if mask is None else (q @ k.mT).masked_fill(~MASK, -1e30)
    expected = (scores.softmax(-1) * (1 if mask is None else MASK)).mT @ v
    torch.testing.assert_close(columns.column_sums(q, k, v, mask), expected)
    assert torch.autograd.gradcheck(lambda *t: columns.column_sums(*t, mask), (q, k, v), fast_mode=True)


def test_one_operator_passes_torchs_own_checks():
    torch.library.opcheck(torch.ops.regard.column_sums.default, (*(x.detach().float().requires_grad_() for x in core(M)), MASK[:, :, :1]))


def layer(**options) -> regard.mechanism.Mechanism:
    torch.manual_seed(0)
    options = {"beta": 0.5, "key_adaptation_iters": 2, "value_propagation_iters": 2, "value_prior_precision": 0.3, **options}
    return regard.create("probabilistic", dim=12, num_heads=2, magnitude_priors=False, **options).double().eval()


def test_padding_neither_asks_nor_corrects():
    module, x, known = layer(), noise(2, 9, 12), noise(2, 9, 12, seed=1)
    fixed, valid = noise(2, 9) > 0, torch.arange(9) < torch.tensor([[9], [6]])
    out = module(x, key_mask=valid, v_fixed=known, fixed_mask=fixed, v_init=known)
    short = module(x[1:, :6], v_fixed=known[1:, :6], fixed_mask=fixed[1:, :6], v_init=known[1:, :6])
    torch.testing.assert_close(out[1:, :6], short)


def test_compiled_and_exported_corrections_are_the_same():
    module, x, known = layer(key_adaptation_iters=1, value_propagation_iters=1), noise(2, 9, 12), noise(2, 9, 12, seed=1)
    fixed = noise(2, 9) > 0
    expected = module(x, v_fixed=known, fixed_mask=fixed)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, v_fixed=known, fixed_mask=fixed), expected)
    inputs = {"x": x, "v_fixed": known, "fixed_mask": fixed}
    program = torch.export.export(module, (), inputs, dynamic_shapes={name: {1: torch.export.Dim.AUTO} for name in inputs}, strict=False)
    less = {name: t[:, :7] for name, t in inputs.items()}
    torch.testing.assert_close(program.module()(**less), module(**less))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_samples_equals_the_batch():
    module, x, known, fixed = layer(), noise(3, 2, 9, 12), noise(3, 2, 9, 12, seed=1), noise(3, 2, 9) > 0

    def one(x, known, fixed):
        return module(x, v_fixed=known, fixed_mask=fixed)

    together = torch.func.vmap(one)(x, known, fixed)
    torch.testing.assert_close(together, torch.stack([one(*t) for t in zip(x, known, fixed, strict=True)]))
    slopes = torch.func.vmap(torch.func.grad(lambda x: collected(x[None]).square().sum()))(x[0])
    y = x[0].requires_grad_()
    torch.testing.assert_close(slopes, torch.autograd.grad(collected(y).square().sum(), y)[0])


def collected(x: Tensor) -> Tensor:
    """Keys adapted to themselves."""
    heads = x[:, None]
    return adapt_keys(heads, heads, heads, Mixture(0.4, magnitude=False), 1)


def test_core_layout_and_precisions_of_the_call():
    q, k, v = core()
    module = regard.create("probabilistic", alpha=0.4, uniform_query_precision=False, magnitude_priors=False)
    assert module.layout == "core" and not list(module.parameters())
    out, weights = module(q, k, v, alpha=PER_KEY, attn_mask=MASK, return_weights=True)
    expected = posterior(q, k, v, alpha=PER_KEY, magnitude=False, mask=MASK)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, expected @ v)
    torch.testing.assert_close(module.weights(q, k, v, queries=torch.tensor([1]), alpha=PER_KEY, attn_mask=MASK), expected[:, :, 1:2])
    torch.testing.assert_close(regard.create("probabilistic")(q=q, k=k, v=v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_clamped_tokens_have_their_known_values():
    q, k, v = core()
    known, fixed = noise(B, H, N, E), noise(B, N) > 0
    free, clamped = (regard.create("probabilistic", clamp_fixed=c)(q, k, v, v_fixed=known, fixed_mask=fixed) for c in (False, True))
    chosen = fixed[:, None, :, None].expand_as(known)
    assert torch.equal(clamped[chosen], known[chosen]) and torch.equal(clamped[~chosen], free[~chosen])
    assert bool((free[chosen] != known[chosen]).all())


def test_maps_are_tokens():
    tokens, x, known, fixed = layer(), noise(2, 12, 3, 4), noise(2, 12, 3, 4, seed=1), noise(2, 3, 4) > 0
    options = {"beta": 0.5, "key_adaptation_iters": 2, "value_propagation_iters": 2, "value_prior_precision": 0.3, "magnitude_priors": False}
    maps = regard.create("probabilistic", channels=12, num_heads=2, **options).double()
    maps.load_state_dict(tokens.state_dict())
    expected = tokens(x.flatten(2).mT, v_fixed=known.flatten(2).mT, fixed_mask=fixed.flatten(1))
    torch.testing.assert_close(maps(x, v_fixed=known, fixed_mask=fixed).flatten(2).mT, expected)


def test_half_precision_keeps_its_lengths_in_float32():
    q, k, v = (20 * x.bfloat16() for x in core())
    out = mixture_attend(q, k, v, Mixture(0.4, magnitude=False))
    exact = mixture_attend(q.double(), k.double(), v.double(), Mixture(0.4, magnitude=False))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("known", "text"), [(noise(2, 9, 10), "num_heads \\* head_dim=12"), (noise(2, 8, 12), "9 queries"), (noise(2, 12), "v_fixed must be")]
)
def test_wrong_corrections_of_tokens_are_answered(known, text):
    with pytest.raises(RegardError, match=text):
        layer()(noise(2, 9, 12), v_fixed=known, fixed_mask=noise(2, 9) > 0)


@pytest.mark.parametrize(
    ("options", "call", "text"),
    [
        ({}, {"v_fixed": noise(B, H, N, E)}, "fixed_mask"),
        ({}, {"fixed_mask": torch.ones(B, N, dtype=torch.bool)}, "v_fixed"),
        ({}, {"v_fixed": noise(B, H, N, E), "fixed_mask": torch.ones(B, M, dtype=torch.bool)}, "fixed_mask must have shape"),
        ({}, {"v_fixed": noise(B, H, N, E), "fixed_mask": torch.ones(B, N)}, "fixed_mask must be boolean"),
        ({}, {"v_fixed": noise(B, H, M, E), "fixed_mask": torch.ones(B, N, dtype=torch.bool)}, "v_fixed"),
        ({}, {"alpha": PER_KEY}, "uniform_query_precision=False"),
        ({}, {"beta": PER_KEY}, "uniform_value_precision=False"),
        ({}, {"alpha": -1.0}, "alpha=-1.0"),
        ({"uniform_query_precision": False}, {"alpha": PER_KEY[..., :4]}, "alpha must broadcast"),
        ({}, {"prior": PAIRS[..., :3]}, "prior must broadcast"),
        ({}, {"q_pos": noise(N, M, E)}, "q_pos must have shape"),
        ({}, {"v_init": noise(B, H, M, E)}, "v_init must have shape"),
        ({}, {"key_mask": torch.ones(B, M, dtype=torch.bool)}, "attn_mask"),
        ({}, {"attn_mask": PAIRS}, "attn_mask must be boolean"),
        ({"key_adaptation_iters": -1}, {}, "key_adaptation_iters=-1"),
        ({"value_propagation_iters": -2}, {}, "value_propagation_iters=-2"),
        ({"key_prior_precision": -0.5}, {}, "key_prior_precision=-0.5"),
        ({"anchor": "first"}, {}, "anchor='first'"),
        ({"layout": "core", "dim": 8}, {}, "dim=8"),
        ({"layout": "map", "dim": 8}, {}, "channels=None"),
    ],
)
def test_wrong_calls_are_answered(options, call, text):
    with pytest.raises(RegardError, match=text):
        regard.create("probabilistic", **options)(*core(), **call)
