"""Attention of blocks by the fused kernel of the device: windows copied, the relative term as its additive bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window, join, split

SIDE = 8  # of the blocks through which windows of pixels are computed


def attend(q: Tensor, k: Tensor, v: Tensor, rel: tuple[Tensor, Tensor], window: Window, block: int, scale: float, rel_scale: float) -> Tensor:
    win, side = window.kernel_size, block // window.stride
    at, seen = torch.arange(side, device=q.device), torch.arange(win, device=q.device)
    tables = [table[None, seen - at[:, None] + win - 1] * rel_scale for table in rel]
    return _attend(q, k, v, tables, None, window, block, scale)


def attend_pixels(q: Tensor, k: Tensor, v: Tensor, rel: Tensor | None, window: Window, scale: float) -> Tensor:
    """A window of its own for every pixel, as a band of its block's window; rel (N or 1, 2 k, d)."""
    shared = Window(SIDE + window.kernel_size - 1, padding=window.padding, offset_first=window.first)
    at, seen = torch.arange(SIDE, device=q.device), torch.arange(shared.kernel_size, device=q.device)
    place = seen - at[:, None]
    band = (place >= 0) & (place < window.kernel_size)
    place = place.clamp(0, window.kernel_size - 1)
    tables = None if rel is None else [table[:, place] * scale for table in rel.chunk(2, 1)]
    return _attend(q, k, v, tables, band, shared, SIDE, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor] | None, band: Tensor | None, window: Window, block: int, scale: float) -> Tensor:
    """Tables of rows and columns (N or 1, side, win, d); band (side, win), True where a row (column) of the block sees one of the window."""
    win, side = window.kernel_size, block // window.stride
    (height, width), dv = q.shape[-2:], v.shape[2]
    rows, columns = -(-height // side), -(-width // side)
    q, keys, values = (
        split(x, *cut, rows, columns).flatten(-2).permute(0, 2, 3, 1, 5, 4).flatten(0, 2)
        for x, cut in ((q, (side, side, 0)), (k, (win, block, window.first)), (v, (win, block, window.first)))
    )
    bias = q.new_zeros(1, 1, side**2, win**2)
    lost = torch.finfo(q.dtype).min / 2  # finite: a block's pixels that stick out of the map may see nothing at all
    if tables is not None:
        pixels, (high, wide) = q.unflatten(2, (side, side)), (table.expand(q.shape[1], -1, -1, -1) for table in tables)
        bias = torch.einsum("bnyxd,nywd->bnyxw", pixels, high)[..., :, None] + torch.einsum("bnyxd,nxwd->bnyxw", pixels, wide)[..., None, :]
        bias = bias.flatten(-2).flatten(2, 3).to(q.dtype)
    if band is not None:
        seen = band[:, None, :, None] & band[None, :, None, :]
        bias = bias.masked_fill(~seen.view(side**2, win**2), lost)
    if window.padding == "mask":
        real = split(k.new_ones(1, 1, 1, *k.shape[-2:]), win, block, window.first, rows, columns)
        real = real.reshape(1, rows * columns, 1, 1, win * win)
        bias = bias.expand(q.shape[0], -1, -1, -1).unflatten(0, (-1, rows * columns)).masked_fill(real == 0, lost).flatten(0, 1)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)
    out = out.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 2, 5, 4)
    return join(out.unflatten(-1, (side, side)), height, width).reshape(out.shape[0], out.shape[1], dv, height, width)
