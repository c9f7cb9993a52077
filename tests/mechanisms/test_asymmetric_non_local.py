"""Asymmetric non-local: the formula in the authors' order, stages, maps of two sizes, names of the shared layer, momentum, zero start."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("asymmetric_non_local", *args, **{"dropout": 0.0, "zero_init": False, **options})


def in_the_authors_order(module, x, low):
    def pooled(y):
        return torch.cat([F.adaptive_avg_pool2d(y, n).flatten(2) for n in module.pool_sizes], 2)

    context, weights = 0, []
    for i in range(module.num_stages):
        q = (module.key if module.query is None else module.query)[i](x).flatten(2).mT
        k, v = pooled(module.key[i](low)), pooled(module.value[i](low.movedim(1, 3)).movedim(3, 1))
        weights.append((q @ k / module.hidden_channels**0.5).softmax(2))
        context = context + module.out[i](weights[-1] @ v.mT).mT.unflatten(2, x.shape[2:])
    return module.fuse(torch.cat((context, x), 1)), weights


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("low", [None, 5])
def test_equals_its_formula(stages, low):
    module = make(8, low_channels=low, num_stages=stages, value_channels=3, out_channels=6).eval()
    x, context = torch.randn(2, 8, 7, 6), torch.randn(2, 5, 11, 9)
    args = (x,) if low is None else (x, context)
    expected, weights = in_the_authors_order(module, args[0], args[-1])
    out, found = module(*args, return_weights=True)
    torch.testing.assert_close(out, expected)
    for one, two in zip(found if stages > 1 else (found,), weights, strict=True):
        torch.testing.assert_close(one, two)


def test_the_shared_layer_moves_as_if_run_twice():
    module, x = make(8), torch.randn(2, 8, 6, 6)
    twice = torch.nn.BatchNorm2d(4)
    for _ in range(2):
        twice(module.key[0].conv(x))
    module(x)
    torch.testing.assert_close(module.key[0].norm.running_mean, twice.running_mean)
    torch.testing.assert_close(module.key[0].norm.running_var, twice.running_var)
    assert make(8, low_channels=4).key[0].norm.momentum == 0.1


def test_names():
    module, x = make(8).eval(), torch.randn(2, 8, 5, 4)
    state = to_official(module)
    assert torch.equal(state["stages.0.f_key.0.weight"], state["stages.0.f_query.0.weight"]) and "conv_bn_dropout.1.0.running_var" in state
    once = {name: value for name, value in state.items() if "f_query" not in name}
    for form in (state, once):
        assert torch.equal(load_official(make(8, zero_init=True).eval(), form)(x), module(x))
    differing = {**state, "stages.0.f_query.0.weight": state["stages.0.f_query.0.weight"] + 1}
    with pytest.raises(RegardError, match=r"f_query.0.weight \(the two are one layer"):
        load_official(make(8), differing)
    fusion = to_official(make(8, low_channels=6))
    assert fusion["stages.0.f_query.0.weight"].shape == (4, 8, 1, 1) and "conv_bn_dropout.1.running_var" in fusion


@pytest.mark.parametrize("options", [{"zero_init": True}, {"init": "identity"}])
def test_starts_without_context_and_leaves_that(options):
    module, x = make(8, **options).eval(), torch.randn(2, 8, 5, 5)
    without = module.fuse(torch.cat((torch.zeros_like(x), x), 1)).detach()
    torch.testing.assert_close(module(x), without)
    module(x).square().sum().backward()
    with torch.no_grad():
        for parameter in module.out.parameters():
            parameter -= 0.1 * parameter.grad
    assert not torch.allclose(module(x), without)


def test_dropout_drops_whole_channels():
    module, x = make(8, dropout=0.5, low_channels=8), torch.randn(3, 8, 5, 5)
    out = module(x, x)
    dropped = (out == 0).all((2, 3))
    assert dropped.any() and not dropped.all() and ((out != 0).all((2, 3)) | dropped).all()


def test_wrong_calls():
    x = torch.randn(2, 8, 5, 5)
    for options, words in (
        ({"pool_sizes": ()}, "pool_sizes"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"num_stages": 0}, "num_stages=0"),
        ({"low_channels": 0}, "low_channels=0"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"init": "zero"}, "init='zero'"),
    ):
        with pytest.raises(RegardError, match=words):
            make(8, **options)
    with pytest.raises(RegardError, match="needs context"):
        make(8, low_channels=4)(x)
    with pytest.raises(RegardError, match="context is only for"):
        make(8)(x, x)
    with pytest.raises(RegardError, match="context has 8 channels"):
        make(8, low_channels=4)(x, x)
    with pytest.raises(RegardError, match="context has batch 1"):
        make(8, low_channels=8)(x, x[:1])
    with pytest.raises(RegardError, match="norm=None"):
        make(8)(torch.randn(1, 8, 1, 1))
