"""Co-attention: its three forms against the paper's equations, groups, and what the authors' files hold."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard import RegardError


def module(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    out = regard.create("co_attention", 6, **options).double().eval()
    for parameter in out.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return out


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 6, *s, dtype=torch.float64, generator=generator) for s in ((3, 4), (5, 2)))  # type: ignore[return-value]


def bilinear(net: torch.nn.Module) -> Tensor:
    """W of S = Vb^T W Va."""
    if net.mode == "vanilla":
        return net.linear_e.weight
    if net.mode == "symmetric":
        return net.proj.weight.mT @ net.diag.diag() @ net.proj.weight
    return net.diag_b.diag() @ net.diag_a.diag()


@pytest.mark.parametrize("mode", ["vanilla", "symmetric", "channel"])
@pytest.mark.parametrize("fuse", ["none", "concat", "conv"])
@pytest.mark.parametrize(("gate", "gate_bias"), [(False, False), (True, False), (True, True)])
def test_equations(mode: str, fuse: str, gate: bool, gate_bias: bool) -> None:
    net, (a, b) = module(mode=mode, fuse=fuse, gate=gate, gate_bias=gate_bias), pair()
    va, vb = a.flatten(2), b.flatten(2)
    s = vb.mT @ bilinear(net) @ va
    weights_a, weights_b = s.softmax(1).mT, s.softmax(2)
    za, zb = (vb @ weights_a.mT).view_as(a), (va @ weights_b.mT).view_as(b)
    if gate:
        za, zb = (z * F.conv2d(z, net.gate_proj.weight[..., None, None], net.gate_proj.bias).sigmoid() for z in (za, zb))
    if fuse != "none":
        za, zb = torch.cat([za, a], 1), torch.cat([zb, b], 1)
    if fuse == "conv":
        za, zb = net.bn1(net.conv1(za)).relu(), net.bn2(net.conv2(zb)).relu()
    for with_weights in (False, True):
        result = net(a, b, return_weights=with_weights)
        outputs = (*result[0], *result[1]) if with_weights else result
        for found, expected in zip(outputs, (za, zb, weights_a, weights_b), strict=False):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_group_takes_the_mean_of_gated_summaries() -> None:
    net, (a, _) = module(fuse="none", gate_bias=True), pair()
    bs = torch.randn(2, 3, 6, 4, 2, dtype=torch.float64)
    expected = torch.stack([net(a, bs[:, m])[0] for m in range(3)]).mean(0)
    torch.testing.assert_close(net.forward_group(a, bs), expected)
    full = module()
    torch.testing.assert_close(full.forward_group(a, bs[:, :1]), full(a, bs[:, 0])[0])


def test_orthogonality_loss() -> None:
    torch.manual_seed(0)
    fresh = regard.create("co_attention", 6, mode="symmetric").double()
    torch.nn.init.orthogonal_(fresh.proj.weight)
    assert fresh.orthogonality_loss() < 1e-12
    net = module(mode="symmetric")
    p = net.proj.weight
    torch.testing.assert_close(net.orthogonality_loss(), 1e-4 * (p @ p.mT - torch.eye(6)).square().sum().sqrt())
    torch.testing.assert_close(net.orthogonality_loss(1.0), 1e4 * net.orthogonality_loss())
    with pytest.raises(RegardError, match="mode='symmetric'"):
        module().orthogonality_loss()


def test_files_of_the_authors_hold_more() -> None:
    net, (a, b) = module(gate_bias=True), pair()
    state = {
        **regard.to_official(net),
        "encoder.layer1.0.conv1.weight": torch.zeros(1),
        "main_classifier1.bias": torch.zeros(1),
        "softmax": torch.zeros(1),
    }
    assert state["gate.weight"].shape == (1, 6, 1, 1) and state["gate.bias"].shape == (1,)
    assert torch.equal(regard.load_official(regard.create("co_attention", 6, gate_bias=True).double().eval(), state)(a, b)[0], net(a, b)[0])
    with pytest.raises(RegardError, match="main_classifier3"):
        regard.load_official(net, {**state, "main_classifier3.bias": torch.zeros(1)})


def test_each_map_reads_the_other() -> None:
    net, (a, b) = module(fuse="none"), pair()
    b.requires_grad_()
    (gradient,) = torch.autograd.grad(net(a, b)[0][0, :, 0, 0].square().sum(), b)
    assert gradient[0].abs().amax(0).min() > 0 and gradient[1].abs().max() == 0


def test_wrong_calls() -> None:
    a, b = pair()
    for options in ({"mode": "bilinear"}, {"fuse": "add"}):
        with pytest.raises(RegardError, match=next(iter(options.values()))):
            regard.create("co_attention", 6, **options)
    for args, words in (((a[0], b), "a must be"), ((a, b[:, :5]), "b has 5 channels"), ((a[:1], b), "batch 1")):
        with pytest.raises(RegardError, match=words):
            module()(*args)
    with pytest.raises(RegardError, match="bs must be"):
        module().forward_group(a, b)
    with pytest.raises(RegardError, match="BatchNorm"):
        module().train()(a[:1, :, :1, :1], b[:1])
