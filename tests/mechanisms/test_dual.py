"""The dual head: what only it has."""

import pytest
import torch
import torch.nn.functional as F

import regard
from regard import RegardError


def head(gamma: float = 0.0, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    net = regard.create("dual", 16, **{"hidden_channels": 8, **options}).double()
    for block in (net.position, net.channel):
        torch.nn.init.constant_(block.gamma, gamma)
    return net


@pytest.mark.parametrize("init", ["default", "identity"])
def test_starts_as_its_convolutions(init: str) -> None:
    """Bit for bit, in training and evaluation; a step leaves it."""
    net, x = head(init=init), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    for training in (False, True):
        net.train(training)
        assert torch.equal(net(x), net.position_out(net.position_in(x)) + net.channel_out(net.channel_in(x)))
    net(x).square().sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert net.position.gamma.item() != 0 and net.channel.gamma.item() != 0


def test_is_made_of_the_two_mechanisms() -> None:
    """The authors' names of the blocks are those of the mechanisms that stand alone."""
    net, x = head(0.6, invert=False).eval(), torch.randn(2, 16, 5, 6, dtype=torch.float64)
    state = regard.to_official(net)
    blocks = []
    for id, prefix, options in (("position", "sa.", {}), ("channel_affinity", "sc.", {"invert": False})):
        part = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        blocks.append(regard.load_official(regard.create(id, 8, **options).double(), part))
    expected = net.position_out(blocks[0](net.position_in(x))) + net.channel_out(blocks[1](net.channel_in(x)))
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_one_checkpoint_fits_one_output_and_three() -> None:
    three, x = head(0.5, out_channels=3, aux=True).eval(), torch.randn(2, 16, 4, 5, dtype=torch.float64)
    one = regard.load_official(head(out_channels=3), regard.to_official(three)).eval()
    main, position, channel = three(x)
    assert torch.equal(one(x), main) and main.shape == position.shape == channel.shape == (2, 3, 4, 5)


def test_dropout_drops_whole_channels_of_each_classifier_alone() -> None:
    net, x = head(out_channels=3, aux=True, dropout=0.5, norm=None), torch.randn(4, 16, 4, 5, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    for classifier in (net.main_classifier, net.position_classifier, net.channel_classifier):
        classifier.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    net.train()(x)
    dropped = [(t == 0).all((2, 3)) for t in seen]
    assert all(0 < d.sum() < d.numel() for d in dropped) and not torch.equal(dropped[1], dropped[2])
    with torch.no_grad():
        first = net.eval()(x)
        assert all(torch.equal(a, b) for a, b in zip(first, net(x), strict=True))
    f = net.position_out(net.position_in(x)) + net.channel_out(net.channel_in(x))
    torch.testing.assert_close(first[0], F.conv2d(f, net.main_classifier.weight, net.main_classifier.bias))


def test_wrong_calls() -> None:
    for options, words in (
        ({"aux": True}, "out_channels"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"out_channels": 0}, "out_channels=0"),
        ({"hidden_channels": 7}, "hidden_channels=7"),
    ):
        with pytest.raises(RegardError, match=words):
            regard.create("dual", 16, **options)
    with pytest.raises(RegardError, match="eval"):
        head().train()(torch.randn(1, 16, 1, 1, dtype=torch.float64))
