"""A convolution with its norm and ReLU, and choosing between branches."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard.errors import RegardError
from regard.parts.branches import branch_select, branch_weights, hidden_at_least, start_from_first
from regard.parts.conv_norm import ConvNorm


class Scaled(nn.Module):
    """A norm whose gradient needs its own output."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features, 1, 1))

    def forward(self, x):
        return torch.tanh(x * self.scale)


@pytest.mark.parametrize("norm", ["batch", None, Scaled])
@pytest.mark.parametrize("act", [True, False])
def test_is_its_three_steps(norm, act):
    torch.manual_seed(0)
    layer, x = ConvNorm(4, 6, 3, stride=2, dilation=2, groups=2, norm=norm, act=act), torch.randn(2, 4, 7, 9, requires_grad=True)
    expected = layer.norm(F.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=2, dilation=2, groups=2))
    expected = F.relu(expected) if act else expected
    out = layer(x)
    torch.testing.assert_close(out, expected)
    leaves = (x, *layer.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)))


def test_bias_and_padding():
    assert ConvNorm(2, 2).conv.bias is None and ConvNorm(2, 2, norm=None).conv.bias is not None
    assert ConvNorm(2, 2, bias=True).conv.bias is not None and ConvNorm(2, 2, norm=None, bias=False).conv.bias is None
    assert ConvNorm(2, 2, 5)(torch.randn(2, 2, 4, 3)).shape == (2, 2, 4, 3)
    assert ConvNorm(2, 2, 3, padding=0)(torch.randn(2, 2, 4, 3)).shape == (2, 2, 2, 1)
    assert ConvNorm(2, 2, momentum=0.3).norm.momentum == 0.3


def test_batch_norm_of_one_value_says_the_way_out():
    with pytest.raises(RegardError, match=r"eval\(\)"):
        ConvNorm(2, 2)(torch.randn(1, 2, 1, 1))
    assert ConvNorm(2, 2)(torch.randn(1, 2, 1, 2)).shape == (1, 2, 1, 2)


def test_select_is_a_weighted_sum():
    branches, weights = [torch.randn(2, 3, 4, 5) for _ in range(3)], torch.rand(2, 3, 3)
    expected = (torch.stack(branches, 1) * weights[..., None, None]).sum(1)
    torch.testing.assert_close(branch_select(branches, weights), expected)


def test_weights_and_their_start():
    logits, gain = torch.randn(2, 3, 4), torch.zeros(1)
    torch.testing.assert_close(branch_weights(logits).sum(1), torch.ones(2, 4))
    start = branch_weights(logits, gain)
    assert torch.equal(start[:, 0], torch.ones(2, 4)) and torch.equal(start[:, 1:], torch.zeros(2, 2, 4))
    torch.testing.assert_close(branch_weights(logits, gain + 1), branch_weights(logits))
    assert start_from_first(logits, None) is logits


def test_hidden_width_has_a_floor():
    assert [hidden_at_least(64, 4, 8, None), hidden_at_least(64, 16, 32, None), hidden_at_least(64, 16, 32, 5)] == [16, 32, 5]
    for wrong in ((64, 0, 8, None), (4, 16, 0, None), (64, 16, 32, 0)):
        with pytest.raises(RegardError):
            hidden_at_least(*wrong)
