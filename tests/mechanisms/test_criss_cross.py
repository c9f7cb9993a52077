"""Criss-cross attention: what only it has."""

import pytest
import torch

import regard
from regard import RegardError
from regard.testing import CHECKS


def module(gamma: float = 0.7, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    out = regard.create("criss_cross", 8, **{"reduction": 2, **options}).double()
    torch.nn.init.constant_(out.gamma, gamma)
    return out


@pytest.mark.parametrize(("recurrence", "everywhere"), [(1, False), (2, True)])
def test_reach(recurrence: int, everywhere: bool) -> None:
    """One pass sees the cross and nothing else, two see the whole map."""
    x = torch.randn(1, 8, 6, 7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(recurrence=recurrence)(x)[0, :, 2, 3].sum(), x)
    seen = gradient[0].abs().amax(0) > 0
    cross = torch.zeros(6, 7, dtype=torch.bool)
    cross[2], cross[:, 3] = True, True
    assert torch.equal(seen, torch.ones_like(cross) if everywhere else cross)


@pytest.mark.parametrize(("dims", "size"), [(2, (5, 6)), (3, (3, 4, 2))])
def test_the_pixel_itself_counts_once(dims: int, size: tuple[int, ...]) -> None:
    """Equal scores: every weight is one over the size of the cross, and a constant map of values stays what it is."""
    net = module(dims=dims, recurrence=1, gamma=1.0)
    torch.nn.init.zeros_(net.query_conv.weight)
    torch.nn.init.zeros_(net.query_conv.bias)
    _, (weights,) = net(torch.randn(2, 8, *size, dtype=torch.float64), return_weights=True)
    cross = sum(size) - dims + 1
    assert weights.shape == (2, *size, sum(size))
    torch.testing.assert_close(weights.unique(), torch.tensor([0, 1 / cross], dtype=torch.float64))
    assert ((weights > 0).sum(-1) == cross).all()


def test_recurrence_of_one_call() -> None:
    net, x = module(recurrence=2), torch.randn(1, 8, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(net(x), net(net(x, recurrence=1), recurrence=1))
    out, weights = net(x, recurrence=3, return_weights=True)
    assert len(weights) == 3
    torch.testing.assert_close(out, net(net(x), recurrence=1))


def test_gamma_of_mmcv() -> None:
    state = regard.to_official(module(), "mmcv")
    assert state["gamma.scale"].shape == () and state["value_conv.weight"].shape == (8, 8, 1, 1)
    other, x = regard.load_official(module(gamma=0.0), state), torch.randn(1, 8, 4, 5, dtype=torch.float64)
    assert torch.equal(other(x), module()(x))


def test_volumes_pass_the_suite() -> None:
    """But for growth, which for volumes is not the card's: their crosses are shorter."""
    names = [name for name, check in CHECKS.items() if not check.compiles and name != "growth_is_what_is_counted"]
    regard.testing.check("criss_cross", options={"dims": 3, "recurrence": 1}, only=names)


@pytest.mark.compile
def test_volumes_compile() -> None:
    regard.testing.check("criss_cross", options={"dims": 3, "recurrence": 1}, only=["compiles_whole"])


def test_wrong_calls() -> None:
    for options, words in (({"dims": 1}, "dims=1"), ({"recurrence": 0}, "recurrence=0"), ({"reduction": 16}, "reduction=16")):
        with pytest.raises(RegardError, match=words):
            regard.create("criss_cross", 8, **{"reduction": 2, **options})
    with pytest.raises(RegardError, match="recurrence=0"):
        module()(torch.randn(1, 8, 3, 3), recurrence=0)
    with pytest.raises(RegardError, match="axes"):
        module(dims=3)(torch.randn(1, 8, 3, 3))
