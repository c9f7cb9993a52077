"""Split attention: radix-major equals the form by cardinal groups, one branch is an SE gate, the fast sum of branches, errors."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.ops._dispatch import explain, use_impl
from regard.ops.branch_sum import branch_sum, chunked


def make(*args, **options):
    torch.manual_seed(0)
    return regard.create("split", *args, **{"hidden_channels": 6, **options})


def test_equals_the_form_by_cardinal_groups():
    k, r, module, x = 3, 2, make(12, out_channels=18, groups=3).eval(), torch.randn(2, 12, 5, 6)
    u = F.relu(module.branches.norm(F.conv2d(x, module.branches.conv.weight, padding=1, groups=k * r))).view(2, r, k, 6, 5, 6)
    outs = []
    for group in range(k):
        mine = u[:, :, group]
        hidden = F.linear(mine.sum(1).mean((2, 3)), module.fc1.weight[2 * group : 2 * group + 2], module.fc1.bias[2 * group : 2 * group + 2])
        norm, part = module.hidden_norm, slice(2 * group, 2 * group + 2)
        hidden = F.relu(F.batch_norm(hidden, norm.running_mean[part], norm.running_var[part], norm.weight[part], norm.bias[part]))
        rows = slice(12 * group, 12 * group + 12)
        weights = F.linear(hidden, module.fc2.weight[rows], module.fc2.bias[rows]).view(2, r, 6).softmax(1)
        outs.append((weights[..., None, None] * mine).sum(1))
    torch.testing.assert_close(module(x), torch.cat(outs, 1))


def test_one_branch_is_an_se_gate():
    module, x = make(8, radix=1).eval(), torch.randn(2, 8, 5, 5)
    u = module.branches(x)
    gate = module.fc2(F.relu(module.hidden_norm(module.fc1(u.mean((2, 3)))))).sigmoid()
    out, weights = module(x, return_weights=True)
    torch.testing.assert_close(weights[:, 0], gate)
    torch.testing.assert_close(out, u * gate[:, :, None, None])


@pytest.mark.parametrize("radix", [1, 2, 3])
def test_starts_as_the_first_branch_and_leaves_it(radix):
    module, x = make(12, radix=radix, groups=2, init="identity"), torch.randn(2, 12, 5, 5)
    for mode in (True, False):
        assert torch.equal(module.train(mode)(x), module.branches(x)[:, :12])
    module(x).square().sum().backward()
    assert module.gain.grad.abs() > 0


def test_naming():
    module, x = make(8, groups=2, bias=True).eval(), torch.randn(1, 8, 4, 5)
    state = to_official(module)
    assert state["fc1.weight"].shape == (6, 4, 1, 1) and state["fc2.weight"].shape == (16, 3, 1, 1)
    assert {"conv.bias", "bn0.running_mean", "bn1.weight", "fc1.bias", "fc2.bias"} <= set(state)
    torch.manual_seed(1)
    other = regard.create("split", 8, groups=2, bias=True, hidden_channels=6).eval()
    assert torch.equal(load_official(other, state)(x), module(x))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("elements", "pieces"), [(1 << 20, 1), (50, 2), (7, 6)])
def test_chunked_sum_of_branches_equals_reference(monkeypatch, last, elements, pieces):
    """All in one piece, some samples at a time, single channels."""
    monkeypatch.setattr(chunked, "_ELEMENTS", elements)
    size = (2, 5)
    u, weights = torch.randn(3, 6, *size), torch.rand(3, 3, 2, requires_grad=True)
    assert len(list(chunked._parts(u, weights))) == pieces
    u = (u.contiguous(memory_format=torch.channels_last) if last else u).requires_grad_()
    found = []
    for impl in ("chunked", "reference"):
        with use_impl(branch_sum=impl):
            out = branch_sum(u, weights)
        assert out.is_contiguous(memory_format=torch.channels_last) == last or impl == "reference"
        found.append((out, *torch.autograd.grad((out * torch.linspace(-1, 1, out[0, 0].numel()).view(size)).sum(), (u, weights))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_chunked_sum_of_branches_has_its_gradient():
    u, weights = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True), torch.rand(2, 2, 2, dtype=torch.float64, requires_grad=True)
    with use_impl(branch_sum="chunked"):
        assert torch.autograd.gradcheck(branch_sum, (u, weights))
    chosen = {c.op: c.impl for c in explain(make(8), torch.randn(2, 8, 4, 4))}
    assert chosen["branch_sum"] == "chunked"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radix": 3}, "groups \\* radix=3"),
        ({"radix": 0}, "radix=0"),
        ({"groups": 2, "out_channels": 7}, "out_channels=7"),
        ({"groups": 4}, "hidden_channels=6 is not divisible by groups=4"),
        ({"kernel_size": 2}, "kernel_size=2 is even"),
        ({"padding": -1}, "padding=-1"),
        ({"dilation": 0}, "dilation=0"),
        ({"hidden_channels": None, "reduction": 0}, "reduction=0"),
        ({"init": "zero"}, "init='zero'"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RegardError, match=words):
        make(8, **options)


def test_wrong_calls():
    with pytest.raises(RegardError, match=r"eval\(\)"):
        make(8).train()(torch.randn(1, 8, 4, 4))
    with pytest.raises(RegardError, match="smaller than the kernel"):
        make(8, padding=0).eval()(torch.randn(1, 8, 2, 4))
    assert make(8, kernel_size=2, padding=1).eval()(torch.randn(1, 8, 1, 4)).shape == (1, 8, 2, 5)
    assert make(8).hidden_channels == 6 and regard.create("split", 64, reduction=2).hidden_channels == 64
