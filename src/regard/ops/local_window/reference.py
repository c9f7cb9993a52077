"""The definitions, written out with every window copied."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window, join, split


def relate(q: Tensor, k: Tensor, op: str, window: Window, scale: float) -> Tensor:
    """q (B, G, e, H', W'), k (B, G, e, H, W) -> (B, G, k^2, H', W'), in at least float32."""
    q, keys = q[:, :, :, None], _copies(k, window, *q.shape[-2:])
    pairs = {"product": lambda: q * keys, "squared": lambda: -((q - keys) ** 2), "absolute": lambda: -(q - keys).abs()}[op]()
    out = pairs.sum(2, dtype=torch.promote_types(q.dtype, torch.float32)) * scale
    if window.padding == "mask":
        out = out.masked_fill(_copies(k.new_ones(1, 1, 1, *k.shape[-2:]), window, *q.shape[-2:])[:, :, 0] == 0, float("-inf"))
    return out


def attend_pixels(q: Tensor, k: Tensor, v: Tensor, rel: Tensor | None, mix: Tensor | None, window: Window, scale: float) -> Tensor:
    logits = relate(q, k, "product", window, scale)
    if rel is not None:
        logits = logits + relative(q, rel, scale)
    weights = logits.softmax(2).to(v.dtype).unsqueeze(3)
    if mix is None:
        return apply(weights, v, window, 1)
    maps = zip(mix, v.unflatten(2, (mix.shape[0], -1)).unbind(2), strict=True)
    return torch.stack([apply(weights * part[:, None, None, None], one, window, 1) for part, one in maps]).sum(0)


def relative(q: Tensor, rel: Tensor, scale: float) -> Tensor:
    """The products of queries with the tables (N or 1, 2 k, d), (B, N, k^2, H', W')."""
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    high, wide = (rel.to(q.dtype) * scale @ q.flatten(3)).unflatten(3, q.shape[-2:]).chunk(2, 2)
    return (high[:, :, :, None] + wide[:, :, None]).flatten(2, 3)


def apply(w: Tensor, v: Tensor, window: Window, scale: int) -> Tensor:
    """w (B, G, k^2, s^2, H', W'), v (B, G, C, H, W) -> (B, G, C, s H', s W')."""
    height, width = w.shape[-2:]
    y = torch.einsum("bgjphw,bgcjhw->bgcphw", w, _copies(v, window, height, width))
    return F.pixel_shuffle(y.flatten(1, 3), scale).unflatten(1, v.shape[1:3])


def _copies(v: Tensor, window: Window, height: int, width: int) -> Tensor:
    """(B, G, C, H, W) -> (B, G, C, k^2, H', W')."""
    copies = F.unfold(_pad(v.flatten(1, 2), window), window.kernel_size, window.dilation, 0, window.stride)
    return copies.reshape(*v.shape[:3], window.kernel_size**2, height, width)


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
