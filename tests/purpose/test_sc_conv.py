"""What calibration is for: a field of view wider than that of the convolutions it is made of."""

import pytest
import torch

import regard


def _reach(out: torch.Tensor, x: torch.Tensor, at: int) -> int:
    (grad,) = torch.autograd.grad(out[:, :, at, at].sum(), x)
    rows, columns = grad.abs().sum((0, 1)).nonzero().unbind(1)
    return int(torch.maximum((rows - at).abs(), (columns - at).abs()).max())


@pytest.mark.slow
def test_field_of_view() -> None:
    """Measured: 8 pixels with windows of 4, where the two plain convolutions of the same module reach 2 (the specification: at least 5)."""
    torch.manual_seed(0)
    module, x = regard.create("sc_conv", 8).double().eval(), torch.randn(1, 8, 33, 33, dtype=torch.float64, requires_grad=True)
    calibrated, plain = _reach(module(x), x, 16), _reach(module.k4(module.k3(x)), x, 16)
    print("reach", calibrated, "plain", plain)
    assert plain == 2
    assert calibrated >= 5
