"""Head gates: draws, penalties, closed heads, and the gates folded into the output projection."""

import math

import pytest
import torch

import regard
from regard.errors import RegardError


def gate(num_heads: int = 4, logits: list[float] | None = None, **options):
    torch.manual_seed(0)
    module = regard.create("head_gate", num_heads, **options)
    if logits is not None:
        module.log_a.data.copy_(torch.tensor(logits).view(1, -1, 1, 1))
    return module


def by_hand(u: float, a: float, t: float, low: float, high: float, eps: float) -> float:
    u = eps + (1 - 2 * eps) * u
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / t))
    return min(max(s * (high - low) + low, 0.0), 1.0)


@pytest.mark.parametrize("local", [False, True])
def test_training_gates_are_the_equations(local):
    module = gate(3, [-1.0, 0.2, 2.0], temperature=0.5, stretch=(-0.3, 1.2), eps=1e-3, local_rep=local).train()
    x = torch.randn(2, 3, 5, 4)
    noise = torch.rand(x.shape if local else (1, 3, 1, 1)).clamp(0.01, 0.99)
    out, gates = module(x, noise=noise, return_gates=True)
    logits = module.log_a.expand_as(noise).flatten().tolist()
    expected = [by_hand(u, a, 0.5, -0.3, 1.2, 1e-3) for u, a in zip(noise.flatten().tolist(), logits, strict=True)]
    torch.testing.assert_close(gates, torch.tensor(expected).view(noise.shape), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, x * gates)
    torch.testing.assert_close(module.gates(noise), gates)


def test_share_of_open_draws_is_p_open():
    module = gate(3, [-2.0, 0.0, 1.0], local_rep=True).train()
    gates = module(torch.ones(1, 3, 300, 300), return_gates=True)[1]
    torch.testing.assert_close((gates > 0).float().mean((0, 2, 3)), module.p_open().flatten(), atol=4e-3, rtol=0)


def test_draws_are_shared_by_the_batch_unless_local():
    x = torch.ones(6, 4, 5, 3)
    out = gate().train()(x)
    assert torch.equal(out, out[:1, :, :1, :1].expand_as(x))
    assert len(gate(local_rep=True).train()(x).unique()) > 20


def test_evaluation_is_not_divided_by_the_temperature_and_closes_at_a_twelfth():
    edge = math.log(11)
    module = gate(5, [-edge - 0.01, -edge + 0.01, 0.3, edge - 0.01, edge + 0.01]).eval()
    z = module.gates().flatten()
    assert z[0] == 0 and 0 < z[1] < 0.01 and 0.99 < z[3] < 1 and z[4] == 1
    torch.testing.assert_close(z[2], torch.sigmoid(torch.tensor(0.3)) * 1.2 - 0.1)
    assert module.open_heads().tolist() == [False, True, True, True, True]
    torch.testing.assert_close(module.sparsity_rate(), torch.tensor(0.8))
    assert torch.equal(module.train().open_heads(), module.eval().open_heads())


