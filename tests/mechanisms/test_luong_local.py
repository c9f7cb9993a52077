"""Luong local: windows against the equations, the ways of computing them, lengths, steps, costs."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.errors import RegardError
from regard.ops._dispatch import explain, use_impl
from regard.ops.aligned_window import gather_runs, run_dots, run_sums

WAYS = [{"luong_local": "dense"}, *({"luong_local": "gathered", "aligned_window": way} for way in ("bands", "gathered", "reference"))]
CASES = [
    {"score": "dot"},
    {"score": "general", "context_dim": 5, "sigma": 0.7},
    {"score": "concat", "context_dim": 5, "score_bias": True, "out_bias": True},
    {"score": "dot", "mode": "monotonic"},
    {"score": "general", "context_dim": 5, "mode": "monotonic", "activation": None},
]


def make(**options):
    torch.manual_seed(0)
    module = regard.create("luong_local", 6, **{"window": 2, **options}).double().eval()
    for parameter in module.parameters():
        parameter.data += 0.6 * torch.randn_like(parameter)
    return module


def by_pairs(module, x, context, lengths, allowed, position=0):
    """Position by position, as the definition reads."""
    outs, positions, window = [], [], module.window
    weights = torch.zeros(x.shape[0], x.shape[1], context.shape[1], dtype=x.dtype)
    for b, length in enumerate(lengths):
        for t, h in enumerate(x[b]):
            if module.mode == "monotonic":
                p = torch.tensor(float(min(t + position, length - 1)), dtype=x.dtype)
            else:
                p = length * torch.sigmoid(module.v_p.weight[0] @ torch.tanh(module.linear_p(h)))
            seen = [s for s in range(length) if p - window <= s <= p + window and allowed[b, t, s]]
            c = context.new_zeros(context.shape[2])
            if seen:
                a = torch.stack([score(module, h, context[b, s]) for s in seen]).softmax(0)
                if module.mode == "predictive":
                    a = a * torch.stack([torch.exp(-((s - p) ** 2) / (2 * module.sigma**2)) for s in seen])
                weights[b, t, seen] = a.detach()
                c = a @ context[b, seen]
            y = module.linear_out(torch.cat((c, h)))
            outs.append(y if module.activation is None else y.tanh())
            positions.append(p.detach())
    return torch.stack(outs).view(x.shape), weights, torch.stack(positions).view(x.shape[:2])


def score(module, h, m):
    if module.score == "concat":
        return module.v.weight[0] @ torch.tanh(module.linear_query(h) + module.linear_context(m))
    return h @ m if module.score == "dot" else module.linear_in(h) @ m


def inputs(module, n, m):
    return torch.randn(3, n, 6).double().requires_grad_(), torch.randn(3, m, module.context_dim).double().requires_grad_()


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(w.values()))
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(("n", "m"), [(4, 13), (9, 6)])
def test_windows_equal_the_equations(options, way, n, m):
    module, lengths = make(**options), (m, m - 2, 0)
    x, context = inputs(module, n, m)
    keys, pairs = torch.arange(m) < torch.tensor(lengths)[:, None], torch.rand(3, n, m) > 0.2
    pairs[:, 1] = False
    masks = {"key_mask": keys, "attn_mask": pairs}
    expected = by_pairs(module, x, context, lengths, pairs)
    with use_impl(**way):
        found = module(x, context, **masks, return_weights=True)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-10)
        g = torch.randn_like(found[0])
        leaves = [x, context, *module.parameters()]
        gradients = torch.autograd.grad(found[0], leaves, g)
        for a, b in zip(gradients, torch.autograd.grad(expected[0], leaves, g), strict=True):
            assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("impl", ["bands", "gathered"])
def test_runs_equal_the_reference_and_are_each_others_gradients(impl):
    q, k, w = (torch.randn(shape).double().requires_grad_() for shape in ((2, 70, 3), (2, 9, 3), (2, 70, 4)))
    start = torch.randint(-6, 12, (2, 70))
    for function in (lambda: run_dots(q, k, start, 4), lambda: run_sums(w, k, start)):
        with use_impl("reference"):
            expected = function()
        with use_impl(aligned_window=impl):
            assert torch.allclose(function(), expected, atol=1e-12)
    few = [t[:, :5].detach().requires_grad_() for t in (q, w)]
    with use_impl(aligned_window=impl):
        for function, own in ((lambda a, b: run_dots(a, b, start[:, :5], 4), few[0]), (lambda a, b: run_sums(a, b, start[:, :5]), few[1])):
            assert torch.autograd.gradcheck(function, (own, k))
            assert torch.autograd.gradgradcheck(function, (own, k))


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_gradients_of_single_samples_by_function_transforms(options):
    module = make(window=1, **options)
    x, context = inputs(module, 4, 13)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(p, h, m):
        return torch.func.functional_call(module, p, (h[None], m[None])).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x.detach(), context.detach())
    expected = torch.autograd.grad(module(x, context).square().sum(), list(module.parameters()))
    for a, b in zip(found.values(), expected, strict=True):
        assert torch.allclose(a.sum(0), b, atol=1e-10)


def test_gathered_rows():
    x, start = torch.randn(2, 9, 3), torch.tensor([[0, 4], [5, 2]])
    assert torch.equal(gather_runs(x, start, 3)[1, 0], x[1, 5:8])


def test_predicted_positions_need_to_know_where_the_source_ends():
    module = make()
    x, context = inputs(module, 4, 7)
    holes = torch.tensor([[True] * 7, [True, False, *[True] * 5], [True] * 7])
    with pytest.raises(RegardError, match="True first and False after"):
        module(x, context, key_mask=holes)
    out, weights, p = make(mode="monotonic")(x, context, key_mask=holes, return_weights=True)
    assert out.isfinite().all()
    assert (weights[1, :, 1] == 0).all()
    assert p[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("m", [7, 40])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_padding_is_not_felt(options, m):
    module = make(**options)
    x, context = inputs(module, 4, m)
    padded = torch.cat((context, torch.full_like(context[:, :5], 1e3)), 1).detach().requires_grad_()
    mask = torch.arange(m + 5).expand(3, -1) < m
    out = module(x, padded, key_mask=mask)
    assert torch.allclose(out, module(x, context), atol=1e-12)
    (g,) = torch.autograd.grad(out.square().sum(), padded)
    assert (g[:, m:] == 0).all()


@pytest.mark.parametrize("mode", ["monotonic", "predictive"])
def test_steps_equal_all_at_once(mode):
    module = make(mode=mode)
    x, context = inputs(module, 6, 30)
    whole = module(x, context, return_weights=True)
    for t in range(6):
        for a, b in zip(module(x[:, t], context, position=t, return_weights=True), whole, strict=True):
            assert torch.allclose(a, b[:, t], atol=1e-12)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_a_step_costs_the_same_on_any_source(score):
    module, counts = regard.create("luong_local", 16, score=score).eval(), []
    for s in (100, 10_000):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(torch.randn(2, 16), torch.randn(2, s, 16))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_the_way_is_chosen_by_size():
    module, x = regard.create("luong_local", 16), torch.randn(2, 16)
    chosen = [[(c.op, c.impl) for c in explain(module, x, torch.randn(2, s, 16))] for s in (42, 43)]
    assert chosen[0] == [("luong_local", "dense")]
    assert ("luong_local", "gathered") in chosen[1]
    many = explain(module, torch.randn(2, 300, 16), torch.randn(2, 300, 16))
    assert ("aligned_window", "gathered") in [(c.op, c.impl) for c in many]
    assert ("aligned_window", "bands") in [(c.op, c.impl) for c in explain(module, torch.randn(4, 300, 16))]


def test_positions_are_exact_in_half_precision():
    module = regard.create("luong_local", 8, mode="monotonic", window=1).bfloat16()
    x = torch.randn(1, 5001, 8, dtype=torch.bfloat16)
    _, weights, p = module(x, return_weights=True)
    assert p.dtype == torch.float32
    assert p[0, -1] == 5000
    assert weights[0, 4000].nonzero().flatten().tolist() == [3999, 4000, 4001]


def test_the_gradient_reaches_the_position_through_the_gaussian_alone():
    module = make(score="dot", sigma=1e6)
    x, context = inputs(module, 4, 13)
    g = torch.autograd.grad(module(x, context).sum(), module.linear_p.weight)[0]
    assert 0 < g.abs().max() < 1e-8


def test_dropout_acts_in_training_alone():
    for m in (7, 40):
        module = make(dropout=0.5)
        x, context = inputs(module, 4, m)
        assert torch.equal(module(x, context), make()(x, context))
        module.train()
        assert not torch.allclose(module(x, context), module(x, context))


def test_default_sigma_is_half_the_window():
    assert regard.create("luong_local", 4).sigma == 5 and math.isclose(regard.create("luong_local", 4, window=3).sigma, 1.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "location"}, "score='location'"),
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"mode": "global"}, "mode='global'"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(**options)
