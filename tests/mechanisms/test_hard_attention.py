"""Hard attention: modes, draws, masks, the learning rule."""

import math

import pytest
import torch

import regard
from regard.errors import RegardError, RegardTypeError
from regard.ops.attention_losses import hard_attention_loss

MASK = torch.tensor([[True] * 7, [False] * 3 + [True, False, True, True]])


def make(**options):
    torch.manual_seed(0)
    module = regard.create("hard_attention", 6, 5, **options).double().eval()
    for parameter in module.parameters():
        parameter.data += torch.randn_like(parameter)
    return module


def pair(b=2, t=3, n=7):
    return torch.randn(b, t, 5).double(), torch.randn(b, n, 6).double()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_weights_and_mean_are_those_of_soft_attention():
    module, (query, context) = make(temperature=2.0), pair()
    soft = regard.create("soft_attention", 6, 5).double()
    soft.load_state_dict(module.state_dict())
    soft.attention.full_att.weight.data.mul_(2.0)
    z, weights, indices = module(query, context, key_mask=MASK, mode="expected")
    expected = soft(query, context, key_mask=MASK)
    assert indices is None
    assert torch.allclose(z, expected[0], atol=1e-12) and torch.allclose(weights, expected[1], atol=1e-12)
    assert torch.allclose(module.log_weights(query, context, key_mask=MASK).exp(), weights, atol=1e-12)


@pytest.mark.parametrize("gate", ["scalar", "vector", None])
def test_a_location_given_is_the_one_taken(gate):
    module, (query, context) = make(gate=gate), pair()
    indices = torch.tensor([[6, 0, 2], [3, 5, 5]])
    z, _, found = module(query, context, key_mask=MASK, mode="sample", indices=indices)
    rows = torch.stack([context[b][indices[b]] for b in range(2)])
    assert torch.allclose(z, rows if gate is None else module.f_beta(query).sigmoid() * rows, atol=1e-12)
    assert torch.equal(found, indices)
    assert torch.equal(module(query, context, key_mask=MASK, indices=indices)[0], z)  # without a mode too
    assert torch.equal(module(query, context, key_mask=MASK, mode="semi", use_sample=True, indices=indices)[0], z)
    assert module(query, context, key_mask=MASK, mode="semi", use_sample=False, indices=indices)[2] is None


@pytest.mark.parametrize("mode", ["sample", "argmax", "expected"])
def test_a_step_with_the_cache_is_a_row_of_all_steps(mode):
    module, (query, context) = make(), pair()
    indices = torch.tensor([[6, 0, 2], [3, 5, 5]]) if mode == "sample" else None
    whole = module(query, context, key_mask=MASK, mode=mode, indices=indices)
    logs = module.log_weights(query, context, key_mask=MASK)
    for t in range(3):
        now = None if indices is None else indices[:, t]
        step = module(query[:, t], context, key_mask=MASK, mode=mode, cache=module.project(context), indices=now)
        for one, all_ in zip(step, whole, strict=True):
            assert all_ is None if one is None else torch.allclose(one.double(), all_[:, t].double(), atol=1e-12)
        assert torch.allclose(module.log_weights(query[:, t], context, key_mask=MASK).exp(), logs[:, t].exp(), atol=1e-12)


def test_modes_by_default():
    module, (query, context) = make(), pair()
    z, weights, indices = module(query, context)
    assert torch.equal(indices, weights.argmax(-1))
    assert torch.equal(z, module(query, context, mode="argmax")[0])
    module.train()
    tosses = [module(query, context, generator=generator(seed))[2] is not None for seed in range(400)]
    assert 160 < sum(tosses) < 240
    rare = make(semi_sampling=0.1).train()
    assert sum(rare(query, context, generator=generator(seed))[2] is not None for seed in range(400)) < 70
    assert all(make(semi_sampling=1.0).train()(query, context)[2] is not None for _ in range(20))


def test_draws_are_those_of_the_weights_and_never_masked():
    module, (query, context) = make(), pair()
    query = query[:, :1].expand(2, 20_000, 5)
    _, weights, indices = module(query, context, key_mask=MASK, mode="sample", generator=generator())
    for b in range(2):
        expected, found = weights[b, 0], torch.bincount(indices[b], minlength=7) / 20_000
        bound = 4 * (expected * (1 - expected) / 20_000).sqrt()
        assert ((found - expected).abs() <= bound).all()  # a masked location: exactly never
        assert (found[~MASK[b]] == 0).all()
    again = module(query, context, key_mask=MASK, mode="sample", generator=generator())[2]
    assert torch.equal(again, indices)
    assert not torch.equal(module(query, context, key_mask=MASK, mode="sample", generator=generator(1))[2], indices)