def test_hard_gates_are_bits_with_the_gradient_of_soft_ones():
    noise, x = torch.rand(1, 4, 1, 1), torch.randn(2, 4, 5, 3)
    slopes = []
    for hard in (False, True):
        module = gate(4, [-0.1, 0.1, 0.3, -0.2], temperature=2.0, hard=hard).train()
        out, gates = module(x, noise=noise, return_gates=True)
        out.sum().backward()
        slopes.append(module.log_a.grad)
        assert not hard or set(gates.flatten().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(*slopes)
    assert bool((slopes[0] != 0).all())


@pytest.mark.parametrize("local", [False, True])
def test_penalty(local):
    module, x = gate(4, l0_penalty=0.5, l2_penalty=0.1, local_rep=local), torch.randn(2, 4, 5, 3)
    p = module.p_open().expand(x.shape if local else (1, 4, 1, 1))
    expected = 0.5 * p.sum() + (0.5 * 0.1 * p * x.square().sum()).mean()
    torch.testing.assert_close(module.penalty(x), expected)
    penalty, p_open = module(x, return_penalty=True)[1:]
    assert torch.equal(penalty, module.penalty(x)) and torch.equal(p_open, module.p_open())
    with pytest.raises(RegardError, match="values"):
        module.penalty()


def test_penalty_alone_closes_the_heads():
    module = gate(6, init="open").train()
    assert module.eval().sparsity_rate() == 1 and torch.equal(module.gates(), torch.ones(1, 6, 1, 1))
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    for _ in range(100):
        optimizer.zero_grad()
        module.penalty().backward()
        optimizer.step()
    assert not module.open_heads().any()


@pytest.mark.parametrize("bias", [False, True])
def test_folded_into_the_projection_is_the_same(bias):
    module, linear = gate(4, [-3.0, 0.5, 3.0, -0.5]).eval(), torch.nn.Linear(12, 7, bias=bias).double()
    x, before = torch.randn(2, 4, 5, 3, dtype=torch.float64), linear.weight.clone()

    def merged(t):
        return t.transpose(1, 2).flatten(2)

    folded = module.fold_into(linear)
    torch.testing.assert_close(folded(merged(x)), linear(merged(module(x))))
    assert torch.equal(linear.weight, before) and bool((folded.weight[:, :3] == 0).all()) and folded.weight.requires_grad
    with pytest.raises(RegardError, match="num_heads=4"):
        module.fold_into(torch.nn.Linear(10, 7))


def test_half_precision_gates_are_computed_in_float32():
    module = gate(4, [-1.0, 0.5, 2.0, 0.0])
    x, noise = torch.ones(1, 4, 2, 2), torch.tensor([0.999, 0.4, 0.6, 0.9985]).view(1, 4, 1, 1)
    exact = module(x, noise=noise)
    half, gates = module.bfloat16()(x.bfloat16(), noise=noise, return_gates=True)
    assert half.dtype == torch.bfloat16 and gates.dtype == torch.float32
    torch.testing.assert_close(half.float(), exact, atol=1e-2, rtol=0)


def test_starts():
    official, opened = gate(1200), gate(4, init="open")
    bound = (3 / 1200) ** 0.5
    assert 0.97 * bound < official.log_a.abs().max() <= bound
    assert torch.equal(opened.log_a, torch.full((1, 4, 1, 1), 2.5))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"stretch": (0.0, 1.1)}, "stretch"),
        ({"stretch": (-0.1, 1.0)}, "stretch"),
        ({"eps": 0.5}, "eps=0.5"),
        ({"init": "closed"}, "init='closed'"),
    ],
)
def test_wrong_options_are_answered(options, text):
    with pytest.raises(RegardError, match=text):
        regard.create("head_gate", **{"num_heads": 4, **options})


@pytest.mark.parametrize(
    ("local", "noise", "text"),
    [
        (False, torch.full((1, 3, 1, 1), 0.5), r"noise \(1, 3, 1, 1\)"),
        (False, torch.full((2, 4, 5, 3), 0.5), r"noise \(2, 4, 5, 3\)"),
        (True, torch.full((1, 4, 1, 1), 0.5), r"noise \(1, 4, 1, 1\)"),
        (False, torch.zeros(1, 4, 1, 1), r"\(0, 1\)"),
        (False, torch.ones(1, 4, 1, 1), r"\(0, 1\)"),
        (False, torch.ones(1, 4, 1, 1, dtype=torch.long), "int64"),
    ],
)
def test_wrong_noise_is_answered(local, noise, text):
    module, x = gate(local_rep=local).train(), torch.randn(2, 4, 5, 3)
    with pytest.raises(RegardError, match=text):
        module(x, noise=noise)
    module.eval()(x, noise=noise)  # not used in evaluation


def test_gates_of_elements_need_their_draws():
    with pytest.raises(RegardError, match="shape of x"):
        gate(local_rep=True).train().gates()
