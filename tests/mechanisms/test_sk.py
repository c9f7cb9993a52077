"""Selective kernel: the formula, dilated and true kernels, both namings, the start as one branch."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official

OPTIONS = {"groups": 4, "min_hidden": 4}


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("sk", *args, **{**OPTIONS, **options})


def test_equals_its_formula():
    module, x = make(8, kernel_sizes=(3, 5, 7)).eval(), torch.randn(2, 8, 7, 6)
    maps = [F.relu(b.norm(F.conv2d(x, b.conv.weight, padding=r + 1, dilation=r + 1, groups=4))) for r, b in enumerate(module.branches)]
    hidden = F.relu(module.hidden_norm(module.fc1(sum(maps).mean((2, 3)))))
    weights = module.fc2(hidden).view(2, 3, 8).softmax(1)
    out, found = module(x, return_weights=True)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(out, sum(w[:, :, None, None] * m for w, m in zip(weights.unbind(1), maps, strict=True)))


def test_true_kernels_and_strides():
    module = make(8, dilated=False, stride=2, dilation=2, out_channels=12)
    assert [tuple(b.conv.weight.shape) for b in module.branches] == [(12, 2, 3, 3), (12, 2, 5, 5)]
    assert module(torch.randn(2, 8, 7, 10)).shape == (2, 12, 4, 5)
    assert module.taps == 34 and make(8).taps == 18


def test_split_input_feeds_each_branch_its_share():
    module, x = make(8, split_input=True).eval(), torch.randn(2, 8, 5, 5)
    torch.nn.init.zeros_(module.fc2.weight)
    module.fc2.bias = torch.nn.Parameter(torch.tensor([50.0] * 8 + [0.0] * 8))
    other = x.clone()
    other[:, 4:] = 0
    torch.testing.assert_close(module(x), module(other))
    torch.testing.assert_close(module(x), module.branches[0](x[:, :4]))


def test_one_kernel_is_a_convolution():
    module, x = make(8, kernel_sizes=(5,)).eval(), torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(module(x), module.branches[0](x))


@pytest.mark.parametrize(("attn_norm", "key"), [(True, "attn.fc_select.weight"), (False, "fcs.1.weight")])
def test_namings(attn_norm, key):
    module, x = make(8, attn_norm=attn_norm).eval(), torch.randn(2, 8, 5, 4)
    state = to_official(module)
    expected = module.fc2.weight[:, :, None, None] if attn_norm else module.fc2.weight[8:]
    assert torch.equal(state[key], expected)
    assert torch.equal(load_official(make(8, attn_norm=attn_norm, min_hidden=4).eval(), state)(x), module(x))
    start = load_official(make(8, attn_norm=attn_norm, init="identity").eval(), state)
    assert torch.equal(start(x), module.branches[0](x))
    if attn_norm:
        caffe = to_official(module, "implus/SKNet (Caffe), attention")
        assert caffe["B_fc1.weight"].shape == (4, 8, 1, 1) and "B_fc1/bn.running_mean" in caffe


def test_starts_as_the_first_branch_and_leaves_it():
    module, x = make(8, init="identity"), torch.randn(2, 8, 5, 5)
    for mode in (True, False):
        assert torch.equal(module.train(mode)(x), module.branches[0](x))
    module(x).square().sum().backward()
    assert module.gain.grad.abs() > 0
    with torch.no_grad():
        module.gain -= 0.1 * module.gain.grad
    assert not torch.allclose(module(x), module.branches[0](x))


def test_norms_and_biases():
    assert make(8).fc1.bias is None and make(8).branches[0].conv.bias is None
    assert make(8, norm=None).fc1.bias is not None and make(8, norm=None).branches[0].conv.bias is not None
    assert make(8, attn_norm=False).fc1.bias is None
    assert make(64, reduction=4).hidden_channels == 16 and make(8, min_hidden=32).hidden_channels == 32
    with pytest.raises(RegardError, match="norm=None"):
        make(8).train()(torch.randn(1, 8, 4, 4))
    assert make(8, norm=None).train()(torch.randn(1, 8, 1, 1)).shape == (1, 8, 1, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernel_sizes": (3, 4)}, r"kernel_sizes=\(3, 4\)"),
        ({"kernel_sizes": (1,)}, "at least 3"),
        ({"kernel_sizes": ()}, "at least one"),
        ({"groups": 3}, "channels=8 is not divisible by groups=3"),
        ({"out_channels": 10}, "out_channels=10 is not divisible by groups=4"),
        ({"split_input": True, "kernel_sizes": (3, 5, 7)}, "kernel_sizes"),
        ({"split_input": True, "groups": 8, "out_channels": 8}, "channels of a branch=4"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"reduction": 0}, "reduction=0"),
        ({"stride": 0}, "stride=0"),
        ({"init": "zero"}, "init='zero'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)


def test_heads_of_unequal_rows_are_refused():
    module = regard.create("sk", 16, groups=4, attn_norm=False)
    state = to_official(module)
    rows = torch.cat([state["fcs.0.weight"], state["fcs.1.weight"]])
    with pytest.raises(RegardError, match=r"each of them has 16 rows, got \[20, 12\]"):
        load_official(module, {**state, "fcs.0.weight": rows[:20], "fcs.1.weight": rows[20:]})
