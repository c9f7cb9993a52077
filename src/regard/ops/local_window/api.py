"""Neighbourhoods: checks done, the way chosen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import require
from ...validate import check_divisible, check_floating, check_option
from .. import _dispatch
from . import opaque, reference, sdpa
from .window import Window

_dispatch.register("window_apply", "shifted", "tiles")
_dispatch.register("window_attention", "blocks", "sdpa")

# When upsampling, from this many channels of a group on, building the banded matrices of "tiles" pays. Measured on a CPU, k = 5, s = 2, forward and
# backward: 4 channels 17 ms shifted, 38 ms tiles; 16: 17, 15; 32: 17, 9; 64: 16, 7. With s = 1, k = 3 to 7, shifted wins or ties at all of them.
TILES_FROM = 24


def window_apply(weights: Tensor, values: Tensor, window: Window, *, groups: str = "contiguous", scale_factor: int = 1) -> Tensor:
    """y[c, p] = sum over the window j of weights[g(c), j, p] values[c, p_j].

    Args:
        weights: (B, G, k^2, H', W'), or with scale_factor=s (B, G, k^2, s^2, H, W): those of the s x s output pixels over a source pixel.
        values: (B, C, H, W).
        window: where p_j is; a pixel outside the map has the value zero, or that of its mirror image with padding="reflect".
        groups: g(c) is c // (C / G) ("contiguous") or c % G ("interleaved").
        scale_factor: s; the output is (B, C, s H, s W) and its pixel (Y, X) has the window of (Y // s, X // s).
    """
    check_floating(weights, "weights")
    check_floating(values, "values")
    check_option(groups, ("contiguous", "interleaved"), "groups")
    require(scale_factor >= 1, "scale_factor={} must be a whole number of at least 1", scale_factor)
    require(values.ndim == 4, "values must be (batch, channels, height, width), got {}", tuple(values.shape))
    if scale_factor == 1 and weights.ndim == 5:
        weights = weights.unsqueeze(3)
    (batch, channels, *space), k, s = values.shape, window.kernel_size, scale_factor
    count = weights.shape[1] if weights.ndim == 6 else 1
    wanted = (batch, count, k * k, s * s, *(-(-n // window.stride) for n in space))
    require(tuple(weights.shape) == wanted, "weights must be {}, got {}", wanted, tuple(weights.shape))
    require(s == 1 or window.stride == 1, "scale_factor={} needs a window of stride 1, got {}", s, window.stride)
    check_divisible(channels, count, "channels", "groups")
    v = values.unflatten(1, (count, -1)) if groups == "contiguous" else values.unflatten(1, (-1, count)).transpose(1, 2)
    out = _apply(weights, v, window, s)
    return (out if groups == "contiguous" else out.transpose(1, 2)).flatten(1, 2)


def _apply(w: Tensor, v: Tensor, window: Window, scale: int) -> Tensor:
    plain = window.stride == 1 and window.dilation == 1
    tiled = plain and scale > 1 and v.shape[2] >= TILES_FROM and _dispatch.on_cpu(v)
    why = "upsampling of many channels a group: a dense product for each tile" if tiled else "one multiply-add of maps for each shift"
    impl = _dispatch.choose("window_apply", "tiles" if tiled else "shifted", why)
    require(impl != "tiles" or plain, "the tiles way of window_apply has no stride or dilation, got {}", window)
    reach = window.first + window.dilation * (window.kernel_size - 1)
    if window.padding == "reflect":
        longest = max(-window.first, reach)
        require(min(v.shape[-2:]) > longest, "padding='reflect' needs a map longer than {} pixels, got {}", longest, tuple(v.shape[-2:]))
    if impl == "reference":
        return reference.apply(w, v, window, scale)
    first = window.first
    if window.padding == "reflect":
        v, first = F.pad(v.flatten(1, 2), (-first, reach, -first, reach), "reflect").unflatten(1, v.shape[1:3]), 0
    return opaque.window_apply(w, v, window.kernel_size, window.stride, window.dilation, first, scale, impl == "tiles")


def carafe(x: Tensor, weights: Tensor, up_kernel: int, up_group: int = 1, scale_factor: int = 2) -> Tensor:
    """Upsampling with given kernels: y[c, Y, X] = sum_j weights[g(c), j, Y, X] x[c, (Y, X) // s + j]; pixels outside the map are zero.

    Args:
        x: (B, C, H, W).
        weights: (B, up_group, up_kernel^2, s H, s W), or (B, up_group up_kernel^2, s H, s W) as mmcv has them; not normalised here.
        up_kernel, up_group, scale_factor: k (odd), groups of contiguous channels, s.

    Returns:
        (B, C, s H, s W).
    """
    check_floating(x)
    check_floating(weights, "weights")
    require(up_kernel % 2 == 1 and up_kernel > 0, "up_kernel={} must be odd", up_kernel)
    require(isinstance(scale_factor, int) and scale_factor >= 1, "scale_factor={} must be a whole number of at least 1", scale_factor)
    require(x.ndim == 4, "x must be (batch, channels, height, width), got {}", tuple(x.shape))
    check_divisible(x.shape[1], up_group, "channels", "up_group")
    s, k = scale_factor, up_kernel
    batch, _, height, width = x.shape
    flat = weights.flatten(1, 2) if weights.ndim == 5 else weights
    wanted = (batch, up_group * k * k, s * height, s * width)
    require(tuple(flat.shape) == wanted, "weights must be {} for a map of {}, got {}", wanted, (height, width), tuple(weights.shape))
    phases = F.pixel_unshuffle(flat, s).unflatten(1, (up_group, k * k, s * s))
    return window_apply(phases, x, Window(k), scale_factor=s)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: Window, *, block: int, rel: tuple[Tensor, Tensor], scale: float = 1.0, rel_scale: float = 1.0
) -> Tensor:
    """Softmax attention where the queries of a block of the map share one window of keys.

    logits = scale q . k + rel_scale (q . rel[0][i - y + win - 1] + q . rel[1][j - x + win - 1]), query (y, x) of a block, key (i, j) of its window.

    Args:
        q: (B, heads, d, H', W'), where H' = H / window.stride, as a strided convolution gives it.
        k, v: (B, heads, d, H, W), (B, heads, dv, H, W).
        window: its kernel_size is `win`, its offset_first from the block's first pixel. Pixels outside the map take part as zero vectors with
            padding="zero", not at all with "mask".
        block: side of a block, in pixels of k; the last blocks of a map may stick out.
        rel: tables of rows and columns, (2 win - 1, d) each.

    Returns:
        (B, heads, dv, H', W').
    """
    _check_blocks(q, k, rel, window, block)
    why = "some rows of blocks at a time; the weights are never kept" if _dispatch.on_cpu(q) else "the fused kernel of the device"
    impl = _dispatch.choose("window_attention", "blocks" if _dispatch.on_cpu(q) else "sdpa", why)
    if impl == "reference":
        return reference.attend(q, k, v, rel, window, block, scale, rel_scale)
    if impl == "sdpa":
        return sdpa.attend(q, k, v, rel, window, block, scale, rel_scale)
    unused = window.kernel_size - block // window.stride  # first rows of the tables that no pair of a block and its window has
    tables = torch.cat([table[unused:].flip(0) for table in rel]) * (rel_scale / scale)
    return opaque.window_attention(q, k, v, tables, window.kernel_size, block, window.first, scale, window.padding == "mask")


def window_attention_weights(
    q: Tensor, k: Tensor, window: Window, *, block: int, rel: tuple[Tensor, Tensor], scale: float = 1.0, rel_scale: float = 1.0
) -> Tensor:
    """The weights `window_attention` uses, (B, heads, rows, columns, queries of a block, win^2)."""
    _check_blocks(q, k, rel, window, block)
    return reference.logits(q, k, rel, window, block, scale, rel_scale).softmax(-1).to(q.dtype)


def _check_blocks(q: Tensor, k: Tensor, rel: tuple[Tensor, Tensor], window: Window, block: int) -> None:
    win, (height, width) = window.kernel_size, k.shape[-2:]
    check_divisible(block, window.stride, "block", "stride")
    require(window.dilation == 1 and window.padding != "reflect", "blocks have windows without dilation or reflection, got {}", window)
    covers = win + window.first >= block and window.first <= 0
    require(covers, "a window of {} from {} does not cover its block of {}", win, window.first, block)
    wanted = (*q.shape[:2], q.shape[2], -(-height // window.stride), -(-width // window.stride))
    require(tuple(q.shape) == wanted, "q must be {} for k {}, got {}", wanted, tuple(k.shape), tuple(q.shape))
    for table in rel:
        wanted = (2 * win - 1, q.shape[2])
        require(tuple(table.shape) == wanted, "rel must have tables {}, got {}", wanted, tuple(table.shape))
