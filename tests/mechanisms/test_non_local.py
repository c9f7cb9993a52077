"""Non-local block: its four pairwise functions, the questions the notes ask about it, and two layouts of keys."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard import RegardError
from regard.testing import CHECKS

MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")


def module(channels: int = 6, **options) -> nn.Module:
    torch.manual_seed(0)
    out = regard.create("non_local", channels, **options).double().eval()
    for parameter in out.parameters():
        nn.init.normal_(parameter, std=0.5)
    return out


def maps(*size: int, b: int = 2, c: int = 6) -> Tensor:
    return torch.randn(b, c, *(size or (4, 5)), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written_out(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """mmcv's operations in mmcv's order, or the authors' where `pool_first`."""
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[net.dims]
    ones = [1] * net.dims
    pool = {1: nn.MaxPool1d(2), 2: nn.MaxPool2d(2), 3: nn.MaxPool3d((1, 2, 2))}[net.dims] if net.sub_sample else nn.Identity()
    before, after = (pool, nn.Identity()) if net.pool_first else (nn.Identity(), pool)

    def layer(linear: nn.Linear, y: Tensor) -> Tensor:
        return conv(y, linear.weight.view(*linear.weight.shape, *ones), linear.bias)

    g = after(layer(net.g, before(x))).flatten(2).mT
    if net.mode == "gaussian":
        theta, phi = x.flatten(2).mT, pool(x).flatten(2)
    else:
        theta, phi = layer(net.theta, x).flatten(2).mT, after(layer(net.phi, before(x))).flatten(2)
    m = phi.shape[2]
    if net.mode == "concatenation":
        pairs = torch.cat([theta[:, :, None].expand(-1, -1, m, -1), phi.mT[:, None].expand(-1, theta.shape[1], -1, -1)], -1)
        weights = (pairs @ net.concat_project.weight[0]).relu() / m
    elif net.mode == "dot_product":
        weights = theta @ phi / m
    else:
        scale = net.hidden_channels**-0.5 if net.use_scale and net.mode == "embedded_gaussian" else 1
        weights = (theta @ phi * scale).softmax(-1)
    return x + net.norm(layer(net.out, (weights @ g).mT.reshape(x.shape[0], -1, *x.shape[2:]))), weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dims", "size"), [(1, (9,)), (2, (5, 4)), (3, (3, 4, 5))])
@pytest.mark.parametrize("pooling", [{}, {"sub_sample": True}, {"sub_sample": True, "pool_first": True}, {"pool_first": True}])
def test_definition(mode: str, dims: int, size: tuple[int, ...], pooling: dict[str, bool]) -> None:
    for options in ({}, {"use_scale": False, "norm": "batch", "hidden_channels": 7}):
        net, x = module(mode=mode, dims=dims, **pooling, **options), maps(*size)
        expected, weights = written_out(net, x)
        out, found = net(x, return_weights=True)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found, weights, rtol=1e-9, atol=1e-9)


def test_pooling_before_and_after_the_projections_differ() -> None:
    x = maps()
    assert not torch.allclose(module(sub_sample=True)(x), module(sub_sample=True, pool_first=True)(x))


def test_question_3_a_fully_connected_layer() -> None:
    """With theta and phi constant the block is a fully connected layer over positions with equal weights: y is theta . phi times the mean of g.

    Its matrix A comes from the data and fits any N; a learned N x N matrix in its place, with g the identity, is the fully connected layer itself.
    """
    net, x = module(channels=4, hidden_channels=3, mode="dot_product"), maps(3, 5, c=4)
    for linear in (net.theta, net.phi):
        nn.init.zeros_(linear.weight)
    out, weights = net(x, return_weights=True)
    a = net.theta.bias @ net.phi.bias / 15
    torch.testing.assert_close(weights, a.expand(2, 15, 15), rtol=0, atol=1e-9)
    mean = net.g(x.flatten(2).mT).mean(1)
    torch.testing.assert_close(out, x + net.out(15 * a * mean)[:, :, None, None], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["embedded_gaussian", "gaussian"])
def test_question_4_self_attention(mode: str) -> None:
    """The embedded Gaussian is one head of scaled dot-product attention plus its input; the Gaussian is that with q = k = x, unscaled."""
    d, x = 6, maps(4, 5)
    net = module(mode=mode, hidden_channels=d)
    head = regard.create("multi_head", 6, num_heads=1, scale=1.0 if mode == "gaussian" else None).double()
    pairs = [(head.v_proj, net.g), (head.out_proj, net.out)]
    with torch.no_grad():
        if mode == "gaussian":
            for linear in (head.q_proj, head.k_proj):
                nn.init.eye_(linear.weight)
                nn.init.zeros_(linear.bias)
        else:
            pairs += [(head.q_proj, net.theta), (head.k_proj, net.phi)]
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        rows = x.flatten(2).mT
        torch.testing.assert_close(net(x), x + head(rows).mT.view_as(x), rtol=0, atol=1e-9)


