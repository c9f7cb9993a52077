"""Attention of blocks by the fused kernel of the device: windows copied, the relative term as its additive bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window, join, split


def attend(q: Tensor, k: Tensor, v: Tensor, rel: tuple[Tensor, Tensor], window: Window, block: int, scale: float, rel_scale: float) -> Tensor:
    win, side = window.kernel_size, block // window.stride
    (height, width), dv = q.shape[-2:], v.shape[2]
    rows, columns = -(-height // side), -(-width // side)
    q, keys, values = (
        split(x, *cut, rows, columns).flatten(-2).permute(0, 2, 3, 1, 5, 4).flatten(0, 2)
        for x, cut in ((q, (side, side, 0)), (k, (win, block, window.first)), (v, (win, block, window.first)))
    )
    at, seen = torch.arange(side, device=q.device), torch.arange(win, device=q.device)
    high, wide = (table[seen - at[:, None] + win - 1] * rel_scale for table in rel)
    pixels = q.unflatten(2, (side, side))
    bias = torch.einsum("bnyxd,ywd->bnyxw", pixels, high)[..., :, None] + torch.einsum("bnyxd,xwd->bnyxw", pixels, wide)[..., None, :]
    bias = bias.flatten(-2).flatten(2, 3).to(q.dtype)
    if window.padding == "mask":
        real = split(k.new_ones(1, 1, 1, *k.shape[-2:]), win, block, window.first, rows, columns)
        real = real.reshape(1, rows * columns, 1, 1, win * win)
        bias = bias.unflatten(0, (-1, rows * columns)).masked_fill(real == 0, float("-inf")).flatten(0, 1)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)
    out = out.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 2, 5, 4)
    return join(out.unflatten(-1, (side, side)), height, width).reshape(out.shape[0], out.shape[1], dv, height, width)
