"""Soft attention: the definition location by location, the cache, masks, both namings, the regulariser, what is stored."""

import pytest
import torch

import regard
from regard.errors import RegardError, RegardTypeError
from regard.official import load_official, to_official
from regard.ops._dispatch import use_impl
from regard.ops.additive_scores import additive_scores, pieces
from regard.ops.attention_losses import doubly_stochastic_loss

OPTIONS = [
    {},
    {"activation": "relu", "gate": "vector", "attn_dim": 4},
    {"gate": None, "attn_layers": 3, "attn_dim": 7},
]


def make(**options):
    torch.manual_seed(0)
    module = regard.create("soft_attention", 6, 5, **options).double().eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def pair(b=2, t=3, n=7):
    return torch.randn(b, t, 5).double(), torch.randn(b, n, 6).double()


def by_locations(module, h, annotations, allowed):
    """One state of one sample, as the definition reads."""
    layers, f = module.attention, torch.tanh if module.activation == "tanh" else torch.relu
    scores = []
    for i in allowed:
        p = layers.encoder_att(annotations[i])
        for at in range(1, module.attn_layers):
            p = getattr(layers, f"encoder_att_{at}")(p).tanh()
        scores.append(layers.full_att(f(p + layers.decoder_att(h)))[0])
    weights = annotations.new_zeros(len(annotations))
    if scores:
        weights[allowed] = torch.stack(scores).softmax(0)
    z = weights @ annotations
    return (z if module.gate is None else module.f_beta(h).sigmoid() * z), weights


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_definition(options):
    module, (query, context) = make(**options), pair()
    mask = torch.rand(2, 7) > 0.4
    z, weights = module(query, context, key_mask=mask)
    for b in range(2):
        for t in range(3):
            expected = by_locations(module, query[b, t], context[b], mask[b].nonzero()[:, 0])
            assert torch.allclose(z[b, t], expected[0], atol=1e-12)
            assert torch.allclose(weights[b, t], expected[1], atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_with_the_cache_is_a_row_of_all_steps(options):
    module, (query, context) = make(**options), pair()
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    z, weights = module(query, context, key_mask=mask)
    cache = module.project(context)
    for t in range(3):
        one, row = module(query[:, t], context, key_mask=mask, cache=cache)
        assert torch.allclose(one, z[:, t], atol=1e-12)
        assert torch.allclose(row, weights[:, t], atol=1e-12)


def test_the_cache_is_what_is_used_and_learns():
    module, (query, context) = make(), pair()
    cache = module.project(context)
    assert not torch.allclose(module(query, context, cache=cache + torch.randn_like(cache))[0], module(query, context)[0])
    module(query, context, cache=cache)[0].sum().backward()
    assert module.attention.encoder_att.weight.grad.abs().max() > 0


@pytest.mark.parametrize("cached", [False, True])
def test_masked_locations_are_silent_even_if_not_finite(cached):
    module, (query, context) = make(activation="relu", gate="vector"), pair()
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    spoilt = context.clone()
    spoilt[1, 4:] = float("nan")
    spoilt.requires_grad_()
    z, weights = module(query, spoilt, key_mask=mask, cache=module.project(spoilt) if cached else None)
    assert torch.allclose(z[1], module(query[1:], context[1:, :4])[0][0], atol=1e-12)
    assert (weights[1, :, 4:] == 0).all()
    if not cached:  # project was given the NaN itself
        z.sum().backward()
        assert spoilt.grad.isfinite().all() and (spoilt.grad[1, 4:] == 0).all()
        assert all(p.grad.isfinite().all() for p in module.parameters())


def test_a_sample_with_all_locations_masked_gets_zero():
    module, (query, context) = make(), pair()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0] = False
    context.requires_grad_()
    z, weights = module(query, context, key_mask=mask)
    assert (z[0] == 0).all() and (weights[0] == 0).all()
    z.square().sum().backward()
    assert context.grad.isfinite().all() and (context.grad[0] == 0).all()


def test_softmax_is_in_float32():
    module = make().half()
    query, context = torch.randn(2, 3, 5).half(), torch.randn(2, 7, 6).half()
    z, weights = module(query, context)
    assert z.dtype == weights.dtype == torch.float16
    module.attention.full_att.weight.data.fill_(3e4)  # scores near 180 000, above the largest half
    assert module(query, context)[1].isfinite().all()


def test_the_authors_file_loads_beside_the_rest_of_its_network():
    module, (query, context) = make(attn_layers=3), pair()
    state = to_official(module, "arctic-captions")
    assert {k: tuple(v.shape) for k, v in state.items() if k in ("decoder_Wd_att", "decoder_U_att", "decoder_W_sel", "decoder_W_att_2")} == {
        "decoder_Wd_att": (5, 6),
        "decoder_U_att": (6, 1),
        "decoder_W_sel": (5, 1),
        "decoder_W_att_2": (6, 6),
    }
    assert "decoder_b_att_1" in state and not any(name.startswith("attention") for name in state)
    state["decoder_b_sel"] = state["decoder_b_sel"].squeeze()  # stored as a scalar in some
    rest = {"Wemb": torch.zeros(2), "decoder_W": torch.zeros(2), "decoder_Wc": torch.zeros(2), "ff_logit_W": torch.zeros(2)}
    other = make(attn_layers=3)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_official(other, {**state, **rest})
    assert torch.equal(other(query, context)[0], module(query, context)[0])
    with pytest.raises(RegardError, match="decoder_W_sel"):
        load_official(make(gate=None, attn_layers=3), state)


