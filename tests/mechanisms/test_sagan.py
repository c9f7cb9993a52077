"""Self-attention of SAGAN: what only it has."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import RegardError


def module(gamma: float = 0.7, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    net = regard.create("sagan", 16, **options).double()
    torch.nn.init.constant_(net.gamma, gamma)
    return net


@pytest.mark.parametrize("pool", [1, 2, 3])
def test_is_the_formula(pool: int) -> None:
    """Odd sides too: pooling floors them."""
    net, x = module(pool=pool, qkv_bias=True), torch.randn(2, 16, 7, 5, dtype=torch.float64)

    def conv(layer, t):
        return F.conv2d(t, layer.weight[:, :, None, None], layer.bias)

    q, k, v = conv(net.theta, x), *(F.max_pool2d(conv(layer, x), pool) for layer in (net.phi, net.g))
    weights = (q.flatten(2).mT @ k.flatten(2)).softmax(-1)
    expected = x + 0.7 * conv(net.o, (v.flatten(2) @ weights.mT).unflatten(2, (7, 5)))
    out, found = net(x, return_weights=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(regard.attend_rows(net, x, queries=[7, 2]), weights[:, [7, 2]])


def test_the_estimate_converges_to_the_spectral_norm() -> None:
    net, x = module(spectral_norm=True, reduction=2).train(), torch.randn(1, 16, 4, 4, dtype=torch.float64)
    for _ in range(50):
        net(x)
    for layer in (net.theta, net.phi, net.g, net.o):
        torch.testing.assert_close(layer.sv0[0], torch.linalg.matrix_norm(layer.weight, 2).detach(), rtol=1e-3, atol=0)
    for _ in range(400):
        net(x)
    for layer in (net.theta, net.phi, net.g, net.o):
        torch.testing.assert_close(layer.sv0[0], torch.linalg.matrix_norm(layer.weight, 2).detach(), rtol=1e-4, atol=0)


def test_vectors_move_in_training_alone_and_describe_the_output() -> None:
    net, x = module(spectral_norm=True), torch.randn(1, 16, 4, 4, dtype=torch.float64)
    before = {name: t.clone() for name, t in net.named_buffers()}
    evaluated, weights = net.eval()(x, return_weights=True)
    net.train()(x, update_u=False)
    net.weights(x)
    assert all(torch.equal(t, before[name]) for name, t in net.named_buffers())
    trained, same = net(x, return_weights=True)
    assert not any(torch.equal(t, before[name]) for name, t in net.named_buffers())
    assert torch.equal(trained, evaluated) and torch.equal(same, weights), "evaluation iterates from the stored vector as training does"


def test_gradient_treats_the_vectors_as_constants() -> None:
    net, x = module(spectral_norm=True).eval(), torch.randn(1, 16, 4, 4, dtype=torch.float64)
    layer = net.theta
    v = F.normalize(layer.u0 @ layer.weight.detach(), dim=1)
    u = F.normalize(v @ layer.weight.detach().mT, dim=1)
    (found,) = torch.autograd.grad(layer(x[0, :, 0].mT).sum(), layer.weight)
    (expected,) = torch.autograd.grad((x[0, :, 0].mT @ layer.weight.mT / (v @ layer.weight.mT @ u.mT)).sum(), layer.weight)
    torch.testing.assert_close(found, expected)


def test_corner_reaches_corner() -> None:
    x = torch.randn(1, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module()(x)[0, :, 0, 0].sum(), x)
    assert (gradient[0, :, -1, -1] != 0).any()


def test_all_namings() -> None:
    """Gains of shape () and (1,) both load; a TensorFlow kernel is (1, 1, in, out)."""
    net, x = module(spectral_norm=True), torch.randn(1, 16, 4, 4, dtype=torch.float64)
    state = regard.to_official(net, "TensorFlow")
    assert state["sn_conv_theta/w"].shape == (1, 1, 16, 2) and state["sigma_ratio"].shape == ()
    del state["o.sv0"]
    assert torch.equal(regard.load_official(module(0.0, spectral_norm=True), state).eval()(x), net.eval()(x))
    state = regard.to_official(net, "BigGAN")
    state["gamma"] = state["gamma"].reshape(1)
    assert torch.equal(regard.load_official(module(0.0, spectral_norm=True), state).eval()(x), net.eval()(x))
    plain = module(pool=1, value_reduction=1, qkv_bias=True, out_proj=False)
    assert regard.to_official(plain, "heykeetae")["gamma"].shape == (1,)


def test_wrong_calls() -> None:
    for options, words in (
        ({"reduction": 32}, "reduction=32"),
        ({"value_reduction": 32}, "value_reduction=32"),
        ({"pool": 0}, "pool=0"),
        ({"out_proj": False}, "out_proj=False"),
    ):
        with pytest.raises(RegardError, match=words):
            regard.create("sagan", 16, **options)
    with pytest.raises(RegardError, match="pool=2"):
        module()(torch.randn(1, 16, 1, 5, dtype=torch.float64))
