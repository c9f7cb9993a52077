"""Bottleneck attention: both ways to combine, naming, the fast gate, the start as the identity, errors."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.ops._dispatch import explain, use_impl
from regard.ops.outer_gate import apply_outer_gate, chunked


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("bam", *args, **{"reduction": 2, **options})


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_equals_its_formula(combine):
    module, x = make(8, combine=combine, num_layers=2, num_dilated=1, dilation=3).eval(), torch.randn(2, 8, 5, 7)
    c = x.mean((2, 3))
    for layer, norm in zip(module.channel_layers, module.channel_norms, strict=True):
        c = F.relu(norm(layer(c)))
    c = module.channel_out(c)[:, :, None, None]
    p = F.relu(module.reduce_norm(F.conv2d(x, module.reduce.weight[:, :, None, None], module.reduce.bias)))
    conv = module.spatial_layers[0].conv
    p = F.relu(module.spatial_layers[0].norm(F.conv2d(p, conv.weight, conv.bias, padding=3, dilation=3)))
    p = F.conv2d(p, module.spatial_out.weight[:, :, None, None], module.spatial_out.bias)
    gate = (c * p if combine == "mul" else c + p).sigmoid()
    out, found = module(x, return_weights=True)
    torch.testing.assert_close((out, found, module.gate(x)), (x * (1 + gate), gate, 1 + gate))


def test_naming():
    module, x = make(8, num_layers=2).eval(), torch.randn(1, 8, 5, 6)
    state = to_official(module)
    assert state["spatial_att.gate_s.gate_s_conv_reduce0.weight"].shape == (4, 8, 1, 1)
    assert state["spatial_att.gate_s.gate_s_conv_di_1.weight"].shape == (4, 4, 3, 3)
    assert {"channel_att.gate_c.gate_c_fc_1.bias", "channel_att.gate_c.gate_c_bn_2.weight", "channel_att.gate_c.gate_c_fc_final.weight"} <= set(state)
    assert all(key.startswith(("channel_att.gate_c.gate_c_", "spatial_att.gate_s.gate_s_")) for key in state)
    torch.manual_seed(1)
    other = load_official(regard.create("bam", 8, reduction=2, num_layers=2).eval(), state)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_a_step_leaves_the_identity(combine):
    module, x = make(8, combine=combine, init="identity"), torch.randn(2, 8, 5, 7)
    assert torch.equal(module(x), x)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):  # in the first step of a product only one factor has a gradient
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(module(x), x)
    assert all(p.grad is not None for p in module.parameters()) and module.spatial_out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize(("elements", "pieces"), [(1 << 20, 1), (400, 2), (70, 9)])
@pytest.mark.parametrize("last", [False, True])
def test_chunked_gate_equals_reference(monkeypatch, combine, elements, pieces, last):
    """All in one piece, some samples at a time, some channels of one."""
    torch.manual_seed(0)
    monkeypatch.setattr(chunked, "_ELEMENTS", elements)
    x = torch.randn(3, 6, 5, 6)
    assert len(list(chunked._parts(x))) == pieces
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    channel, position = torch.randn(3, 6, requires_grad=True), torch.randn(3, 1, 5, 6, requires_grad=True)
    found = []
    for impl in ("chunked", "reference"):
        with use_impl(outer_gate=impl):
            out = apply_outer_gate(x, channel, position, combine, 1.5)
        found.append((out, *torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), (x, channel, position))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_chunked_gate_has_its_gradient(combine):
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 2, 4), (2, 3), (2, 1, 2, 4))]
    with use_impl(outer_gate="chunked"):
        assert torch.autograd.gradcheck(lambda *values: apply_outer_gate(*values, combine, 1.5), leaves)
    chosen = {c.op: c.impl for c in explain(make(8), torch.randn(2, 8, 4, 4))}
    assert chosen["outer_gate"] == "chunked"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduction": 16}, "channels=8 with reduction=16"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"num_dilated": -1}, "num_dilated=-1"),
        ({"dilation": 0}, "dilation=0"),
        ({"combine": "sum"}, "combine='sum'"),
        ({"init": "zero"}, "init='zero'"),
        ({"norm": "layer"}, "norm='layer'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)


def test_batch_of_one():
    for options in ({}, {"num_layers": 0}):
        with pytest.raises(RegardError, match=r"eval\(\)"):
            make(8, **options).train()(torch.randn(1, 8, 1, 1))
    assert make(8, num_layers=0).train()(torch.randn(1, 8, 2, 2)).shape == (1, 8, 2, 2)
    assert make(8, norm=None).train()(torch.randn(1, 8, 1, 1)).shape == (1, 8, 1, 1)
