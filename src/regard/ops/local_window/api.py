"""Neighbourhoods: checks done, the way chosen."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import require
from ...validate import check_divisible, check_floating, check_option
from .. import _dispatch
from . import opaque, reference, sdpa
from .window import Window

_dispatch.register("window_apply", "shifted", "tiles", "fused")
_dispatch.register("window_attention", "shifted", "blocks", "sdpa")
_dispatch.register("window_relate", "shifted")

# When upsampling, from this many channels of a group on, building the banded matrices of "tiles" pays. Measured on a CPU, k = 5, s = 2, forward and
# backward: 4 channels 17 ms shifted, 38 ms tiles; 16: 17, 15; 32: 17, 9; 64: 16, 7. With s = 1, k = 3 to 7, shifted wins or ties at all of them.
TILES_FROM = 24

# Windows of pixels: from this many multiply-adds a query and head on (k^2 times the mean width of keys and values), dense products of blocks, which
# compute 2 to 3.4 times too much, pay. Measured on a CPU, forward and backward, 28 x 28: k = 7, width 32 (1568) 67 ms shifted, 88 blocks; width 64
# (3136) 44, 36; width 128 49, 29; k = 3, width 64 (576) 13, 19; k = 11, width 32 (3872) 101, 69.
BLOCKS_FROM = 2500

TRITON = find_spec("triton") is not None

OPS = ("product", "squared", "absolute")


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
    plain, kernels = window.stride == 1 and window.dilation == 1, TRITON and v.device.type == "cuda"
    if kernels:
        automatic, why = "fused", "one Triton kernel over the shifts"
    elif plain and scale > 1 and v.shape[2] >= TILES_FROM and _dispatch.on_cpu(v):
        automatic, why = "tiles", "upsampling of many channels a group: a dense product for each tile"
    else:
        automatic, why = "shifted", "one multiply-add of maps for each shift"
    impl = _dispatch.choose("window_apply", automatic, why)
    require(impl != "tiles" or plain, "the tiles way of window_apply has no stride or dilation, got {}", window)
    require(impl != "fused" or kernels, "the fused way of window_apply needs Triton and a CUDA device, got {}; choose 'shifted'", v.device)
    _check_mirror(window, v)
    if impl == "reference":
        return reference.apply(w, v, window, scale)
    (v,), first = _mirrored(window, v)
    return opaque.window_apply(w, v, window.kernel_size, window.stride, window.dilation, first, scale, impl)


def _check_mirror(window: Window, like: Tensor) -> None:
    if window.padding == "reflect":
        longest = max(-window.first, _reach(window))
        require(min(like.shape[-2:]) > longest, "padding='reflect' needs a map longer than {} pixels, got {}", longest, tuple(like.shape[-2:]))


def _reach(window: Window) -> int:
    return window.first + window.dilation * (window.kernel_size - 1)


def _mirrored(window: Window, *maps: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Maps (B, G, C, H, W) with what the window sees beyond their borders, where it sees a mirror; where the window then begins."""
    if window.padding != "reflect":
        return maps, window.first
    pad = (-window.first, _reach(window)) * 2
    return tuple(F.pad(x.flatten(1, 2), pad, "reflect").unflatten(1, x.shape[1:3]) for x in maps), 0


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


def window_relate(q: Tensor, k: Tensor, window: Window, op: str = "product", *, scale: float = 1.0) -> Tensor:
    """How well each pixel goes with its neighbours, summed over the channels of a group.

    Args:
        q: (B, G, e, H', W'), at the output's pixels: H' = ceil(H / stride).
        k: (B, G, e, H, W). Outside the map lie zero keys ("zero"), mirror images ("reflect"), or nothing ("mask": minus infinity).
        op: scale sum q k ("product"), - scale sum (q - k)^2 ("squared"), - scale sum |q - k| ("absolute").

    Returns:
        (B, G, k^2, H', W'), in at least float32.
    """
    check_option(op, OPS, "op")
    _check_pixels(q, k, window)
    impl = _dispatch.choose("window_relate", "shifted", "one multiply-add of maps for each shift")
    if impl == "reference":
        return reference.relate(q, k, op, window, scale)
    (k,), first = _mirrored(window, k)
    return opaque.window_relate(q, k, op, window.kernel_size, window.stride, window.dilation, first, scale, window.padding == "mask")


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    *,
    block: int | None = None,
    rel: tuple[Tensor, Tensor] | None = None,
    mix: Tensor | None = None,
    scale: float = 1.0,
    rel_scale: float = 1.0,
) -> Tensor:
    """Softmax attention of every pixel to its own window, or, with `block`, of the queries of a block of the map to a window they share.

    logits = scale q . k + rel_scale (q . rel[0][i] + q . rel[1][j]), key (i, j) of the window; with `block` i is i - y + win - 1 and j is
    j - x + win - 1 for query (y, x) of the block.

    Args:
        q: (B, heads, d, H', W'), where H' = H / window.stride, as a strided convolution gives it.
        k, v: (B, heads, d, H, W), (B, heads, dv, H, W).
        window: with `block` its kernel_size is `win`, its offset_first from the block's first pixel. Pixels outside the map take part as zero vectors
            with padding="zero", not at all with "mask", as mirror images with "reflect" (not with `block`).
        block: side of a block, in pixels of k; the last blocks of a map may stick out. Needs `rel`.
        rel: tables of rows and columns, (kernel_size, d) each or one for each head, (heads, kernel_size, d); with `block` (2 win - 1, d).
        mix: (M, kernel_size^2): the value of a neighbour is sum_m mix[m, j] v_m, with v (B, heads, M dv, H, W), m first. Not with `block`.

    Returns:
        (B, heads, dv, H', W').
    """
    if block is None:
        return _attend_pixels(q, k, v, window, rel, mix, scale, rel_scale)
    tables = _check_blocks(q, k, rel, window, block)
    require(mix is None, "windows of blocks have no mix, got {}", mix)
    why = "some rows of blocks at a time; the weights are never kept" if _dispatch.on_cpu(q) else "the fused kernel of the device"
    impl = _dispatch.choose("window_attention", "blocks" if _dispatch.on_cpu(q) else "sdpa", why)
    require(impl != "shifted", "the shifted way of window_attention has a window for every pixel: block={} must be None", block)
    if impl == "reference":
        return reference.attend(q, k, v, tables, window, block, scale, rel_scale)
    if impl == "sdpa":
        return sdpa.attend(q, k, v, tables, window, block, scale, rel_scale)
    unused = window.kernel_size - block // window.stride  # first rows of the tables that no pair of a block and its window has
    flipped = torch.cat([table[unused:].flip(0) for table in tables]) * (rel_scale / scale)
    return opaque.window_attention(q, k, v, flipped, window.kernel_size, block, window.first, scale, window.padding == "mask")