def test_the_ports_file_loads_beside_the_rest_of_its_network():
    options = {"activation": "relu", "gate": "vector", "attn_dim": 4}
    module = make(**options)
    state = to_official(module, "sgrvinod")
    assert set(state) == {f"attention.{n}_att.{p}" for n in ("encoder", "decoder", "full") for p in ("weight", "bias")} | {
        "f_beta.weight",
        "f_beta.bias",
    }
    load_official(module, {**state, "embedding.weight": torch.zeros(2), "decode_step.bias_hh": torch.zeros(2), "fc.bias": torch.zeros(2)})


def test_starting_values():
    torch.manual_seed(0)
    module = regard.create("soft_attention", 64, 32)
    square = module.attention.encoder_att.weight
    assert torch.allclose(square @ square.T, torch.eye(64), atol=1e-5)
    assert 0.008 < module.attention.decoder_att.weight.std() < 0.012
    assert all((p == 0).all() for name, p in module.named_parameters() if name.endswith("bias"))
    assert regard.create("soft_attention", 64, 32, activation="relu").attention.decoder_att.weight.std() > 0.05


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_additive_scores_equal_the_reference(monkeypatch, activation):
    tensors = [torch.randn(shape).double().requires_grad_() for shape in ((3, 5, 4), (3, 30, 4), (4,))]
    with use_impl("reference"):
        expected = additive_scores(*tensors, activation)
    for limit in (50, 300, 1500, 2**18):  # some keys, some queries, some samples, all
        monkeypatch.setattr(pieces, "CPU", limit)
        assert torch.allclose(additive_scores(*tensors, activation), expected)
        assert torch.autograd.gradcheck(lambda *t: additive_scores(*t, activation), tensors, fast_mode=True)
    with pytest.raises(RegardError, match="activation='gelu'"):
        additive_scores(*tensors, "gelu")


def test_no_tensor_of_steps_and_locations_and_width_is_stored():
    module = regard.create("soft_attention", 64, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        module(torch.randn(2, 40, 32), torch.randn(2, 50, 64))
    assert max(kept) <= 2 * 50 * 64


def test_doubly_stochastic_loss_by_hand():
    weights = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [0.2, 0.3, 0.5]]])
    # sums over steps: (1.5, 0.5, 0) and (0.2, 0.3, 1.5)
    first, second = 0.25 + 0.25 + 1.0, 0.64 + 0.49 + 0.25
    assert torch.allclose(doubly_stochastic_loss(weights), torch.tensor((first + second) / 2))
    assert torch.allclose(doubly_stochastic_loss(weights, 2.0, reduction="official"), torch.tensor(2 * (first + second) / 3))
    assert torch.allclose(doubly_stochastic_loss(weights, reduction="mean"), torch.tensor((first + second) / 6))
    mask = torch.tensor([[True, True], [True, False]])
    assert torch.allclose(doubly_stochastic_loss(weights, time_mask=mask), torch.tensor((first + 2.0) / 2))
    assert doubly_stochastic_loss(weights.half()).dtype == torch.float32


def test_doubly_stochastic_loss_wrong_calls():
    weights = torch.rand(2, 3, 4)
    with pytest.raises(RegardError, match="reduction='sum'"):
        doubly_stochastic_loss(weights, reduction="sum")
    with pytest.raises(RegardError, match=r"time_mask .*\(2, 3\)"):
        doubly_stochastic_loss(weights, time_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(RegardTypeError, match="float32"):
        doubly_stochastic_loss(weights, time_mask=torch.ones(2, 3))
    with pytest.raises(RegardError, match="2 axes"):
        doubly_stochastic_loss(weights[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"gate": "both"}, "gate='both'"),
        ({"attn_layers": 0}, "attn_layers=0"),
        ({"attn_dim": -1}, "attn_dim=-1"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(**options)


def test_wrong_calls():
    module, (query, context) = make(), pair()
    for bad, words in [
        ({"query": query[0, 0]}, "query must be .* 1 axes"),
        ({"query": query[..., :4]}, "query has width 4 .* query_dim=5"),
        ({"query": query[:1]}, "another batch"),
        ({"context": context[0]}, "context must be"),
        ({"context": context[..., :5]}, "context_dim=6"),
        ({"context": context[:, :0]}, "nothing to attend to"),
        ({"key_mask": torch.ones(2, 6, dtype=torch.bool)}, r"key_mask .*\(2, 7\)"),
        ({"cache": context[:, :6]}, r"cache .*\(2, 7, 6\)"),
    ]:
        with pytest.raises(RegardError, match=words):
            module(**{"query": query, "context": context, **bad})
    for bad, words in [({"query": query.long()}, "query.*int64"), ({"key_mask": torch.ones(2, 7)}, "key_mask"), ({"cache": 3}, "cache")]:
        with pytest.raises(RegardTypeError, match=words):
            module(**{"query": query, "context": context, **bad})
    with pytest.raises(RegardError, match="context"):
        module.project(context[..., :5])
