"""Regions of maps: every way equals brute force and the definition, for bins that divide the map and bins that do not."""

import math

import pytest
import torch
import torch.nn.functional as F

from regard.errors import RegardError
from regard.ops._dispatch import explain, use_impl
from regard.ops.region_pool import pool_boxes, pool_regions, pool_windows, spread_convolved, spread_regions

SIZES = ((9, 13), (12, 7), (12, 6), (1, 1), (4, 7))
LEVELS = (1, 2, 6, 3)


def brute(x, sizes, reduce):
    h, w = x.shape[2:]
    bins = [(i * h // n, math.ceil((i + 1) * h / n), j * w // n, math.ceil((j + 1) * w / n)) for n in sizes for i in range(n) for j in range(n)]
    return torch.stack([reduce(x[:, :, a:b, c:d].flatten(2)) for a, b, c, d in bins], 2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("last", [False, True])
def test_means_and_maxima_are_brute_force(size, last):
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    torch.testing.assert_close(pool_regions(x, LEVELS), brute(x, LEVELS, lambda t: t.mean(2)))
    torch.testing.assert_close(pool_regions(x, LEVELS, "max"), brute(x, LEVELS, lambda t: t.amax(2)), rtol=0, atol=0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_spreading_is_interpolation(size, align_corners):
    regions = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    found = spread_regions(regions, size, align_corners=align_corners)
    expected = F.interpolate(regions, size, mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(out, regions, cotangent) for out in (found, expected)))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_convolving_regions_is_convolving_their_spread_maps(size, align_corners):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, *size), (2, 3, 1, 1), (2, 2, 5, 5), (4, 5, 3, 3))
    onto, a, b, weight = (torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    results = []
    for impl in ("separable", "reference"):
        with use_impl(region_pool=impl):
            out = spread_convolved(onto, (a, b), weight, align_corners=align_corners)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (onto, a, b, weight))))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_half_precision_sums_in_float32_and_autocast_does_not_spoil_it():
    x = torch.full((1, 1, 64, 64), 100.0)
    assert pool_regions(x.half(), (1,)).item() == 100
    x = torch.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pool_regions(x, LEVELS), brute(x, LEVELS, lambda t: t.mean(2)))


def test_the_choice_is_explained():
    class Pool(torch.nn.Module):
        def forward(self, x, kind):
            return pool_regions(x, LEVELS, kind)

    x = torch.randn(1, 2, 12, 12)
    assert [c.impl for c in explain(Pool(), x, "mean")] == ["separable"] and [c.impl for c in explain(Pool(), x.bfloat16(), "mean")] == ["reference"]
    assert [c.impl for c in explain(Pool(), x, "max")] == ["nested"]


def test_nested_maxima_take_the_gradient_of_the_definition():
    x = torch.randn(2, 3, 12, 6, requires_grad=True)
    found = []
    for impl in ("nested", "reference"):
        with use_impl(region_pool=impl):
            out = pool_regions(x, (1, 2, 3, 6), "max")
        found.append(torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), x)[0])
    torch.testing.assert_close(*found)


def test_windows_and_boxes():
    x = torch.randn(2, 3, 13, 13)
    torch.testing.assert_close(pool_windows(x, (3,)), F.max_pool2d(x, 5, 4).flatten(2))
    torch.testing.assert_close(pool_windows(x, (2,), "mean"), F.avg_pool2d(x, 7, 6).flatten(2))
    for n in (5, 14):
        with pytest.raises(RegardError, match=f"level {n}"):
            pool_windows(x, (n,))
    found = pool_boxes(x, [[1, 2, 3, 9, 4], [0, 0, 0, 13, 13]], (2, 1))
    torch.testing.assert_close(found[:1], brute(x[1:, :, 2:9, 3:4], (2, 1), lambda t: t.amax(2)))
    torch.testing.assert_close(found[1:], brute(x[:1], (2, 1), lambda t: t.amax(2)))
    assert pool_boxes(x, [], (2, 1)).shape == (0, 3, 5)