def test_a_draw_differs_from_step_to_step():
    module, (query, context) = make(), pair()
    module.attention.full_att.weight.data.zero_()
    assert module(query, context, mode="sample", generator=generator())[2].unique().numel() > 1


def test_a_sample_with_all_locations_masked_has_none():
    module, (query, context) = make(), pair()
    mask = MASK.clone()
    mask[1] = False
    context.requires_grad_()
    for mode in ("sample", "argmax"):
        z, weights, indices = module(query, context, key_mask=mask, mode=mode)
        assert (indices[1] == -1).all() and (z[1] == 0).all() and (weights[1] == 0).all() and (indices[0] >= 0).all()
        assert torch.equal(module(query, context, key_mask=mask, indices=indices)[0], z)
        logs = module.log_weights(query, context, key_mask=mask)
        for by in ({"weights": weights}, {"weights": None, "log_weights": logs}):
            loss, _ = hard_attention_loss(indices=indices, cost=torch.ones(2, 3), baseline=0.0, **by)
            (z.sum() + loss).backward(retain_graph=True)
            assert context.grad.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())
    assert (module(query, context, key_mask=mask, mode="expected")[0][1] == 0).all()


def test_no_gradient_passes_a_draw():
    module, (query, context) = make(gate=None), pair()
    for mode in ("sample", "argmax"):
        z, _, indices = module(query.requires_grad_(), context.requires_grad_(), mode=mode)
        (gradient,) = torch.autograd.grad(z.sum(), context)
        taken = torch.zeros(2, 7).double().scatter_add(1, indices, torch.ones(2, 3).double())
        assert torch.equal(gradient, taken[..., None].expand_as(gradient))
        assert z.grad_fn is not None and torch.autograd.grad(module(query, context, mode=mode)[0].sum(), query, allow_unused=True)[0] is None


def test_the_annotations_are_gathered_not_multiplied():
    from torch.utils.flop_counter import FlopCounterMode

    module, (query, context) = make(), pair()
    counts = []
    for mode in ("sample", "expected"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(query, context, mode=mode)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 2 * 3 * 7 * 6


def by_rule(weights, indices, cost, baseline, mask, scale, entropy, mask_steps, sum_cost):
    """d loss / d weights, as the paper's rule reads."""
    out = torch.zeros_like(weights)
    for n in range(weights.shape[0]):
        c = cost[n] * mask[n]
        mean = c.sum() / (mask[n].sum() if mask_steps else len(c))
        for t in range(weights.shape[1]):
            if mask_steps and not mask[n, t]:
                continue
            i = indices[n, t]
            out[n, t] = entropy * (weights[n, t].log() + 1)
            out[n, t, i] += scale * ((baseline - mean) * -1 if sum_cost else c[t]) / weights[n, t, i]
    return out


@pytest.mark.parametrize("mask_steps", [False, True])
@pytest.mark.parametrize("sum_cost", [False, True])
def test_the_gradient_is_the_rule(mask_steps, sum_cost):
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 5).double().requires_grad_()
    weights, cost = scores.softmax(-1), torch.rand(3, 4).double()
    indices, mask = torch.randint(0, 5, (3, 4)), torch.tensor([[True] * 4, [True] * 3 + [False], [True, False, False, False]])
    options = {"time_mask": mask, "reward_scale": 0.3, "entropy_weight": 0.05, "mask_steps": mask_steps, "sum_cost": sum_cost}
    loss, new = hard_attention_loss(weights, indices, cost, 0.7, **options)
    expected = by_rule(weights.detach(), indices, cost, 0.7, mask, 0.3, 0.05, mask_steps, sum_cost)
    assert torch.allclose(torch.autograd.grad(loss, weights, retain_graph=True)[0], expected, atol=1e-12)
    mean = (cost * mask).sum() / (mask.sum() if mask_steps else 12)
    assert torch.allclose(new, 0.9 * 0.7 + 0.1 * mean, rtol=1e-12)
    same, _ = hard_attention_loss(None, indices, cost, torch.tensor(0.7, dtype=torch.float64), log_weights=scores.log_softmax(-1), **options)
    assert torch.allclose(same, loss)
    assert torch.allclose(*(torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (same, loss)), atol=1e-12)


def test_cost_and_baseline_are_constants():
    weights, cost, baseline = torch.rand(1, 2, 3).requires_grad_(), torch.rand(1, 2).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    loss, new = hard_attention_loss(weights, torch.zeros(1, 2, dtype=torch.long), cost, baseline)
    assert torch.autograd.grad(loss, (cost, baseline), allow_unused=True) == (None, None)
    assert not new.requires_grad