def test_question_5_the_gram_matrix() -> None:
    """Applying the affinity of positions is mixing channels by the Gram matrix of style: (X^T X) X^T / N = X^T (X X^T) / N."""
    net, x = module(mode="dot_product", hidden_channels=6), maps(4, 5)
    for linear in (net.theta, net.phi, net.g, net.out):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    flat = x.flatten(2)
    style = flat @ flat.mT
    torch.testing.assert_close(net(x), x + (style @ flat).view_as(x) / 20, rtol=0, atol=1e-9)
    _, weights = net(x, return_weights=True)
    torch.testing.assert_close(weights, flat.mT @ flat / 20, rtol=0, atol=1e-9)
    f, s = maps(4, 5)[0].flatten(1), maps(3, 7, b=1)[0].flatten(1)
    mmd = (f.mT @ f).square().sum() + (s.mT @ s).square().sum() - 2 * (f.mT @ s).square().sum()
    torch.testing.assert_close((f @ f.mT - s @ s.mT).square().sum(), mmd, rtol=1e-9, atol=0)


@pytest.mark.parametrize("mode", ["dot_product", "concatenation"])
def test_linear_modes_pass_the_suite(mode: str) -> None:
    """But for growth, which the card states for the softmax modes, and for weights that sum to one, which these do not claim."""
    left_out = {"growth_is_what_is_counted", "weights_sum_to_one"}
    names = [name for name, check in CHECKS.items() if not check.compiles and name not in left_out]
    for options in ({}, {"norm": "batch"}):
        regard.testing.check("non_local", options={"mode": mode, **options}, only=names)


@pytest.mark.compile
@pytest.mark.parametrize("mode", ["dot_product", "concatenation"])
def test_linear_modes_compile(mode: str) -> None:
    regard.testing.check("non_local", options={"mode": mode}, only=[name for name, check in CHECKS.items() if check.compiles])


@pytest.mark.parametrize("mode", ["dot_product", "concatenation"])
def test_linear_modes_cost_grows_linearly(mode: str) -> None:
    net = regard.create("non_local", 16, mode=mode)
    costs = [regard.cards()["non_local"].cost(net, B=1, N=n * n, M=n * n, H=n, W=n) for n in (64, 128)]
    assert 3.9 < costs[1] / costs[0] <= 4.0


def test_pooled_cost_is_what_is_counted_in_every_mode() -> None:
    for mode in MODES:
        for pool_first in (False, True):
            options = {"mode": mode, "sub_sample": True, "pool_first": pool_first}
            regard.testing.check("non_local", options=options, only=["cost_formula_is_what_is_counted"])
            regard.testing.check("non_local", options={**options, "dims": 3}, only=["cost_formula_is_what_is_counted"])


def test_keys_with_a_norm() -> None:
    """mmcv has no bias before its norm, the plain layout has one: the running mean takes it, and other norms cannot."""
    net = module(norm="batch", sub_sample=True, mode="concatenation")
    plain = regard.to_official(net, "AlexHex7")
    assert {"W.0.bias", "W.1.running_mean", "g.0.weight", "theta.weight", "phi.0.bias", "concat_project.0.weight"} <= set(plain)
    assert plain["concat_project.0.weight"].shape == (1, 6, 1, 1)
    other_norm = module(norm=lambda c: nn.GroupNorm(2, c))
    with pytest.raises(RegardError, match="cannot be written as mmcv"):
        regard.to_official(other_norm, "mmcv")
    nn.init.ones_(net.out.bias)
    theirs = regard.to_official(net, "mmcv")
    assert "conv_out.conv.bias" not in theirs and {"conv_out.bn.weight", "g.0.conv.weight", "theta.conv.bias"} <= set(theirs)
    other = regard.load_official(module(norm="batch", sub_sample=True, mode="concatenation"), theirs)
    assert other.out.bias.abs().max() == 0
    torch.testing.assert_close(other(maps()), net(maps()))
    torch.testing.assert_close(other.eval()(maps()), net.eval()(maps()))
    without = module(dims=3)
    assert set(regard.to_official(without, "AlexHex7")) == {f"{name}.{kind}" for name in ("g", "theta", "phi", "W") for kind in ("weight", "bias")}
    assert regard.to_official(without)["conv_out.conv.weight"].shape == (6, 3, 1, 1, 1)


def test_start() -> None:
    x = maps().float()
    for norm in (None, "batch", lambda c: nn.GroupNorm(2, c)):
        assert torch.equal(regard.create("non_local", 6, norm=norm)(x), x)
        assert not torch.equal(regard.create("non_local", 6, norm=norm, zero_init=False)(x), x)
    assert regard.create("non_local", 1).hidden_channels == 1


def test_wrong_calls() -> None:
    for options, words in (
        ({"dims": 4}, "dims=4"),
        ({"mode": "cosine"}, "cosine"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"norm": "layer"}, "layer"),
    ):
        with pytest.raises(RegardError, match=words):
            regard.create("non_local", 6, **options)
    with pytest.raises(RegardError, match="size of 2"):
        module(sub_sample=True)(maps(1, 5))
    with pytest.raises(RegardError, match="axes"):
        module()(maps(5))
    with pytest.raises(RegardError, match="BatchNorm"):
        module(norm="batch").train()(maps(1, 1, b=1))
    module(sub_sample=True, dims=3)(maps(1, 2, 2))
