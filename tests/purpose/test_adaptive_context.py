"""What gates of its own are for: every position takes exactly the regions it asks for."""

import pytest
import torch
import torch.nn.functional as F

import regard


def plain(scale: int):
    """One scale whose layers pass what they get: z is read as the output less the input."""
    module = regard.create("adaptive_context", 5, hidden_channels=5, scales=scale, fusion=False, norm=None)
    with torch.no_grad():
        for layer in (module.pooled[0], module.input[0], module.residual[0]):
            layer.conv.weight.copy_(torch.eye(5)[:, :, None, None])
            layer.conv.bias.zero_()
        module.glob[0].conv.weight.zero_()
        module.glob[0].conv.bias.zero_()
    return module


@pytest.mark.slow
def test_gates_open_to_all_regions_or_to_the_one_that_a_code_names() -> None:
    """Measured: all gates open, the sum of the regions; gates of +-50 from a code, the one region named; both to 1e-6."""
    torch.manual_seed(0)
    code = torch.randint(4, (2, 6, 8))
    x = torch.cat((F.one_hot(code, 4).movedim(3, 1).float(), torch.rand(2, 1, 6, 8)), 1)
    regions, module = F.adaptive_avg_pool2d(x, 2).flatten(2), plain(2)
    with torch.no_grad():
        module.affinity[0].weight.zero_()
        module.affinity[0].bias.fill_(50)
        torch.testing.assert_close(module(x) - x, regions.sum(2)[:, :, None, None].expand_as(x))
        module.affinity[0].weight.copy_(F.pad(100 * torch.eye(4), (0, 1)))
        module.affinity[0].bias.fill_(-50)
        named = torch.gather(regions, 2, code.flatten(1)[:, None].expand(-1, 5, -1)).view_as(x)
        torch.testing.assert_close(module(x) - x, named)
