"""The fast ways as operators with their own backward."""

from typing import Any

import torch
from torch import Tensor

from .._operator import operator
from . import blocks, shifted, tiles


def _apply(w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, tiled: bool) -> Tensor:
    return tiles.forward(w, v, kernel, first, scale) if tiled else shifted.forward(w, v, kernel, stride, dilation, first, scale)


def _apply_backward(
    dy: Tensor, w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, tiled: bool
) -> tuple[Tensor, Tensor]:
    return tiles.backward(dy, w, v, kernel, first, scale) if tiled else shifted.backward(dy, w, v, kernel, stride, dilation, first, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool) -> Tensor:
    return blocks.forward(q, k, v, rel, win, block, first, scale, mask)


def _attend_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return blocks.backward(dy, q, k, v, rel, win, block, first, scale, mask)


def _apply_like(w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, tiled: bool) -> Tensor:
    return v.new_empty(*v.shape[:3], w.shape[-2] * scale, w.shape[-1] * scale)


def _attend_like(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return blocks.channels_last(v, (*q.shape[:2], v.shape[2], *q.shape[-2:]))


def _attend_backward_like(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return (*(blocks.channels_last(x, x.shape) for x in (q, k, v)), torch.empty_like(rel))


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
