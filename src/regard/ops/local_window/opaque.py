"""The fast ways as operators with their own backward."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._operator import operator
from . import blocks, logits, pixels, shifted, tiles
from .window import accumulator


def _apply(w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, way: str) -> Tensor:
    if way == "tiles":
        return tiles.forward(w, v, kernel, first, scale)
    return _shifts(way).forward(w, v, kernel, stride, dilation, first, scale)


def _apply_backward(
    dy: Tensor, w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, way: str
) -> tuple[Tensor, Tensor]:
    if way == "tiles":
        return tiles.backward(dy, w, v, kernel, first, scale)
    return _shifts(way).backward(dy, w, v, kernel, stride, dilation, first, scale)


def _shifts(way: str) -> ModuleType:
    if way == "fused":
        from . import fused  # needs Triton

        return fused
    return shifted


def _attend(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool) -> Tensor:
    return blocks.forward(q, k, v, rel, win, block, first, scale, mask, False)


def _attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return blocks.backward(dy, q, k, v, rel, win, block, first, scale, mask, False)


def _pixels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor | None,
    mix: Tensor | None,
    kernel: int,
    stride: int,
    dilation: int,
    first: int,
    scale: float,
    mask: bool,
    blocked: bool,
) -> Tensor:
    if blocked:
        return blocks.pixels_forward(q, k, v, rel, kernel, first, scale, mask)
    return pixels.forward(q, k, v, rel, mix, kernel, stride, dilation, first, scale, mask)


def _pixels_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel: Tensor | None,
    mix: Tensor | None,
    kernel: int,
    stride: int,
    dilation: int,
    first: int,
    scale: float,
    mask: bool,
    blocked: bool,
) -> list[Tensor]:
    if blocked:
        return [*blocks.pixels_backward(dy, q, k, v, rel, kernel, first, scale, mask), q.new_empty(0)]
    return pixels.backward(dy, q, k, v, rel, mix, kernel, stride, dilation, first, scale, mask)


def _relate(q: Tensor, k: Tensor, op: str, kernel: int, stride: int, dilation: int, first: int, scale: float, mask: bool) -> Tensor:
    return logits.forward(q, k, op, kernel, stride, dilation, first, scale, mask)


def _relate_backward(
    dy: Tensor, q: Tensor, k: Tensor, op: str, kernel: int, stride: int, dilation: int, first: int, scale: float, mask: bool
) -> tuple[Tensor, Tensor]:
    return logits.backward(dy, q, k, op, kernel, stride, dilation, first, scale, mask)


def _apply_like(w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, way: str) -> Tensor:
    return v.new_empty(*v.shape[:3], w.shape[-2] * scale, w.shape[-1] * scale)


def _attend_like(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return blocks.channels_last(v, (*q.shape[:2], v.shape[2], *q.shape[-2:]))


def _attend_backward_like(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return (*(blocks.channels_last(x, x.shape) for x in (q, k, v)), torch.empty_like(rel))


def _pixels_like(q: Tensor, k: Tensor, v: Tensor, rel: Tensor | None, mix: Tensor | None, *options: Any) -> Tensor:
    return v.new_empty(*q.shape[:2], v.shape[2] // (1 if mix is None else mix.shape[0]), *q.shape[-2:])


def _relate_like(q: Tensor, k: Tensor, op: str, kernel: int, *options: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], kernel**2, *q.shape[-2:], dtype=accumulator(q))


def _apply_flops(w_shape: Any, v_shape: Any, *options: Any) -> int:
    """2 k^2 for each value of the output: one multiply-add for each pixel of its window, however it is computed."""
    (batch, _, window, phases, height, width), channels = w_shape, v_shape[1] * v_shape[2]
    return 2 * batch * channels * window * phases * height * width


def _apply_backward_flops(dy_shape: Any, w_shape: Any, v_shape: Any, *options: Any) -> int:
    return 2 * _apply_flops(w_shape, v_shape)


def _attention_flops(q_shape: Any, k_shape: Any, v_shape: Any, rel_shape: Any, win: int, block: int, *options: Any) -> int:
    """Logits, values, and the products of the queries with the two tables; the one-hot codes only add and are not counted."""
    batch, heads, d, height, width = q_shape
    side = rel_shape[0] // 2 - win + 1
    queries = batch * heads * -(-height // side) * -(-width // side) * side**2
    return 2 * queries * (win**2 * (d + v_shape[2]) + rel_shape[0] * d)


def _attention_backward_flops(dy_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, rel_shape: Any, win: int, block: int, *options: Any) -> int:
    """As the fused kernels count it: the logits once more, and the gradients of both factors of every product."""
    forward, (batch, heads, d, height, width) = _attention_flops(q_shape, k_shape, v_shape, rel_shape, win, block), q_shape
    side = rel_shape[0] // 2 - win + 1
    queries = batch * heads * -(-height // side) * -(-width // side) * side**2
    return 2 * forward + 2 * queries * (win**2 + rel_shape[0]) * d


def _pixels_flops(q_shape: Any, k_shape: Any, v_shape: Any, rel_shape: Any, mix_shape: Any, kernel: int, *options: Any) -> int:
    """Logits, values, and the products of the queries with the tables, for the k^2 pixels of a window alone, however they are computed."""
    batch, heads, d, height, width = q_shape
    return 2 * batch * heads * height * width * (kernel**2 * (d + v_shape[2]) + (0 if rel_shape is None else 2 * kernel * d))


def _pixels_backward_flops(
    dy_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, rel_shape: Any, mix_shape: Any, kernel: int, *options: Any
) -> int:
    forward = _pixels_flops(q_shape, k_shape, v_shape, rel_shape, mix_shape, kernel)
    return 2 * forward + _pixels_flops(q_shape, k_shape, (0, 0, 0), rel_shape, mix_shape, kernel)


def _relate_flops(q_shape: Any, k_shape: Any, op: str, kernel: int, *options: Any) -> int:
    """2 k^2 for each entry of the queries: a product, a square or a difference, added up."""
    return 2 * kernel**2 * math.prod(q_shape)


def _relate_backward_flops(dy_shape: Any, q_shape: Any, k_shape: Any, op: str, kernel: int, *options: Any) -> int:
    return 2 * _relate_flops(q_shape, k_shape, op, kernel)


window_apply = operator("window_apply", _apply, _apply_backward, _apply_like, tensors=2, flops=_apply_flops, backward_flops=_apply_backward_flops)
window_attention = operator(
    "window_attention",
    _attend,
    _attend_backward,
    _attend_like,
    tensors=4,
    fake_backward=_attend_backward_like,
    flops=_attention_flops,
    backward_flops=_attention_backward_flops,
)
pixel_attention = operator(
    "pixel_attention",
    _pixels,
    _pixels_backward,
    _pixels_like,
    tensors=5,
    flops=_pixels_flops,
    backward_flops=_pixels_backward_flops,
)
window_relate = operator(
    "window_relate", _relate, _relate_backward, _relate_like, tensors=2, flops=_relate_flops, backward_flops=_relate_backward_flops
)
