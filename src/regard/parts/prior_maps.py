"""Score maps of a single-shot detector as rows, one for each prior box, beside the same maps pooled."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import require, require_type
from ..validate import check_floating


def context_pool(
    maps: Sequence[Tensor],
    anchors: int | Sequence[int],
    dim: int,
    kernel: int | Sequence[int] = (3, 2, 2, 2, 1, 1),
    stride: int | Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """What "context_transformer" takes: the scores of all prior boxes, and those of every scale after max-pooling over space.

    Args:
        maps: one a scale, (B, anchors * dim, H, W), the channels of an anchor together.
        anchors: boxes per position, for each scale or for all.
        dim: scores per box.
        kernel, stride: of the pooling, for each scale or for all; entries beyond the number of maps are not used. stride=None means kernel.

    Returns:
        (B, P, dim) and (B, M, dim): scale after scale, in each row after row, in each position anchor after anchor.

    Raises:
        RegardError: there is no map, a map does not fit, or an argument has too few entries.
    """
    require_type(isinstance(maps, list | tuple), "maps must be a list of tensors, got {}", type(maps).__name__)
    require(len(maps) > 0, "maps is empty; give one score map a scale")
    counts = _each(anchors, len(maps), "anchors")
    sides = _each(kernel, len(maps), "kernel")
    strides = sides if stride is None else _each(stride, len(maps), "stride")
    for at, (x, count) in enumerate(zip(maps, counts, strict=False)):
        name = f"maps[{at}]"
        check_floating(x, name)
        fits = x.ndim == 4 and x.shape[1] == count * dim and min(x.shape[2:]) > 0 and x.shape[0] == maps[0].shape[0]
        require(fits, "{} must be ({}, {} anchors * {}, height, width), got {}", name, maps[0].shape[0], count, dim, tuple(x.shape))
    pooled = [F.max_pool2d(x, k, s, ceil_mode=True) if k > 1 or s > 1 else x for x, k, s in zip(maps, sides, strides, strict=False)]
    rows, context = (torch.cat([x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, dim) for x in given], 1) for given in (maps, pooled))
    return rows, context


def _each(value: int | Sequence[int], count: int, name: str) -> list[int]:
    numbers = [value] if isinstance(value, int) else value
    whole = isinstance(numbers, Sequence) and all(isinstance(n, int) for n in numbers)
    require_type(whole, "{}={!r} must be a whole number, or one for each map", name, value)
    values = [value] * count if isinstance(value, int) else list(value)
    require(len(values) >= count, "{}={} has {} entries for {} maps", name, value, len(values), count)
    require(min(values) > 0, "{}={} must be at least 1", name, value)
    return values[:count]
