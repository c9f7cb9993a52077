"""Luong global: scores against the equations, one step, parts, sparsemax, half precision."""

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.official import load_official
from regard.ops._dispatch import use_impl
from regard.ops.additive_scores import additive_scores, pieces
from regard.ops.softmax_attention.sparsemax import sparsemax
from regard.parts import luong

SCORES = [
    {"score": "dot"},
    {"score": "general", "context_dim": 5},
    {"score": "concat", "context_dim": 5, "score_bias": True},
    {"score": "location", "context_dim": 5, "max_len": 4},
    {"score": "general", "scale": True, "out_bias": True, "activation": None},
    {"score": "concat", "scale": True, "normalize": "sparsemax"},
]


def make(**options):
    torch.manual_seed(0)
    module = regard.create("luong_global", 6, **options).double().eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def by_pairs(module, x, context, mask):
    """Pair by pair, as the definition reads."""
    out, weights = torch.zeros_like(x), torch.zeros(x.shape[0], x.shape[1], context.shape[1], dtype=x.dtype)
    for b in range(x.shape[0]):
        for t, h in enumerate(x[b]):
            allowed = [s for s in range(context.shape[1]) if mask[b, t, s] and (module.score != "location" or s < module.max_len)]
            c = context.new_zeros(context.shape[2])
            if allowed:
                scores = torch.stack([score(module, h, context[b, s], s) for s in allowed])
                a = project_to_simplex(scores) if module.normalize == "sparsemax" else scores.softmax(0)
                weights[b, t, allowed] = a
                c = a @ context[b, allowed]
            y = module.linear_out(torch.cat((c, h)))
            out[b, t] = y if module.activation is None else y.tanh()
    return out, weights


def score(module, h, m, s):
    match module.score:
        case "dot":
            value = h @ m
        case "general":
            value = h @ (module.linear_in.weight.T @ m)
        case "concat":
            value = module.v.weight[0] @ torch.tanh(module.linear_query(h) + module.linear_context(m))
        case _:
            value = module.linear_location.weight[s] @ h
    return value * (module.score_scale if module.scale else 1)


def project_to_simplex(z):
    """By bisection of tau."""
    low, high = z.max() - 1, z.max()
    for _ in range(80):
        tau = (low + high) / 2
        low, high = (tau, high) if (z - tau).clamp_min(0).sum() > 1 else (low, tau)
    return (z - low).clamp_min(0)


@pytest.mark.parametrize("options", SCORES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(("n", "m"), [(3, 7), (7, 3)])
def test_scores_equal_the_equations(options, n, m):
    module = make(**options)
    x, context = torch.randn(2, n, 6).double(), torch.randn(2, m, options.get("context_dim", 6)).double()
    keys, pairs = torch.tensor([[True] * m, [False, *[True] * (m - 1)]]), torch.rand(n, m) > 0.3
    pairs[1] = False
    out, weights = module(x, context, key_mask=keys, attn_mask=pairs, return_weights=True)
    expected = by_pairs(module, x, context, keys[:, None] & pairs)
    assert torch.allclose(out, expected[0], atol=1e-10)
    assert torch.allclose(weights, expected[1], atol=1e-10)
    assert torch.equal(module(x, context, key_mask=keys, attn_mask=pairs[None, None]), out)
    rows = regard.attend_rows(module, x, queries=[2, 0], context=context, key_mask=keys, attn_mask=pairs)
    assert torch.allclose(rows, weights[:, [2, 0]], atol=1e-12)


@pytest.mark.parametrize("options", SCORES, ids=lambda o: "-".join(map(str, o.values())))
def test_one_step_is_a_row_of_all(options):
    module, x, context = make(**options), torch.randn(2, 3, 6).double(), torch.randn(2, 7, options.get("context_dim", 6)).double()
    mask = torch.rand(2, 7) > 0.3
    out, weights = module(x, context, key_mask=mask, return_weights=True)
    one, row = module(x[:, 1], context, key_mask=mask, return_weights=True)
    assert torch.allclose(one, out[:, 1], atol=1e-12)
    assert torch.allclose(row, weights[:, 1], atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_parts_change_nothing(monkeypatch, dropout):
    module = make(score="concat", dropout=dropout).train()
    x, context = (torch.randn(2, n, 6).double().requires_grad_() for n in (9, 5))
    found = []
    for floats, kept, inner in ((2**22, 2**24, 2**18), (40, 2**24, 40), (40, 0, 7)):
        monkeypatch.setattr(luong, "FLOATS", floats)
        monkeypatch.setattr(luong, "KEPT", kept)
        monkeypatch.setattr(pieces, "CPU", inner)
        torch.manual_seed(1)
        out = module(x, context, key_mask=torch.tensor([[True] * 5, [True, False] * 2 + [True]]))
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, context, *module.parameters()])])
    for other in found[2:] if dropout else found[1:]:  # parts draw in another order, but the second pass over them as the first
        for a, b in zip(other, found[1 if dropout else 0], strict=True):
            assert torch.allclose(a, b, atol=1e-10)


