"""1x1 convolutions on maps in either layout."""

import pytest
import torch
import torch.nn.functional as F

from regard.parts import spatial
from regard.parts.spatial import flatten_space, project_columns, project_rows


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(256, 64), (64, 256), (7, 5)])
@pytest.mark.parametrize("biased", [True, False])
def test_projections_are_the_convolution(monkeypatch, shape: tuple[int, int], layout: torch.memory_format, biased: bool) -> None:
    """Wide ones of a contiguous map go through a convolution, others through a matrix product: the numbers and gradients are the same."""
    torch.manual_seed(0)
    monkeypatch.setattr(spatial, "SMALLEST", 0)
    inner, outer = shape
    x, weight, bias = torch.randn(2, inner, 3, 5).to(memory_format=layout), torch.randn(outer, inner) * inner**-0.5, torch.randn(outer)
    leaves = [t.requires_grad_() for t in ([x, weight, bias] if biased else [x, weight])]
    wanted = F.conv2d(x.double(), weight.double()[:, :, None, None], bias.double() if biased else None).flatten(2)
    probe = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, leaves, probe)
    assert spatial._convolves(x.flatten(2), weight) == (inner != 7 and layout == torch.contiguous_format)
    columns = project_columns(x.flatten(2), weight, bias if biased else None)
    rows = project_rows(flatten_space(x), weight, bias if biased else None)
    assert columns.is_contiguous() and rows.is_contiguous()
    for out in (columns, rows.mT):
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(out, leaves, probe.float()), expected, rtol=1e-4, atol=1e-4)


def test_what_stays_a_product() -> None:
    """Little work, few outputs, maps whose copies would be large, double precision."""
    columns, weight = torch.empty(1, 256, 1024), torch.empty(64, 256)
    assert spatial._convolves(columns, weight)
    assert not spatial._convolves(columns[..., :1000], weight)
    assert not spatial._convolves(columns, weight[:63])
    assert not spatial._convolves(columns.expand(17, -1, -1), weight)
    assert not spatial._convolves(columns.double(), weight.double())
