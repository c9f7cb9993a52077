"""dgmn: its own arithmetic written out, its options, both starts, its names, and wrong calls."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import regard
from regard import RegardError, load_official
from regard.official import to_official
from regard.ops import deform_conv2d, deform_unfold

GOLDENS = Path(__file__).parents[1] / "goldens" / "dgmn"


def made(channels: int = 16, *, noise: bool = True, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    net = regard.create("dgmn", channels, **{"norm_groups": 2, "dilations": (1, 2, 3, 4), **options}).double()
    for parameter in net.parameters() if noise else ():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def message(net, x: torch.Tensor, s: int, perm: torch.Tensor | None = None) -> torch.Tensor:
    """Step by step as the paper has it, every sample kept."""
    rho, g, (batch, _, height, width) = net.dilations[s], net.groups, x.shape
    affinity = None
    if net.variant == "fast" or net.deform == "none":
        parts = F.conv2d(x, net.joint_convs[s].weight, padding=rho, dilation=rho).flatten(2)
        filters = parts[:, : 9 * g].unflatten(1, (g, 9)).softmax(2)
        offset = parts[:, 9 * g : 9 * g + 18].unflatten(2, (height, width)) if net.deform != "none" else None
        affinity = parts[:, -9:].sigmoid() if net.deform == "deformatt" else None
    else:
        offset = F.conv2d(x, net.offset_convs[s].weight, padding=rho, dilation=rho)
        parts = deform_conv2d(x, offset, net.filter_convs[s].weight, padding=rho, dilation=rho).flatten(2)
        filters = parts[:, : 9 * g].unflatten(1, (g, 9))
        if net.deform == "deformatt":
            affinity = (filters[:, -1] if s == 3 and net.official_affinity4 else parts[:, -9:]).softmax(1)
        else:
            filters = filters.softmax(2)
    filters = filters if perm is None else filters[:, perm]
    weights = filters if affinity is None else filters * affinity[:, None]
    u = F.unfold(x, 3, rho, rho) if offset is None else deform_unfold(x, offset, 3, 1, rho, rho)
    return (u.view(batch, g, -1, 9, height * width) * weights[:, :, None]).sum(3).view(x.shape)


OPTIONS = [
    {"groups": groups, "deform": deform, "variant": variant, "bottleneck": bottleneck}
    for groups in (1, 2)
    for deform in ("deformatt", "deform", "none")
    for variant in ("rigorous", "fast")
    for bottleneck in (False, True)
]


@pytest.mark.parametrize("options", [*OPTIONS, {"official_affinity4": False}, {"dilations": (2,)}, {"dilations": (1, 1, 2, 1, 3)}], ids=str)
def test_is_its_formula(options: dict) -> None:
    net, x = made(**options), torch.randn(2, 16, 7, 6, dtype=torch.float64)
    y = x if net.scale1 is None else net.scale1(x)
    messages = [message(net, y, s) for s in range(net.branches)]
    if net.variant == "fast":
        out = net.scale2(torch.cat([y, *messages], 1))
    else:
        out = y + sum(gamma * m for gamma, m in zip(net.gammas, messages, strict=True))
    out = out if net.scale3 is None else net.scale3(out)
    expected = out if net.variant == "rigorous" and not net.bottleneck else out + x
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("deform", ["deformatt", "deform", "none"])
def test_shuffle(deform: str) -> None:
    net, x = made(groups=4, deform=deform, shuffle=True), torch.randn(2, 16, 7, 6, dtype=torch.float64)
    perms = [torch.randperm(4) for _ in range(4)]
    perms[0] = torch.tensor([1, 2, 3, 0])
    expected = x + sum(gamma * message(net, x, s, perms[s]) for s, gamma in enumerate(net.gammas))
    torch.testing.assert_close(net(x, group_perms=perms), expected)
    torch.manual_seed(3)
    drawn = net(x)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, net(x, group_perms=[torch.randperm(4) for _ in range(4)]))
    still = net.eval()(x)
    assert (still - drawn).abs().max() > 1e-3
    assert torch.equal(still, net(x, group_perms=perms))


def test_the_slip_of_the_fourth_branch() -> None:
    official, ours = made(groups=2), made(groups=2, official_affinity4=False)
    x = torch.randn(1, 16, 5, 6, dtype=torch.float64)
    for net, dead in ((official, True), (ours, False)):
        net(x).square().sum().backward()
        assert (net.filter_convs[3].weight.grad[-9:].abs().max() == 0) == dead
        assert net.filter_convs[2].weight.grad[-9:].abs().max() > 0


@pytest.mark.parametrize("options", [{}, {"variant": "fast"}, {"deform": "deform", "variant": "fast", "groups": 2}])
def test_starts_on_the_regular_taps(options: dict) -> None:
    net = made(noise=False, **options)
    rows = [c.weight for c in net.offset_convs] or [c.weight[9 * net.groups : 9 * net.groups + 18] for c in net.joint_convs]
    assert all(not row.any() for row in rows)
    assert all(c.weight[: 9 * net.groups].any() for c in net.joint_convs)
    default = made(noise=False, offset_init="default", **options)
    assert all(c.weight.all() for c in (*default.offset_convs, *default.joint_convs))
    assert all(gamma.item() == 1 for gamma in net.gammas)


@pytest.mark.parametrize("options", [{}, {"variant": "fast"}, {"bottleneck": True}, {"variant": "fast", "bottleneck": True, "deform": "none"}])
def test_identity_start_learns(options: dict) -> None:
    net, x = made(noise=False, init="identity", **options), torch.randn(2, 16, 7, 6, dtype=torch.float64)
    assert torch.equal(net(x), x)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (net(x) * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum().backward()
        optimizer.step()
    assert (net(x) - x).abs().max() > 1e-3
    weights = net.joint_convs or net.filter_convs
    assert all(conv.weight.grad.any() for conv in weights)


@pytest.mark.parametrize("options", [{}, {"deform": "none"}, {"variant": "fast", "bottleneck": True}, {"bottleneck": True}])
def test_official_names(options: dict) -> None:
    net = made(**options)
    written = to_official(net, "lzrobots/dgmn")
    fast, none = net.variant == "fast", net.deform == "none"
    wanted = {f"cat{s}.weight" for s in "abcd"} if fast or none else {f"{k}_conv{s}.weight" for k in ("off", "kernel") for s in "abcd"}
    wanted |= set() if fast else {f"gamma{i}" for i in range(1, 5)}
    wanted |= {f"scale{i}.{key}" for i in (1, 3) for key in ("0.weight", "1.weight", "1.bias")} if net.bottleneck else set()
    wanted |= {f"scale2.{key}" for key in ("0.weight", "1.weight", "1.bias")} if fast else set()
    assert set(written) == wanted
    fresh = load_official(made(**options), {k: v + 1 for k, v in written.items()})
    for name, value in net.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value + 1)


def test_official_names_need_four_branches() -> None:
    assert set(to_official(made(dilations=(1, 2)))) == set(made(dilations=(1, 2)).state_dict())
    with pytest.raises(RegardError, match="lzrobots"):
        to_official(made(dilations=(1, 2)), "lzrobots/dgmn")


def test_golden_of_the_functions() -> None:
    golden = load_file(GOLDENS / "primitive_deform_sampling.safetensors")
    x, offset, weight = (golden[f"input.{name}"].requires_grad_() for name in ("x", "offset", "weight"))
    place = {"stride": 1, "padding": 2, "dilation": 2, "offset_groups": 2}
    out = {"unfold": deform_unfold(x, offset, 3, **place), "conv": deform_conv2d(x, offset, weight, **place)}
    sum((t * golden[f"cotangent.{name}"]).sum() for name, t in out.items()).backward()
    for name, t in out.items():
        torch.testing.assert_close(t, golden[f"output.{name}"], rtol=0, atol=2e-5 * golden[f"output.{name}"].abs().max().item())
    for name, t in (("x", x), ("offset", offset), ("weight", weight)):
        torch.testing.assert_close(t.grad, golden[f"grad.{name}"], rtol=0, atol=1e-4 * golden[f"grad.{name}"].abs().max().item())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": 3}, "channels=16 is not divisible by groups=3"),
        ({"groups": 8, "bottleneck": True}, "channels // 4=4 is not divisible by groups=8"),
        ({"bottleneck": True, "norm_groups": 32}, "norm_groups=32"),
        ({"variant": "fast", "norm_groups": 3}, "norm_groups=3"),
        ({"dilations": ()}, "dilations"),
        ({"dilations": (1, 0)}, "dilations"),
        ({"deform": "att"}, "deform='att'"),
        ({"variant": "slow"}, "variant='slow'"),
        ({"offset_init": "normal"}, "offset_init"),
        ({"init": "zero"}, "init"),
    ],
)
def test_wrong_options(options: dict, text: str) -> None:
    with pytest.raises(RegardError, match=text):
        made(**options)


def test_wrong_permutations() -> None:
    x = torch.ones(1, 16, 3, 3, dtype=torch.float64)
    with pytest.raises(RegardError, match="shuffle=True"):
        made()(x, group_perms=[torch.arange(1)] * 4)
    with pytest.raises(RegardError, match="4 permutations"):
        made(shuffle=True)(x, group_perms=[torch.arange(1)])
    with pytest.raises(RegardError, match="integer tensors"):
        made(shuffle=True)(x, group_perms=[torch.arange(2)] * 4)


def test_a_norm_of_one_value() -> None:
    with pytest.raises(RegardError, match="norm_groups"):
        made(bottleneck=True, norm_groups=4)(torch.ones(1, 16, 1, 1, dtype=torch.float64))
