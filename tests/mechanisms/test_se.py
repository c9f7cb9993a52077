"""Squeeze-and-excitation: the gate sees means alone, any number of axes, all namings."""

import pytest
import torch
from torch import nn

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("se", *args, **options)


def test_gate_depends_on_the_means_alone():
    module, x = make(8, reduction=2), torch.randn(2, 8, 4, 6)
    other = torch.randn(2, 8, 3, 5)
    other = other - other.mean((2, 3), keepdim=True) + x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(module.gate(x), module.gate(other))
    torch.testing.assert_close(module.gate(x), module.gate(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    assert not torch.allclose(module.gate(x), module.gate(x + 1))


def test_identity_mlp_gates_by_the_sigmoid_of_the_mean():
    module, x = make(4, hidden_channels=4), torch.rand(3, 4, 5, 2)
    for layer in (module.mlp.fc1, module.mlp.fc2):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    torch.testing.assert_close(module(x), x * x.mean((2, 3), keepdim=True).sigmoid())


@pytest.mark.parametrize("space", [(7,), (3, 4), (2, 3, 4), (1, 1)])
def test_any_number_of_axes(space):
    module, x = make(8, reduction=4, pool="avg_max"), torch.randn(2, 8, *space)
    out, gate = module(x, return_weights=True)
    assert gate.shape == (2, 8, *[1] * len(space))
    torch.testing.assert_close(out, x * gate)
    torch.testing.assert_close(out.flatten(2), module(x.flatten(2)))


def test_channels_last_stays():
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = make(8, reduction=2)(x)
    out.backward(torch.ones_like(out))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("naming", ["moskomule/senet.pytorch", "timm", "hujie-frank/SENet (Caffe)"])
@pytest.mark.parametrize("bias", [True, False])
def test_namings(naming, bias):
    module, x = make(8, reduction=2, bias=bias), torch.randn(1, 8, 3, 3)
    state = to_official(module, naming)
    other = load_official(regard.create("se", 8, reduction=2, bias=bias), state)
    assert torch.equal(module(x), other(x))
    first = {"moskomule/senet.pytorch": "fc.0.weight", "timm": "fc1.weight", "hujie-frank/SENet (Caffe)": "1x1_down.weight"}[naming]
    assert state[first].shape == ((4, 8) if naming.startswith("mosko") else (4, 8, 1, 1))
    assert len(state) == (4 if bias else 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": 16}, "channels=8 with reduction=16"),
        ({"reduction": 0}, "reduction=0"),
        ({"reduction": -1}, "reduction=-1"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"reduction": 2, "pool": "lp"}, "pool='lp'"),
        ({"reduction": 2, "gate": "softmax"}, "gate='softmax'"),
        ({"reduction": 2, "act": "none"}, "act='none'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)


def test_prints_its_options():
    assert "reduction=4, hidden_channels=2, bias=True, pool='avg', act='relu', init='default', gate='sigmoid'" in repr(make(8, reduction=4))
