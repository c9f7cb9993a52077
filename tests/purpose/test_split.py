"""What the choice between branches is: alike branches share equally, and their order is of no matter."""

import pytest
import torch

import regard


@pytest.mark.slow
def test_alike_branches_share_equally() -> None:
    """Measured: weights exactly 1/2 each, with one and with two cardinal groups; output equal to one branch up to rounding."""
    for groups in (1, 2):
        torch.manual_seed(0)
        module, x = regard.create("split", 16, groups=groups).eval(), torch.randn(4, 16, 7, 9)
        # The branches see different channels: make those equal as well.
        x[:, 8:] = x[:, :8]
        if groups == 2:
            x = x.view(4, 4, 4, 7, 9)[:, :1].expand(-1, 4, -1, -1, -1).reshape(4, 16, 7, 9)
        with torch.no_grad():
            conv = module.branches.conv
            conv.weight[16:] = conv.weight[:16]
            rows = module.fc2.weight.view(groups, 2, 16 // groups, -1)
            rows[:, 1] = rows[:, 0]
            bias = module.fc2.bias.view(groups, 2, -1)
            bias[:, 1] = bias[:, 0]
            out, weights = module(x, return_weights=True)
            assert torch.equal(weights, torch.full_like(weights, 0.5))
            torch.testing.assert_close(out, module.branches(x)[:, :16], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_order_of_branches_is_of_no_matter() -> None:
    """Measured: swapping both branches' filters, norms, inputs and rows of W2 changes the output by rounding alone."""
    torch.manual_seed(0)
    module, x = regard.create("split", 16).eval(), torch.randn(4, 16, 7, 9)
    with torch.no_grad():
        before, swap = module(x), torch.arange(32).roll(16)
        for tensor in (module.branches.conv.weight, *module.branches.norm.parameters(), module.fc2.weight, module.fc2.bias):
            tensor.copy_(tensor[swap].clone())
        torch.testing.assert_close(module(x.roll(8, 1)), before, rtol=0, atol=1e-6)
        assert (module(x) - before).abs().max() > 0.01
