"""Convolutional block attention: plane order, namings, statistics, options that switch gates off."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.testing import run
from regard.testing.subject import subjects_of


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("cbam", *args, **options)


def test_equals_its_formula():
    module, x = make(8, reduction=2).eval(), torch.randn(2, 8, 5, 7)
    mlp = module.mlp
    channel = sum(mlp.fc2(torch.relu(mlp.fc1(d))) for d in (x.mean((2, 3)), x.amax((2, 3)))).sigmoid()[:, :, None, None]
    gated = x * channel
    planes = torch.cat((gated.amax(1, keepdim=True), gated.mean(1, keepdim=True)), 1)
    spatial = module.norm(module.conv(planes)).sigmoid()
    out, (found_channel, found_spatial) = module(x, return_weights=True)
    torch.testing.assert_close((out, found_channel, found_spatial), (gated * spatial, channel, spatial))
    torch.testing.assert_close(module.gate(x), channel * spatial)


def test_timm_planes_are_swapped():
    module, x = make(8, reduction=2, bias=False).eval(), torch.randn(1, 8, 6, 5)
    state = to_official(module, "timm")
    assert state["channel.fc1.weight"].shape == (4, 8, 1, 1)
    assert torch.equal(state["spatial.conv.conv.weight"][:, 0], module.conv.weight[:, 1])
    other = load_official(regard.create("cbam", 8, reduction=2, bias=False), state).eval()
    assert torch.equal(other(x), module(x))
    authors = to_official(make(8, reduction=2))
    assert {
        "ChannelGate.mlp.1.weight",
        "ChannelGate.mlp.3.bias",
        "SpatialGate.spatial.conv.weight",
        "SpatialGate.spatial.bn.weight",
    } <= set(authors)


def test_zero_init_halves_what_the_channel_gate_gives():
    x = torch.randn(2, 8, 4, 4)
    for norm in ("batch", None):
        module = make(8, reduction=2, zero_init=True, spatial_norm=norm)
        channel = make(8, reduction=2, spatial=False)
        channel.mlp.load_state_dict(module.mlp.state_dict())
        torch.testing.assert_close(module(x), 0.5 * channel(x))


def test_without_spatial_gate():
    module, x = make(8, reduction=2, spatial=False, pools=["lse", "lp"]), torch.randn(2, 8, 4, 4)
    out, (channel, spatial) = module(x, return_weights=True)
    assert spatial is None
    torch.testing.assert_close(out, x * channel)
    assert set(dict(module.named_parameters())) == {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    subject = replace(subjects_of("cbam")[0], options={"channels": 8, "reduction": 2, "spatial": False}, _cache={})
    names = ("cost_formula_is_what_is_counted", "gate_alone_equals_the_module", "weights_come_beside_the_same_output")
    outcomes = list(run(subject, only=names))
    assert len(outcomes) == 3 and not [o.message for o in outcomes if o.status == "fail"]


def test_norm_of_the_spatial_gate():
    assert make(8, reduction=2).norm.momentum == 0.01
    assert make(8, reduction=2).conv.bias is None
    assert make(8, reduction=2, spatial_norm=None).conv.bias is not None
    custom = make(8, reduction=2, spatial_norm=lambda features: nn.InstanceNorm2d(features, affine=True))
    assert custom(torch.randn(1, 8, 3, 3)).shape == (1, 8, 3, 3)
    module, point = make(8, reduction=2), torch.randn(1, 8, 1, 1)
    with pytest.raises(RegardError, match="spatial_norm=None"):
        module.train()(point)
    assert module.eval()(point).shape == (1, 8, 1, 1)
    assert module.train()(torch.randn(1, 8, 2, 1)).shape == (1, 8, 2, 1)


def test_zero_channel_under_lp_has_a_gradient():
    module, x = make(8, reduction=2, pools=("lp", "lse")), torch.zeros(1, 8, 4, 4, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": 16}, "channels=8 with reduction=16"),
        ({"reduction": 2, "kernel_size": 4}, "kernel_size=4"),
        ({"reduction": 2, "pools": ("avg", "median")}, "pools='median'"),
        ({"reduction": 2, "pools": ()}, "pools="),
        ({"reduction": 2, "spatial_norm": "layer"}, "norm='layer'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)


def test_is_for_two_axes():
    with pytest.raises(RegardError, match="height, width"):
        make(8, reduction=2)(torch.randn(2, 8, 5))
