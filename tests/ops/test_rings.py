"""Sums over rings of a map: every way equals the definition, in value and gradient, at any size of map and any number of rings."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard.errors import RegardError
from regard.ops._dispatch import explain, use_impl
from regard.ops.linear_attention import ring_product, ring_weights, rings

MAPS = [(1, 1), (1, 7), (7, 1), (5, 8), (17, 9), (8, 8), (3, 70), (9, 30)]


def inputs(height, width, count, m=4, e=3, dtype=torch.float64, batch=2):
    torch.manual_seed(0)
    n = height * width
    return (*(torch.randn(batch, 2, n, w, dtype=dtype) for w in (m, m, e)), torch.rand(batch, 2, n, count + 1, dtype=dtype))


def value_and_gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


@pytest.mark.parametrize("count", [1, 2, 4, 11])
@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("limit", [1 << 18, 40])
def test_all_ways_equal_the_definition(monkeypatch, limit, size, count):
    monkeypatch.setattr(rings, "budget", lambda x: limit)
    tensors = inputs(*size, count)
    with use_impl("reference"):
        expected = value_and_gradients(lambda *t: ring_product(*t, *size), tensors)
    for method in ("dense", "window", "sat"):
        for ours, theirs in zip(value_and_gradients(lambda *t, m=method: ring_product(*t, *size, method=m), tensors), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-10), method


def test_rings_by_their_definition():
    weights = torch.tensor([5.0, 3.0, 1.0]).expand(1, 1, 12, 3)
    spread = ring_weights(weights, torch.arange(12), 3, 4)[0, 0].view(3, 4, 3, 4)
    for y in range(3):
        for x in range(4):
            for b in range(3):
                for a in range(4):
                    assert spread[y, x, b, a] == (5.0, 3.0, 1.0, 1.0)[max(abs(y - b), abs(x - a))]


def test_large_maps_keep_their_digits():
    """A table of float32 would lose three digits where small boxes are differences of sums over a large positive map."""
    tensors = [t.abs() for t in inputs(200, 200, 3, 1, 2, torch.float32, batch=1)]
    tensors[3][..., -1] = 0.0  # nothing of the map beyond the rings
    expected = ring_product(*(t.double() for t in tensors), 200, 200, method="window")
    for method in ("window", "sat"):
        assert ((ring_product(*tensors, 200, 200, method=method) - expected).abs() / expected).max() < 3e-6, method


def test_operator_contract():
    leaves = tuple(t.requires_grad_() for t in inputs(9, 10, 2, dtype=torch.float32))
    for method in ("dense", "window", "sat"):
        torch.library.opcheck(torch.ops.regard.ring_product, (*leaves, 9, 10, method))


def test_no_buffer_above_32_megabytes():
    from regard.workbench.measure import allocations

    tensors = inputs(64, 64, 4, 8, 9, torch.float32, batch=1)
    for method in ("window", "sat"):
        with torch.no_grad():
            sizes = allocations(lambda method=method: ring_product(*tensors, 64, 64, method=method))
        assert max(sizes) < 16e6, method


def test_choice_follows_the_cost():
    class Call(torch.nn.Module):
        def forward(self, *tensors):
            return ring_product(*tensors)

    for size, count, m, e, impl in (((8, 8), 4, 16, 17, "dense"), ((32, 32), 4, 16, 17, "window"), ((40, 40), 8, 2, 3, "sat")):
        assert explain(Call(), *inputs(*size, count, m, e, torch.float32), *size)[0].impl == impl


def test_counted():
    tensors = inputs(20, 20, 3, 4, 3, torch.float32)
    for method, pairs in (("dense", 400 * 7), ("window", 12 * 12 * 7 + 24), ("sat", 3 * 12 + 24)):
        with FlopCounterMode(display=False) as counter:
            ring_product(*tensors, 20, 20, method=method)
        assert counter.get_total_flops() == 2 * 4 * 400 * pairs


def test_wrong_method():
    with pytest.raises(RegardError, match="method='slow'"):
        ring_product(*inputs(2, 2, 1), 2, 2, method="slow")