def _attend_pixels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    rel: tuple[Tensor, Tensor] | None,
    mix: Tensor | None,
    scale: float,
    rel_scale: float,
) -> Tensor:
    tables = _tables(q, k, rel, window, rel_scale / scale)
    count = 1 if mix is None else mix.shape[0]
    require(v.ndim == 5 and v.shape[2] % count == 0, "v must be (batch, heads, {} times channels, height, width), got {}", count, tuple(v.shape))
    require(v.shape[:2] == k.shape[:2] and v.shape[3:] == k.shape[3:], "v must be a map like k {}, got {}", tuple(k.shape), tuple(v.shape))
    wanted = (count, window.kernel_size**2)
    require(mix is None or tuple(mix.shape) == wanted, "mix must be {}, got {}", wanted, None if mix is None else tuple(mix.shape))
    plain = window.stride == window.dilation == 1 and mix is None and window.padding != "reflect"
    shared = plain and (tables is None or tables.shape[0] == 1)
    if not _dispatch.on_cpu(q):
        automatic, why = ("sdpa", "the fused kernel of the device") if plain else ("shifted", "one multiply-add of maps for each shift")
    elif shared and window.kernel_size**2 * (q.shape[2] + v.shape[2]) >= 2 * BLOCKS_FROM:
        automatic, why = "blocks", "wide heads: dense products of blocks with windows, less a band"
    else:
        automatic, why = "shifted", "one multiply-add of maps for each channel and shift; the weights are never kept"
    impl = _dispatch.choose("window_attention", automatic, why)
    require(impl != "sdpa" or plain, "the sdpa way of window_attention has no stride, dilation, reflection or mix, got {}", window)
    require(impl != "blocks" or shared, "the blocks way of window_attention has neither those nor tables for each head, got {}", window)
    if impl == "reference":
        return reference.attend_pixels(q, k, v, tables, mix, window, scale)
    if impl == "sdpa":
        return sdpa.attend_pixels(q, k, v, tables, window, scale)
    (k, v), first = _mirrored(window, k, v)
    options = window.kernel_size, window.stride, window.dilation, first, scale, window.padding == "mask", impl == "blocks"
    return opaque.pixel_attention(q, k, v, tables, mix, *options)


def window_attention_weights(
    q: Tensor,
    k: Tensor,
    window: Window,
    *,
    block: int | None = None,
    rel: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    rel_scale: float = 1.0,
) -> Tensor:
    """The weights `window_attention` uses: (B, heads, kernel_size^2, H', W'); with `block` (B, heads, rows, columns, queries of a block, win^2)."""
    if block is not None:
        return reference.logits(q, k, _check_blocks(q, k, rel, window, block), window, block, scale, rel_scale).softmax(-1).to(q.dtype)
    tables = _tables(q, k, rel, window, rel_scale / scale)
    logits = window_relate(q, k, window, scale=scale)
    return (logits if tables is None else logits + reference.relative(q, tables, scale)).softmax(2).to(q.dtype)


def _check_pixels(q: Tensor, k: Tensor, window: Window) -> None:
    check_floating(q, "q")
    check_floating(k, "k")
    require(k.ndim == 5, "k must be (batch, heads, channels, height, width), got {}", tuple(k.shape))
    wanted = (*k.shape[:3], *(-(-n // window.stride) for n in k.shape[3:]))
    require(tuple(q.shape) == wanted, "q must be {} for k {}, got {}", wanted, tuple(k.shape), tuple(q.shape))
    _check_mirror(window, k)


def _tables(q: Tensor, k: Tensor, rel: tuple[Tensor, Tensor] | None, window: Window, scale: float) -> Tensor | None:
    """Rows, then columns, times `scale`: (heads or 1, 2 kernel_size, d)."""
    _check_pixels(q, k, window)
    if rel is None:
        return None
    (heads, d), size = q.shape[1:3], window.kernel_size
    for table in rel:
        ok = tuple(table.shape[-2:]) == (size, d) and (table.ndim == 2 or (table.ndim == 3 and table.shape[0] == heads))
        require(ok, "rel must have tables {} or {}, got {}", (size, d), (heads, size, d), tuple(table.shape))
    both = torch.cat(torch.broadcast_tensors(*rel), -2)
    return (both if both.ndim == 3 else both[None]) * scale


def _check_blocks(q: Tensor, k: Tensor, rel: tuple[Tensor, Tensor] | None, window: Window, block: int) -> tuple[Tensor, Tensor]:
    require(rel is not None, "windows of blocks need rel, two tables, got {}", rel)
    assert rel is not None
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
    return rel
