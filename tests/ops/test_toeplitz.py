"""Products with Toeplitz and block-Toeplitz masks: both ways equal the definition, in value and gradient, in runs of any length."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import RegardError
from regard.ops._dispatch import explain, use_impl
from regard.ops.linear_attention import toeplitz, toeplitz_mask, toeplitz_product

GRIDS = [(1,), (2,), (7,), (33,), (5, 6), (1, 4), (4, 1), (3, 4, 5), (2, 3, 2, 2)]


def inputs(grid, m=4, e=3, dtype=torch.float64, batch=3):
    torch.manual_seed(0)
    n = math.prod(grid)
    q, k, v = (torch.randn(batch, 2, n, width, dtype=dtype) for width in (m, m, e))
    return q, k, v, torch.randn(2, *(2 * s - 1 for s in grid), dtype=dtype)


def value_and_gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("limit", [1 << 18, 40])
@pytest.mark.parametrize("method", ["dense", "fft"])
def test_both_ways_equal_the_definition(monkeypatch, method, limit, grid, causal):
    monkeypatch.setattr(toeplitz, "budget", lambda x: limit)
    tensors = inputs(grid)
    with use_impl("reference"):
        expected = value_and_gradients(lambda *t: toeplitz_product(*t, causal=causal), tensors)
    for ours, theirs in zip(value_and_gradients(lambda *t: toeplitz_product(*t, causal=causal, method=method), tensors), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_the_mask_by_its_definition():
    """Entry by entry on a 2 x 3 grid, and causal means j <= i in the order of the positions."""
    table = torch.arange(15.0).view(1, 3, 5)
    mask = toeplitz_mask(table, torch.arange(6))[0]
    for i in range(6):
        for j in range(6):
            assert mask[i, j] == table[0, i // 3 - j // 3 + 1, i % 3 - j % 3 + 2]
    eye = torch.eye(6).expand(1, 1, 6, 6)
    ones = torch.ones(1, 1, 6, 1)
    for method in ("dense", "fft"):
        causal = toeplitz_product(ones, ones, eye, table + 1, causal=True, method=method)[0, 0]
        assert torch.allclose(causal, (mask + 1).tril(), atol=1e-5)


@pytest.mark.parametrize("n", [31, 67, 127, 301])
def test_single_precision_fft_at_odd_sizes(n):
    q, k, v, table = inputs((n,), 8, 9, torch.float32)
    dense, fft = (toeplitz_product(q, k, v, table, method=method) for method in ("dense", "fft"))
    assert (dense - fft).abs().max() <= 1e-5 * dense.abs().max()


def test_gradcheck():
    for method in ("dense", "fft"):
        tensors = [t.requires_grad_() for t in inputs((2, 3), 2, 2, batch=2)]
        assert torch.autograd.gradcheck(lambda *t, method=method: toeplitz_product(*t, causal=True, method=method), tensors)


def test_operator_contract():
    leaves = tuple(t.requires_grad_() for t in inputs((3, 4), dtype=torch.float32))
    for method in ("dense", "fft"):
        torch.library.opcheck(torch.ops.regard.toeplitz_product, (*leaves, False, method))


def test_no_buffer_above_32_megabytes_at_four_thousand():
    """All pairs of one head would be 64 MB."""
    from regard.workbench.measure import allocations

    q, k, v, table = inputs((4096,), 8, 9, torch.float32, batch=1)
    for method in ("dense", "fft"):
        with torch.no_grad():
            sizes = allocations(lambda method=method: toeplitz_product(q, k, v, table, method=method))
        assert max(sizes) < 8e6


def test_choice_follows_the_cost():
    short, long = inputs((64,), 16, 17, torch.float32), inputs((4096,), 4, 5, torch.float32, batch=1)

    class Call(torch.nn.Module):
        def forward(self, *tensors):
            return toeplitz_product(*tensors)

    assert explain(Call(), *short)[0].impl == "dense"
    assert explain(Call(), *long)[0].impl == "fft"
    assert toeplitz.dense_up_to(1, 32, 33, False) < toeplitz.dense_up_to(1, 32, 33, True) < toeplitz.dense_up_to(2, 32, 33, True)


def test_counted():
    q, k, v, table = inputs((64,), 4, 3, torch.float32)
    for method, count in (("dense", 2 * 6 * 64 * 64 * 7), ("fft", 2 * 6 * 12 * 64 * (5 * 7 + 2))):
        with FlopCounterMode(display=False) as counter:
            toeplitz_product(q, k, v, table, method=method)
        assert counter.get_total_flops() == count


def test_wrong_method():
    with pytest.raises(RegardError, match="method='slow'"):
        toeplitz_product(*inputs((4,)), method="slow")