def test_additive_scores_equal_the_reference(monkeypatch):
    monkeypatch.setattr(pieces, "CPU", 50)
    tensors = [torch.randn(shape).double().requires_grad_() for shape in ((2, 5, 4), (2, 30, 4), (4,))]
    assert torch.autograd.gradcheck(additive_scores, tensors)
    with use_impl("reference"):
        expected = additive_scores(*tensors)
    assert torch.allclose(additive_scores(*tensors), expected)
    several = torch.func.vmap(additive_scores, in_dims=(None, None, 0))(tensors[0], tensors[1], torch.stack((tensors[2], -tensors[2])))
    assert torch.allclose(several, torch.stack((expected, -expected)))


def test_additive_scores_store_no_triples():
    q, k = torch.randn(2, 200, 64).requires_grad_(), torch.randn(2, 300, 64).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        additive_scores(q, k, torch.randn(64))
    assert max(kept) <= 2 * 300 * 64


def test_sparsemax():
    z, mask = 2 * torch.randn(4, 9).double().requires_grad_(), torch.rand(4, 9) > 0.3
    mask[0] = False
    weights = sparsemax(z, mask)
    assert (weights[0] == 0).all()
    for row, allowed, found in zip(z[1:], mask[1:], weights[1:], strict=True):
        assert torch.allclose(found[allowed], project_to_simplex(row[allowed]), atol=1e-12)
        assert (found[~allowed] == 0).all()
    assert torch.autograd.gradcheck(lambda t: sparsemax(t, mask), z.detach().requires_grad_())
    assert torch.equal(sparsemax(torch.tensor([1e4, 1e4, -1e4])), torch.tensor([0.5, 0.5, 0.0]))
    assert torch.allclose(sparsemax(torch.full((70000,), 1e3)).sum(), torch.ones(()))


def test_half_precision_scores_do_not_overflow():
    module = regard.create("luong_global", 1000, score="dot").half()
    x = torch.full((1, 2, 1000), 10.0, dtype=torch.float16)  # scores of 100 000, above the largest half
    x[:, 1] *= 0.5
    out, weights = module(x, return_weights=True)
    assert out.isfinite().all()
    assert torch.equal(weights[0, 0], torch.tensor([1.0, 0.0], dtype=torch.float16))


def test_positions_beyond_max_len_get_nothing():
    module, context = make(score="location", max_len=4), torch.randn(2, 7, 6).double()
    x, changed = torch.randn(2, 3, 6).double(), context.clone()
    changed[:, 4:] = 100.0
    assert torch.equal(module(x, context), module(x, changed))
    assert (module(x, context, return_weights=True)[1][..., 4:] == 0).all()


def test_the_factor_loads_under_tensorflows_name():
    module = make(scale=True)
    state = {("attention_g" if name == "score_scale" else name): t for name, t in module.state_dict().items()}
    assert torch.equal(load_official(make(scale=True), state).score_scale, module.score_scale)


def test_long_sources_store_no_weights():
    module, x = regard.create("luong_global", 8), torch.randn(1, 600, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(x)
    assert max(kept) < 600 * 600
    with use_impl("reference"):
        c = (module.linear_in(x) @ x.mT).softmax(-1) @ x
        assert torch.allclose(module(x), module.linear_out(torch.cat((c, x), -1)).tanh(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "dot", "context_dim": 5}, "context_dim=5"),
        ({"score": "location"}, "max_len=None"),
        ({"score": "mlp"}, "score='mlp'"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"normalize": "max"}, "normalize='max'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(**options)


def test_wrong_calls():
    module, x = make(), torch.randn(2, 3, 6).double()
    with pytest.raises(RegardError, match=r"one step .* needs a context"):
        module(x[:, 0])
    with pytest.raises(RegardError, match="0 positions"):
        module(x, x[:, :0])
    with pytest.raises(RegardError, match="attn_mask"):
        module(x, attn_mask=torch.ones(2, 4, 3, 3, dtype=torch.bool))
    with pytest.raises(RegardError, match="attn_mask"):
        module(x, attn_mask=torch.ones(2, 4, dtype=torch.bool))
