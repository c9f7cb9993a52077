"""Samples off the grid: checks done, the way chosen."""

from torch import Tensor

from ...errors import require
from ...validate import check_divisible, check_floating
from .. import _dispatch
from . import gather, reference

for _name in ("deform_unfold", "deform_apply", "deform_conv2d"):
    _dispatch.register(_name, "gather")

Pair = int | tuple[int, int]
WHY = "rows of channels gathered by index; samples are made again in the backward"


def deform_unfold(
    x: Tensor, offset: Tensor, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, offset_groups: int = 1
) -> Tensor:
    """The samples of a deformable convolution (DCN v1), as `torch.nn.functional.unfold` gives those of a plain one.

    Tap t = (a, b) of output p lies at stride p - padding + dilation (a, b) + offset_t(p), row and column, between four pixels: their bilinear mean,
    where what is outside the map counts as 0, and so does a sample whose place is not a number. The gradient of the offset is that of the four
    pixels: on a pixel, towards the next one; 0 for a sample not above -1, or not below the map's size.

    Args:
        x: (B, C, H, W).
        offset: (B, 2 offset_groups k k, H', W'): for each offset group and tap, row by row, what is added to the row, then to the column.
        kernel_size, stride, padding, dilation: whole numbers, or pairs of them (rows, columns); kernel_size is odd.
        offset_groups: groups of C / offset_groups contiguous channels that have offsets of their own.

    Returns:
        (B, C k k, H' W'), channel c k k + t.
    """
    kernel = _odd(kernel_size, "kernel_size")
    geometry = _geometry(x, offset, kernel, stride, padding, dilation, offset_groups)
    if _dispatch.choose("deform_unfold", "gather", WHY) == "reference":
        return reference.sample(x, offset, kernel, *geometry, offset_groups).flatten(1, 2).to(x.dtype)
    return gather.deform_unfold(x, offset, kernel, *geometry, offset_groups)


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    offset_groups: int = 1,
) -> Tensor:
    """Deformable convolution: v1, or v2 with a mask. y[o] = bias[o] + sum over c, t of weight[o, c, t] mask[t] sample[c, t].

    Args:
        x, offset, stride, padding, dilation, offset_groups: see `deform_unfold`.
        weight: (O, C / groups, k, k), k odd; bias: (O,).
        mask: (B, offset_groups k k, H', W'), a factor for every sample.
        groups: of the convolution.

    Returns:
        (B, O, H', W').
    """
    check_floating(weight, "weight")
    require(weight.ndim == 4, "weight must be (out_channels, channels / groups, height, width), got {}", tuple(weight.shape))
    kernel = _odd((weight.shape[2], weight.shape[3]), "the kernel")
    geometry = _geometry(x, offset, kernel, stride, padding, dilation, offset_groups)
    check_divisible(x.shape[1], groups, "channels", "groups")
    check_divisible(weight.shape[0], groups, "out_channels", "groups")
    wanted = (weight.shape[0], x.shape[1] // groups, *kernel)
    require(tuple(weight.shape) == wanted, "weight must be {} for x {} and groups={}, got {}", wanted, tuple(x.shape), groups, tuple(weight.shape))
    if bias is not None:
        require(tuple(bias.shape) == (weight.shape[0],), "bias must be {}, got {}", (weight.shape[0],), tuple(bias.shape))
    if mask is not None:
        check_floating(mask, "mask")
        wanted = (x.shape[0], offset_groups * kernel[0] * kernel[1], *offset.shape[2:])
        require(tuple(mask.shape) == wanted, "mask must be {}, got {}", wanted, tuple(mask.shape))
    if _dispatch.choose("deform_conv2d", "gather", WHY) == "reference":
        u = reference.sample(x, offset, kernel, *geometry, offset_groups)
        if mask is not None:
            u = (u.unflatten(1, (offset_groups, -1)) * mask.flatten(2).unflatten(1, (offset_groups, 1, -1))).flatten(1, 2)
        y = reference.convolve(weight, u, groups).to(x.dtype)
    else:
        y = gather.deform_convolve(x, offset, weight, mask, *geometry, groups, offset_groups)
    y = y if bias is None else y + bias
    return y.mT.unflatten(2, offset.shape[2:])


def deform_apply(weights: Tensor, x: Tensor, offset: Tensor, kernel_size: Pair, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1) -> Tensor:
    """Samples with weights of every output's own: y[c, p] = sum over t of weights[c // (C / G), t, p] sample[c, t, p].

    Args:
        weights: (B, G, k k, H', W').
        x, offset, kernel_size, stride, padding, dilation: see `deform_unfold`; one offset group.

    Returns:
        (B, C, H', W').
    """
    kernel = _odd(kernel_size, "kernel_size")
    geometry = _geometry(x, offset, kernel, stride, padding, dilation, 1)
    check_floating(weights, "weights")
    groups = weights.shape[1] if weights.ndim == 5 else 1
    wanted = (x.shape[0], groups, kernel[0] * kernel[1], *offset.shape[2:])
    require(tuple(weights.shape) == wanted, "weights must be {}, got {}", wanted, tuple(weights.shape))
    check_divisible(x.shape[1], groups, "channels", "groups")
    if _dispatch.choose("deform_apply", "gather", WHY) == "reference":
        y = reference.apply(weights.flatten(3), reference.sample(x, offset, kernel, *geometry, 1)).to(x.dtype)
    else:
        y = gather.deform_apply(weights, x, offset, kernel, *geometry)
    return y.mT.unflatten(2, offset.shape[2:])


def _pair(value: Pair) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _odd(kernel_size: Pair, name: str) -> list[int]:
    kernel = _pair(kernel_size)
    require(len(kernel) == 2 and min(kernel) > 0 and all(k % 2 for k in kernel), "{}={} must be odd", name, kernel_size)
    return kernel


def _geometry(
    x: Tensor, offset: Tensor, kernel: list[int], stride: Pair, padding: Pair, dilation: Pair, offset_groups: int
) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation as pairs, all shapes found right."""
    check_floating(x)
    check_floating(offset, "offset")
    require(x.ndim == 4, "x must be (batch, channels, height, width), got {}", tuple(x.shape))
    check_divisible(x.shape[1], offset_groups, "channels", "offset_groups")
    pairs = _pair(stride), _pair(padding), _pair(dilation)
    for pair, name, least in zip(pairs, ("stride", "padding", "dilation"), (1, 0, 1), strict=True):
        require(len(pair) == 2 and min(pair) >= least, "{}={} must be a whole number of at least {}, or two", name, pair, least)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x.shape[2:], kernel, *pairs, strict=True)]
    require(min(size) > 0, "a kernel of {} with dilation {} and padding {} does not fit {}", kernel, pairs[2], pairs[1], tuple(x.shape))
    wanted = (x.shape[0], 2 * offset_groups * kernel[0] * kernel[1], *size)
    require(tuple(offset.shape) == wanted, "offset must be {} for x {}, got {}", wanted, tuple(x.shape), tuple(offset.shape))
    return pairs
