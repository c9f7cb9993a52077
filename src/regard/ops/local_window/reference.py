"""The definitions, written out with every window copied."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window, join, split


def apply(w: Tensor, v: Tensor, window: Window, scale: int) -> Tensor:
    """w (B, G, k^2, s^2, H', W'), v (B, G, C, H, W) -> (B, G, C, s H', s W')."""
    k, (height, width) = window.kernel_size, w.shape[-2:]
    copies = F.unfold(_pad(v.flatten(1, 2), window), k, window.dilation, 0, window.stride)
    y = torch.einsum("bgjphw,bgcjhw->bgcphw", w, copies.reshape(*v.shape[:3], k * k, height, width))
    return F.pixel_shuffle(y.flatten(1, 3), scale).unflatten(1, v.shape[1:3])


def _pad(v: Tensor, window: Window) -> Tensor:
    before, after = -window.first, window.first + window.dilation * (window.kernel_size - 1)
    return F.pad(v, (before, after, before, after), "reflect" if window.padding == "reflect" else "constant")


def logits(q: Tensor, k: Tensor, rel: tuple[Tensor, Tensor], window: Window, block: int, scale: float, rel_scale: float) -> Tensor:
    """(B, N, rows, columns, queries of a block, win^2), in at least float32."""
    win, side = window.kernel_size, block // window.stride
    q = split(q, side, side, 0, -(-q.shape[-2] // side), -(-q.shape[-1] // side))
    rows, columns = q.shape[2:4]
    keys = split(k, win, block, window.first, rows, columns)
    at, seen = torch.arange(side, device=q.device), torch.arange(win, device=q.device)
    height, width = (table[seen - at[:, None] + win - 1] for table in rel)
    p = torch.einsum("bnrsdyx,ywd->bnrsyxw", q, height)[..., :, None] + torch.einsum("bnrsdyx,xwd->bnrsyxw", q, width)[..., None, :]
    out = torch.einsum("bnrsdyx,bnrsdij->bnrsyxij", q, keys) * scale + p * rel_scale
    out = out.to(torch.promote_types(out.dtype, torch.float32))
    if window.padding == "mask":
        real = split(k.new_ones(1, 1, 1, *k.shape[-2:]), win, block, window.first, rows, columns)[:, :, :, :, 0, None, None]
        out = out.masked_fill(real == 0, float("-inf"))
    return out.flatten(-2).flatten(-3, -2)


def attend(q: Tensor, k: Tensor, v: Tensor, rel: tuple[Tensor, Tensor], window: Window, block: int, scale: float, rel_scale: float) -> Tensor:
    weights = logits(q, k, rel, window, block, scale, rel_scale).softmax(-1).to(v.dtype)
    values = split(v, window.kernel_size, block, window.first, *weights.shape[2:4]).flatten(-2)
    out = torch.einsum("bnrsqk,bnrsdk->bnrsdq", weights, values)
    return join(out.unflatten(-1, (block // window.stride, -1)), *q.shape[-2:])
