"""Linear layers as convolutions: the same numbers, and when."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from regard.ops import _linear
from regard.parts.linear import Linear


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear, "SMALLEST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (16, 3, 6), (5, 6)])
@pytest.mark.parametrize("biased", [True, False])
def test_numbers_and_gradients_are_those_of_a_linear_layer(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(9, 6), torch.randn(9) if biased else None
    assert _linear._convolves(x, weight)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    ours, wanted = _linear.linear(x, weight, bias), F.linear(x, weight, bias)
    assert ours.shape == wanted.shape and ours.is_contiguous()
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    probe = torch.randn_like(wanted)
    for found, expected in zip(torch.autograd.grad(ours, leaves, probe), torch.autograd.grad(wanted, leaves, probe), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_written_by_hand() -> None:
    torch.manual_seed(0)
    grad, x, weight = torch.randn(32, 9), torch.randn(32, 6), torch.randn(9, 6)
    assert _linear._convolves(x, weight)
    dx, dweight = _linear.linear_gradients(grad, x, weight)
    torch.testing.assert_close(dx, grad @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dweight, grad.mT @ x, rtol=1e-5, atol=1e-5)


def test_work_is_counted_alike() -> None:
    x, layer = torch.randn(4, 5, 6), Linear(6, 9)
    counts = []
    for module in (layer, lambda t: F.linear(t, layer.weight, layer.bias)):
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        counts.append(counter.get_total_flops())
    # The gradient of x is not wanted, and only a convolution's formula knows it.
    assert counts[0] == counts[1] == 2 * 2 * 4 * 5 * 6 * 9


def test_what_stays_a_matrix_product() -> None:
    x, weight = torch.randn(4, 5, 6), torch.randn(9, 6)
    assert not _linear._convolves(x.double(), weight.double())
    assert not _linear._convolves(x.transpose(0, 1), weight)
    assert not _linear._convolves(x[0, :4], weight)  # few rows, much weight
    with torch.autocast("cpu", torch.bfloat16):
        assert not _linear._convolves(x, weight)
    torch.func.vmap(lambda t: _check_traced(t, weight))(x)
    program = torch.export.export(Linear(6, 9), (x,))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("linear" in name for name in names) and not any("conv" in name for name in names)


def _check_traced(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    assert not _linear._convolves(x, weight)
    return x


def test_one_thread_needs_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread torch takes its slow convolution for a single image."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert _linear._convolves(torch.randn(32, 6), torch.randn(9, 6))
    assert not _linear._convolves(torch.randn(33, 6), torch.randn(9, 6))
