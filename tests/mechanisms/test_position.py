"""Position attention: what only it has."""

import pytest
import torch

import regard
from regard import RegardError
from regard.ops._dispatch import use_impl


def module(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    return regard.create("position", 16, **{"gamma_init": 0.7, **options}).double()


@pytest.mark.parametrize("scale", [1.0, None, 0.3])
def test_is_the_formula(scale: float | None) -> None:
    net, x = module(scale=scale, hidden_channels=4), torch.randn(2, 16, 3, 5, dtype=torch.float64)
    rows = x.flatten(2).mT
    factor = 0.5 if scale is None else scale
    weights = (factor * net.query_conv(rows) @ net.key_conv(rows).mT).softmax(-1)
    expected = x + 0.7 * (weights @ net.value_conv(rows)).mT.reshape(x.shape)
    out, found = net(x, return_weights=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, weights)
    torch.testing.assert_close(regard.attend_rows(net, x, queries=[7, 2]), weights[:, [7, 2]])


def test_one_pixel_attends_to_itself() -> None:
    net, x = module(), torch.randn(2, 16, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(net(x), x + 0.7 * net.value_conv(x[:, :, 0, 0])[:, :, None, None])


def test_wide_values_take_their_own_way() -> None:
    """Outside training; small maps in training keep their weights, large ones do not; all ways agree."""
    torch.manual_seed(0)
    net = regard.create("position", 64, gamma_init=1.0)
    x = torch.randn(1, 64, 6, 7)
    with torch.no_grad():
        assert [choice.impl for choice in regard.explain(net, x)] == ["narrow"]
        found = []
        for impl in ("reference", "fused", "narrow"):
            with use_impl(pairwise_attention=impl):
                found.append(net(x))
    assert [choice.impl for choice in regard.explain(net, x)] == ["reference"]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_identity_start_wins_and_can_be_left() -> None:
    net, x = module(init="identity"), torch.randn(2, 16, 3, 4, dtype=torch.float64)
    assert torch.equal(net(x), x)
    net(x)[0, 0].sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert not torch.equal(net(x), x)


def test_wrong_calls() -> None:
    for options, words in (({"reduction": 32}, "reduction=32"), ({"hidden_channels": 0}, "hidden_channels=0"), ({"init": "zero"}, "init='zero'")):
        with pytest.raises(RegardError, match=words):
            regard.create("position", 16, **options)
    with pytest.raises(RegardError, match="channels=4 with reduction=8"):
        regard.create("position", 4)
    with pytest.raises(RegardError, match="axes"):
        module()(torch.randn(2, 16, 5))
