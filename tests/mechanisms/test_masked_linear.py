"""masked_linear: every mask and feature map against its equations, prefix tokens, steps, the Flax names, wrong calls."""

import math

import pytest
import torch
from safetensors.torch import load, save

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.testing.subject import Subject
from regard.testing.suite import run

OPTIONS = [
    {"mask": "none"},
    {"mask": "none", "feature_map": "elu"},
    {"mask": "toeplitz", "max_len": 20},
    {"mask": "toeplitz", "max_len": 13, "rpe_activation": "exp", "feature_map": "elu"},
    {"mask": "toeplitz", "max_len": 40, "rpe_activation": "none", "feature_map": "favor", "num_features": 5},
    {"mask": "block_toeplitz", "grid_size": (3, 4)},
    {"mask": "block_toeplitz", "grid_size": (2, 3, 2), "rpe_activation": "exp", "feature_map": "favor"},
]


def make(**options):
    torch.manual_seed(0)
    module = regard.create("masked_linear", 12, 2, **options).double().eval()
    if module.rpe is not None:
        module.rpe.data.add_(0.4 * torch.randn_like(module.rpe))
    return module


def pairs(module, x, key_mask):
    """A / A 1 by the definition, one pair at a time; every number from the parameters."""
    heads, d, p = module.num_heads, module.head_dim, module.num_prefix_tokens
    q, k = (f(x).unflatten(2, (heads, d)).transpose(1, 2) for f in (module.q_proj, module.k_proj))

    def phi(y, query):
        if module.feature_map == "relu":
            return (y / d**0.5 if query else y).relu() + 1e-8
        if module.feature_map == "elu":
            return torch.where(y > 0, y + 1, y.exp())
        z, w = y * d**-0.25, module.feature_projection
        return torch.exp(torch.einsum("bhnd,hmd->bhnm", z, w) - z.square().sum(-1, keepdim=True) / 2) / w.shape[1] ** 0.5

    a, (b, n, _) = phi(q, True) @ phi(k, False).mT, x.shape
    sides = {"none": (n,), "toeplitz": (n - p,)}.get(module.mask, module.grid_size)
    steps = [math.prod(sides[at + 1 :]) for at in range(len(sides))]
    act = {"abs": torch.abs, "exp": torch.exp, "none": lambda t: t}[module.rpe_activation]
    rows = []
    for i in range(n):
        for j in range(n):
            m = torch.ones(heads, dtype=a.dtype)
            if module.mask != "none" and i >= p and j >= p:
                offset = [((i - p) // s) % side - ((j - p) // s) % side for s, side in zip(steps, sides, strict=True)]
                m = act(module.rpe[(slice(None), *(o + w // 2 for o, w in zip(offset, module.rpe.shape[1:], strict=True)))])
            allowed = (key_mask[:, j] if key_mask is not None else torch.ones(b)).to(a) * (0.0 if module.causal and j > i else 1.0)
            rows.append((a[:, :, i, j] * m + module.eps) * allowed[:, None])
    weights = torch.stack(rows, -1).unflatten(-1, (n, n))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_its_equations(options, prefix, causal):
    if options["mask"] == "none" and prefix:
        return
    module = make(num_prefix_tokens=prefix, causal=causal, **options)
    x, key_mask = torch.randn(2, 12 + prefix, 12, dtype=torch.float64), torch.rand(2, 12 + prefix) > 0.2
    for mask in (None, key_mask):
        weights = pairs(module, x, mask)
        v = module.v_proj(x).unflatten(2, (2, 6)).transpose(1, 2)
        expected = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
        out, given = module(x, key_mask=mask, return_weights=True)
        assert torch.allclose(out, expected, atol=1e-10)
        assert torch.allclose(given, weights, atol=1e-10)
        chosen = torch.tensor([11, 0, 4])
        assert torch.allclose(module.weights(x, queries=chosen, key_mask=mask), weights[:, :, chosen], atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_fft_equals_dense(options):
    x = torch.randn(2, 12, 12, dtype=torch.float64)
    dense, fft = (make(method=method, **options) for method in ("dense", "fft"))
    assert torch.allclose(dense(x), fft(x), atol=1e-9)


@pytest.mark.parametrize("activation", ["abs", "exp", "none"])
def test_starts_as_plain_linear_attention(activation):
    """A fresh mask is one everywhere."""
    torch.manual_seed(0)
    masked = regard.create("masked_linear", 12, 2, max_len=9, rpe_activation=activation)
    plain = regard.create("masked_linear", 12, 2, "none")
    plain.load_state_dict({name: t for name, t in masked.state_dict().items() if name != "rpe"})
    x = torch.randn(2, 9, 12)
    assert torch.allclose(masked(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_no_longer_than_the_prefix(n, causal):
    module, x = make(max_len=4, num_prefix_tokens=3, causal=causal), torch.randn(2, n, 12, dtype=torch.float64)
    out, weights = module(x, return_weights=True)
    v = module.v_proj(x).unflatten(2, (2, 6)).transpose(1, 2)
    assert weights.shape == (2, 2, n, n)
    assert torch.allclose(module.out_proj((weights @ v).transpose(1, 2).flatten(2)), out)


@pytest.mark.parametrize("features", [{}, {"feature_map": "elu"}, {"feature_map": "favor", "num_features": 5}], ids=str)
def test_a_step_ends_the_sequence_so_far(features):
    module, x = make(mask="none", causal=True, **features), torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        state, whole = module.init_state(2), module(x)
        for t in range(9):
            state = type(state)(**load(save({n: s.contiguous() for n, s in state._asdict().items()})))
            out, state = module.step(x[:, t], state)
            assert torch.allclose(out, whole[:, t], atol=1e-11)


def test_flax_names():
    module = make(mask="block_toeplitz", grid_size=(3, 4), num_prefix_tokens=1)
    state = to_official(module)
    assert state["query.kernel"].shape == (12, 2, 6)
    assert state["out.kernel"].shape == (2, 6, 12)
    assert state["toeplitz_params"].shape == (2, 48)
    assert (state["toeplitz_params"].view(2, 6, 8)[:, 0] == 0).all()
    twin = load_official(make(mask="block_toeplitz", grid_size=(3, 4), num_prefix_tokens=1, dtype=torch.float64), state)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True))
    assert state.keys() == to_official(twin).keys()


def test_the_suite_on_a_grid():
    """The registry's variants have free lengths; these checks take any one size."""
    options = {"dim": 24, "num_heads": 2, "mask": "block_toeplitz", "grid_size": (3, 4), "rpe_activation": "exp"}
    subject = Subject("grid", regard.registry.get("masked_linear"), options, "sequence", frozenset({"weights", "row_stochastic"}), None)
    names = ("bfloat16_is_close", "autocast_trains", "parameters_are_registered_and_learn", "vmap_over_weights", "checkpointing_equals",
             "copies_and_pickles", "builds_on_meta", "weights_sum_to_one", "finite_at_a_thousand", "fast_paths_equal_the_reference",
             "compiles_whole")  # fmt: skip
    outcomes = {o.check: (o.status, o.message) for o in run(subject, names)}
    assert len(outcomes) == len(names)
    compiled = outcomes.pop("compiles_whole")  # its dynamic half asks for another length, which a grid refuses
    assert compiled[0] == "pass" or "grid_size" in compiled[1]
    assert all(status == "pass" for status, _ in outcomes.values()), outcomes


def test_a_table_of_large_range_wants_the_dense_way():
    """What the docstring warns of: the rounding of an FFT is that of its largest term."""
    torch.manual_seed(0)
    module = regard.create("masked_linear", 16, 1, max_len=128, feature_map="elu", rpe_activation="exp").eval()
    module.rpe.data = -0.2 * (torch.arange(255.0) - 127).abs()[None]
    x = torch.randn(1, 128, 16)
    x[:, 64:] *= 1e3
    errors = {}
    with torch.no_grad():
        exact = module.double()(x.double())[:, :64]
        for module.method in ("dense", "fft"):
            errors[module.method] = ((module.float()(x)[:, :64] - exact).abs().max() / exact.abs().max()).item()
    assert errors["dense"] < 1e-5
    assert 10 * errors["dense"] < errors["fft"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "max_len"),
        ({"mask": "block_toeplitz"}, "grid_size"),
        ({"mask": "diagonal"}, "mask='diagonal'"),
        ({"mask": "none", "feature_map": "softmax"}, "feature_map"),
        ({"mask": "none", "num_features": 8}, "num_features=8"),
        ({"mask": "none", "feature_map": "favor", "num_features": 0}, "num_features=0"),
        ({"mask": "none", "method": "sat"}, "method='sat'"),
        ({"mask": "none", "num_prefix_tokens": -1}, "num_prefix_tokens=-1"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        regard.create("masked_linear", 12, 2, **options)


def test_wrong_calls():
    x = torch.randn(1, 7, 12)
    for options, words in (({"max_len": 6}, "7 positions.*max_len=6"), ({"mask": "block_toeplitz", "grid_size": (2, 3)}, "7 positions.*has 6")):
        with pytest.raises(RegardError, match=words):
            regard.create("masked_linear", 12, 2, **options)(x)
    with pytest.raises(ValueError, match="attn_mask"):
        regard.create("masked_linear", 12, 2, max_len=9)(x, attn_mask=torch.ones(7, 7, dtype=torch.bool))
    with pytest.raises(RegardError, match="context"):
        regard.create("masked_linear", 12, 2, max_len=9)(x, x)
    with pytest.raises(RegardError, match="mask='none'"):
        regard.create("masked_linear", 12, 2, max_len=9, causal=True).init_state(1)