def test_better_than_usual_is_drawn_more_often():
    scores = torch.zeros(1, 1, 3, requires_grad=True)
    loss, _ = hard_attention_loss(scores.softmax(-1), torch.tensor([[1]]), torch.tensor([[0.2]]), 1.0, entropy_weight=0.0)
    loss.backward()
    assert scores.grad[0, 0, 1] < 0 < scores.grad[0, 0, 0]


def test_after_an_expected_context_the_entropy_alone_learns():
    weights = torch.rand(2, 3, 4).double().softmax(-1).requires_grad_()
    loss, new = hard_attention_loss(weights, None, torch.ones(2, 3), 0.0)
    assert torch.allclose(loss, 0.002 * (weights * weights.log()).sum())
    assert torch.allclose(new, torch.tensor(0.1).double())


def test_weights_that_round_to_zero():
    scores = torch.tensor([[[0.0, -200.0, 3.0]]], requires_grad=True)
    indices, cost = torch.tensor([[1]]), torch.ones(1, 1)
    loss, _ = hard_attention_loss(scores.softmax(-1), indices, cost, 0.0)
    assert loss.isfinite() and torch.autograd.grad(loss, scores)[0].isfinite().all()
    loss, _ = hard_attention_loss(None, indices, cost, 0.0, entropy_weight=0.0, log_weights=scores.log_softmax(-1))
    assert torch.allclose(loss, torch.tensor(-0.1 * (203 + math.log1p(math.exp(-3.0)))))
    assert torch.autograd.grad(loss, scores)[0][0, 0, 1] == pytest.approx(0.1)


def test_wrong_options():
    for options, words in [({"temperature": 0.0}, "temperature=0.0"), ({"semi_sampling": 1.5}, "semi_sampling=1.5"), ({"gate": "x"}, "gate='x'")]:
        with pytest.raises(RegardError, match=words):
            make(**options)


def test_wrong_calls():
    module, (query, context) = make(), pair()
    good = torch.full((2, 3), 5)
    for bad, words in [
        ({"mode": "hard"}, "mode='hard'"),
        ({"indices": good + 2}, r"\[7, 7.* 7 locations"),
        ({"indices": good - 7}, r"\[-2"),
        ({"indices": good - 6}, "-1 is only for"),
        ({"indices": good - 1, "key_mask": MASK}, r"indices .*\[4, 4, 4\].* masked"),
        ({"indices": good[:, :2]}, r"\(2, 3\), got \(2, 2\)"),
        ({"indices": good, "generator": generator()}, "indices or a generator"),
        ({"mode": "sample", "use_sample": True}, "use_sample=True"),
        ({"key_mask": MASK[:, :6]}, "key_mask"),
        ({"query": query[..., :4]}, "query_dim=5"),
    ]:
        with pytest.raises(RegardError, match=words):
            module(**{"query": query, "context": context, **bad})
    with pytest.raises(RegardTypeError, match=r"indices.*int32"):
        module(query, context, indices=good.int())


def test_wrong_calls_of_the_loss():
    weights, indices, cost = torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), torch.rand(2, 3)
    for bad, words in [
        ({"log_weights": weights}, "both"),
        ({"weights": None}, "neither"),
        ({"weights": weights[0]}, "2 axes"),
        ({"indices": indices + 4}, "4 locations"),
        ({"indices": indices[:, :2]}, "indices must have shape"),
        ({"cost": cost[:, :2]}, "cost must have shape"),
        ({"baseline": cost}, "one number"),
        ({"time_mask": torch.ones(2, 4, dtype=torch.bool)}, "time_mask"),
    ]:
        with pytest.raises(RegardError, match=words):
            hard_attention_loss(**{"weights": weights, "indices": indices, "cost": cost, "baseline": 0.0, **bad})
    with pytest.raises(RegardTypeError, match="baseline"):
        hard_attention_loss(weights, indices, cost, "0")


@pytest.mark.parametrize("mode", ["expected", "sample"])
@pytest.mark.parametrize("way", ["module", "autocast"])
def test_half_precision(mode, way):
    """Where no location is the likeliest one's by a hair: the mean, and locations that are given."""
    module, (query, context) = make(gate="vector").float(), [t.float() for t in pair()]
    options = {"mode": mode} | ({"indices": torch.tensor([[0, 3, 6], [2, 2, 5]])} if mode == "sample" else {})
    exact = module(query, context, **options)[:2]
    if way == "module":
        half = module.bfloat16()(query.bfloat16(), context.bfloat16(), **options)[:2]
    else:
        with torch.autocast("cpu", torch.bfloat16):
            half = module(query, context, **options)[:2]
    for found, wanted in zip(half, exact, strict=True):
        assert (found.float() - wanted).abs().max() < 6e-2 * wanted.abs().max()
