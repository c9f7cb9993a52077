"""What the two branches see: the spatial one a dilated window, the channel one the whole map alike."""

import pytest
import torch

import regard


@pytest.mark.slow
def test_gate_sees_a_window_and_the_mean() -> None:
    """Measured: the gate's gradient varies up to exactly 8 pixels from it, and is the same small value everywhere beyond (spread 0)."""
    torch.manual_seed(0)
    module = regard.create("bam", 16, reduction=4).double().eval()
    x = torch.randn(1, 16, 25, 25, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x, return_weights=True)[1][0, :, 12, 12].sum(), x)
    far = grad[0, :, 0, 0]
    differs = ((grad[0] - far[:, None, None]).abs() > 1e-12).any(0)
    rows, columns = differs.nonzero().unbind(1)
    reach = int(torch.maximum((rows - 12).abs(), (columns - 12).abs()).max())
    print("reach", reach, "beyond it", far.abs().max().item(), "within it", grad.abs().max().item())
    assert reach == 8
    assert 0 < far.abs().max() < grad.abs().max()
