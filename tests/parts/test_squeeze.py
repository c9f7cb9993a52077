"""The squeeze operations and parts: definitions, fast forms against the reference, half precision, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.errors import RegardError
from regard.ops._dispatch import explain, use_impl
from regard.ops.plane_conv import plane_conv
from regard.ops.squeeze import attention_pool, channel_max, channel_mean, position_max, position_mean
from regard.parts.gates import activation, gate_function
from regard.parts.norm import check_batch_statistics, make_norm, zero_init_
from regard.parts.squeeze import BottleneckMLP, hidden_width, pool_global

FORMS = {
    "position_max": position_max,
    "channel_max": channel_max,
    "attention": lambda x: torch.cat([t.flatten() for t in attention_pool(x, torch.linspace(-1, 1, x.shape[1], dtype=x.dtype), x.new_ones(1))]),
}


def test_pools_are_their_definitions():
    x = torch.randn(2, 3, 4, 5)
    flat = x.flatten(2)
    expected = {
        "avg": flat.mean(2),
        "max": flat.amax(2),
        "avg_max": (flat.mean(2) + flat.amax(2)) / 2,
        "lp": flat.square().sum(2).sqrt(),
        "lse": flat.exp().sum(2).log(),
    }
    for kind, value in expected.items():
        torch.testing.assert_close(pool_global(x, kind), value)
        torch.testing.assert_close(pool_global(x[..., 0], kind), pool_global(x[..., :1], kind))
    torch.testing.assert_close(channel_mean(x), x.mean(1, keepdim=True))
    torch.testing.assert_close(channel_max(x), x.amax(1, keepdim=True))
    with pytest.raises(RegardError, match="median"):
        pool_global(x, "median")


def test_lp_has_no_gradient_at_zero():
    x = torch.zeros(1, 2, 3, 3)
    x[0, 1] = 2.0
    x.requires_grad_()
    pool_global(x, "lp").sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 0], torch.zeros(3, 3))
    torch.testing.assert_close(x.grad[0, 1], torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize("kind", ["avg", "max", "avg_max", "lp", "lse"])
def test_pools_accumulate_in_float32(kind):
    x = 60 + torch.rand(1, 2, 64, 64)
    half = pool_global(x.half(), kind)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), pool_global(x, kind), rtol=2e-3, atol=0)


def test_equal_maxima_share_the_gradient():
    x = torch.tensor([[[3.0, 1.0, 3.0]]], requires_grad=True)
    position_max(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[[0.5, 0.0, 0.5]]]))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("last", [False, True])
def test_fused_equals_reference(name, last):
    x = torch.randn(3, 8, 7, 5)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    found = []
    for impl in ("fused", "reference"):
        leaf = x.detach().clone().requires_grad_()
        with use_impl(squeeze=impl):
            out = FORMS[name](leaf)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append((out.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1])


def test_attention_pool_gradients_of_its_parameters():
    x, w, b = torch.randn(2, 4, 6), torch.randn(4, requires_grad=True), torch.randn(1, requires_grad=True)
    found = []
    for impl in ("fused", "reference"):
        with use_impl(squeeze=impl):
            pooled, attention = attention_pool(x, w, b)
        found.append(torch.autograd.grad(pooled.square().sum() + attention.square().sum(), (w, b)))
    torch.testing.assert_close(found[0], found[1])
    assert found[0][1].abs() < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_fused_gradients_twice(name):
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    with use_impl(squeeze="fused"):
        assert torch.autograd.gradcheck(FORMS[name], x)
        assert torch.autograd.gradgradcheck(FORMS[name], x)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
@pytest.mark.parametrize("name", FORMS)
def test_fused_compiles_whole(name):
    torch._dynamo.reset()
    with use_impl(squeeze="fused"):
        compiled = torch.compile(FORMS[name], fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 4, 5, 3)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(a).sum().backward()
        FORMS[name](b).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", FORMS)
def test_fused_under_vmap(name):
    x = torch.randn(4, 2, 3, 5)
    with use_impl(squeeze="fused"):
        gradient = torch.func.grad(lambda one: FORMS[name](one[None]).square().sum())
        together = torch.func.vmap(gradient)(x)
        torch.testing.assert_close(together, torch.stack([gradient(one) for one in x]))


def test_fused_max_takes_several_cotangents_at_once():
    x = torch.randn(1, 3, 4, requires_grad=True)
    (rows,) = torch.autograd.grad(position_max(x), x, torch.eye(3)[:, None], is_grads_batched=True)
    torch.testing.assert_close(rows.sum((1, 3)), torch.eye(3))


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (8, 5)])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_plane_conv_equals_conv2d(size, k):
    x, w, b = torch.randn(2, 2, *size, requires_grad=True), torch.randn(1, 2, k, k, requires_grad=True), torch.randn(1, requires_grad=True)
    for bias in (None, b):
        ours, theirs = plane_conv(x, w, bias), F.conv2d(x, w, bias, padding=k // 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        leaves = (x, w) if bias is None else (x, w, b)
        g = torch.randn_like(ours)
        torch.testing.assert_close(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g), rtol=1e-4, atol=1e-4)


def test_choices_are_explained():
    class Pool(nn.Module):
        def forward(self, x):
            return position_max(x)

    (choice,) = explain(Pool(), torch.randn(1, 2, 3, 3))
    assert (choice.op, choice.impl) == ("squeeze", "fused")


def test_means_have_no_gradient_map_of_their_own():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(position_mean(x).sum(), x)
    assert grad.stride()[2:] == (0, 0)
    torch.testing.assert_close(grad, torch.full_like(x, 1 / 20))


def test_bottleneck_is_two_pointwise_convolutions():
    mlp = BottleneckMLP(6, 3, 5, act="silu")
    v = torch.randn(4, 6)
    hidden = F.silu(F.conv2d(v[:, :, None, None], mlp.fc1.weight[:, :, None, None], mlp.fc1.bias))
    torch.testing.assert_close(mlp(v), F.conv2d(hidden, mlp.fc2.weight[:, :, None, None], mlp.fc2.bias).flatten(1))


def test_hidden_width():
    assert [hidden_width(64, 16, None), hidden_width(30, 4, None), hidden_width(8, 16, 3)] == [4, 7, 3]
    with pytest.raises(RegardError, match="channels=8 with reduction=16"):
        hidden_width(8, 16, None)
    for bad in (0, -2):
        with pytest.raises(RegardError, match="reduction="):
            hidden_width(8, bad, None)
    with pytest.raises(RegardError, match="hidden_channels=1"):
        hidden_width(8, 2, 1, least=2)


def test_batch_norm_of_one_vector_says_the_way_out():
    mlp = BottleneckMLP(4, 2, norm="batch")
    with pytest.raises(RegardError, match=r"eval\(\).*norm=None"):
        mlp(torch.randn(1, 4))
    assert mlp.eval()(torch.randn(1, 4)).shape == (1, 4)
    assert mlp.train()(torch.randn(2, 4)).shape == (2, 4)
    check_batch_statistics(nn.GroupNorm(1, 4), 1, "one vector")


def test_norms_gates_and_zero_start():
    assert isinstance(make_norm("batch", 3, 0), nn.BatchNorm1d) and isinstance(make_norm("batch", 3, 3), nn.BatchNorm3d)
    assert isinstance(make_norm(None, 3), nn.Identity)
    norm = make_norm(lambda features: nn.GroupNorm(1, features), 4, dtype=torch.float64)
    assert isinstance(norm, nn.GroupNorm) and norm.weight.dtype == torch.float64
    for wrong in ("layer", 3):
        with pytest.raises(RegardError, match="norm="):
            make_norm(wrong, 4)  # type: ignore[arg-type]
    zero_init_(norm)
    assert norm.weight.abs().sum() == 0 and norm.bias.abs().sum() == 0
    x = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(gate_function("hard_sigmoid")(x), F.relu6(x + 3) / 6)
    torch.testing.assert_close(gate_function("sigmoid")(x), x.sigmoid())
    with pytest.raises(RegardError, match="softmax"):
        gate_function("softmax")
    with pytest.raises(RegardError, match="relu7"):
        activation("relu7")
