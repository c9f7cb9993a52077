"""Global context: fusions, starting values, what the attention pools, namings."""

from dataclasses import replace

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.testing import run
from regard.testing.subject import subjects_of


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("gc", *args, **options)


def test_equals_its_formula():
    module, x = make(8, reduction=2, fusion=("add", "mul"), zero_init=False), torch.randn(2, 8, 5, 3)
    flat = x.flatten(2)
    a = (module.mask.weight @ flat + module.mask.bias).softmax(-1)
    context = (flat * a).sum(2)

    def term(mlp):
        return mlp.fc2(torch.relu(mlp.norm(mlp.fc1(context))))[:, :, None, None]

    out, found = module(x, return_weights=True)
    torch.testing.assert_close(out, x * term(module.mlp_mul).sigmoid() + term(module.mlp_add))
    torch.testing.assert_close(found, a.unflatten(2, (5, 3)))


def test_start():
    x = torch.randn(2, 8, 3, 4)
    assert torch.equal(make(8, reduction=2)(x), x)
    torch.testing.assert_close(make(8, reduction=2, fusion="mul")(x), 0.5 * x)
    assert not torch.allclose(make(8, reduction=2, zero_init=False)(x), x)
    module = make(4096, reduction=2)
    assert module.mask.bias.item() == 0
    assert abs(module.mask.weight.std().item() - (2 / 4096) ** 0.5) < 2e-3


def test_attention_finds_a_marked_region_and_the_mean_dilutes_it():
    channels, marker = 8, torch.eye(8)[0]
    x = 0.1 * torch.randn(1, channels, 8, 8)
    feature = torch.randn(channels)
    feature[0] = 3.0
    x[0, 0] = 0.0
    x[0, :, 2:4, 5:7] = feature[:, None, None]
    att, avg = make(channels, reduction=2), make(channels, reduction=2, pool="avg")
    att.mask.weight.data = 20 * marker[None]
    torch.testing.assert_close(att._context(x)[0][0], feature, atol=1e-3, rtol=0)
    assert (avg._context(x)[0][0, 0] - 3.0 * 4 / 64).abs() < 1e-5
    att.mask.weight.data.zero_()
    torch.testing.assert_close(att._context(x)[0], avg._context(x)[0])


def test_gate_only_where_it_is_one():
    x = torch.randn(2, 8, 3, 4)
    module = make(8, reduction=2, fusion=("mul",), zero_init=False)
    torch.testing.assert_close(module(x), x * module.gate(x))
    with pytest.raises(RegardError, match="fusion="):
        make(8, reduction=2).gate(x)


def test_average_pooling_passes_the_checks():
    options = {"channels": 8, "reduction": 2, "pool": "avg", "fusion": ("mul",), "zero_init": False}
    subject = replace(subjects_of("gc")[0], options=options, _cache={}, can=frozenset({"permutation_equivariant", "gate"}))
    outcomes = list(run(subject, only=("cost_formula_is_what_is_counted", "gradcheck_in_float64", "any_size", "gate_alone_equals_the_module")))
    assert len(outcomes) == 4 and not [o.message for o in outcomes if o.status == "fail"]
    assert make(8, reduction=2, pool="avg")(torch.randn(1, 8, 2, 2), return_weights=True)[1] is None


@pytest.mark.parametrize("naming", ["xvjiarui/GCNet", "timm"])
@pytest.mark.parametrize("options", [{}, {"fusion": ("mul", "add")}, {"pool": "avg", "fusion": "mul"}])
def test_namings(naming, options):
    module, x = make(8, reduction=2, zero_init=False, **options), torch.randn(1, 8, 3, 4)
    state = to_official(module, naming)
    assert torch.equal(load_official(regard.create("gc", 8, reduction=2, **options), state)(x), module(x))
    if naming == "timm":
        assert not [name for name in state if name.split(".")[0] not in ("conv_attn", "mlp_add", "mlp_scale")]
    elif "mul" in module.fusion:
        assert state["channel_mul_conv.1.weight"].shape == (4, 1, 1)


def test_softmax_over_positions_in_float32_and_any_axes():
    module = make(4, reduction=2, zero_init=False).half()
    weights = module(40 * torch.randn(1, 4, 60, 60).half(), return_weights=True)[1]
    assert weights.dtype == torch.float16 and weights.isfinite().all()
    for space in ((6,), (2, 2, 3)):
        assert make(4, reduction=2)(torch.randn(2, 4, *space), return_weights=True)[1].shape == (2, 1, *space)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": 8}, "hidden width of 1"),
        ({"hidden_channels": 1}, "hidden_channels=1"),
        ({"reduction": 0}, "reduction=0"),
        ({"reduction": 2, "fusion": ()}, "fusion="),
        ({"reduction": 2, "fusion": ("sub",)}, "fusion='sub'"),
        ({"reduction": 2, "pool": "max"}, "pool='max'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)
