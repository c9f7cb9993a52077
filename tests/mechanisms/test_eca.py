"""Efficient channel attention: the rule for k, both paddings, own kernels, equality with a convolution."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("eca", *args, **options)


def test_the_rule_for_the_kernel():
    sizes = {1: 3, 16: 3, 64: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    assert {channels: make(channels).kernel_size for channels in sizes} == sizes
    assert make(2048, gamma=1.0, beta=0.0).kernel_size == 11


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_logits_are_a_convolution_over_channels(padding_mode, shared, k):
    module, x = make(6, kernel_size=k, padding_mode=padding_mode, shared=shared), torch.randn(2, 6, 3, 5)
    out, gate = module(x, return_weights=True)
    means = x.mean((2, 3))
    padded = F.pad(means[:, None], (k // 2, k // 2), mode="circular" if padding_mode == "circular" else "constant")
    weight = module.conv.weight.expand(6, 1, k)
    logits = torch.stack([(weight[c, 0] * padded[:, 0, c : c + k]).sum(1) for c in range(6)], 1)
    torch.testing.assert_close(gate, logits.sigmoid()[:, :, None, None])
    torch.testing.assert_close(out, x * gate)
    assert sum(p.numel() for p in module.parameters()) == (k if shared else 6 * k)


def test_kernel_wider_than_the_channels():
    assert make(2, kernel_size=9)(torch.randn(1, 2, 3, 3)).shape == (1, 2, 3, 3)
    assert make(4, kernel_size=9, padding_mode="circular")(torch.randn(1, 4, 3)).shape == (1, 4, 3)
    with pytest.raises(RegardError, match="kernel_size=9 wraps around channels=3"):
        make(3, kernel_size=9, padding_mode="circular")


def test_order_of_channels_matters_as_documented():
    module, x, order = make(8, kernel_size=3), torch.randn(2, 8, 4, 4), torch.randperm(8)
    assert not torch.allclose(module(x[:, order]), module(x)[:, order])
    rolled = make(8, kernel_size=3, padding_mode="circular")
    torch.testing.assert_close(rolled(x.roll(2, 1)), rolled(x).roll(2, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"gate": "tanh"}, "gate='tanh'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)


def test_prints_its_options():
    assert "kernel_size=3, gamma=2.0, beta=1.0, padding_mode='zeros', shared=True, init='default', gate='sigmoid'" in repr(make(8))
