"""The fast ways as operators with their own backward: whole to torch.compile and torch.export, counted, usable under torch.func.vmap."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import blocks, shifted, tiles


@custom_op("regard::window_apply", mutates_args=())
def window_apply(w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, tiled: bool) -> Tensor:
    return tiles.forward(w, v, kernel, first, scale) if tiled else shifted.forward(w, v, kernel, stride, dilation, first, scale)


@custom_op("regard::window_apply_backward", mutates_args=())
def window_apply_backward(
    dy: Tensor, w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, tiled: bool
) -> tuple[Tensor, Tensor]:
    return tiles.backward(dy, w, v, kernel, first, scale) if tiled else shifted.backward(dy, w, v, kernel, stride, dilation, first, scale)


@custom_op("regard::window_attention", mutates_args=())
def window_attention(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool) -> Tensor:
    return blocks.forward(q, k, v, rel, win, block, first, scale, mask)


@custom_op("regard::window_attention_backward", mutates_args=())
def window_attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return blocks.backward(dy, q, k, v, rel, win, block, first, scale, mask)


@window_apply.register_fake
def _(w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int, tiled: bool) -> Tensor:
    return v.new_empty(*v.shape[:3], w.shape[-2] * scale, w.shape[-1] * scale)


@window_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return blocks.channels_last(v, (*q.shape[:2], v.shape[2], *q.shape[-2:]))


@window_apply_backward.register_fake
def _(dy: Tensor, w: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (w, v))


@window_attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return (*(blocks.channels_last(x, x.shape) for x in (q, k, v)), torch.empty_like(rel))


def _differentiate(op: Any, backward: Any) -> None:
    def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.options = [x for x in inputs if not isinstance(x, Tensor)]

    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(dy, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options))

    op.register_autograd(gradients, setup_context=setup)


def _one_by_one(op: Any) -> Callable[..., Any]:
    def rule(info: Any, dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        """Each sample on its own: the operators already work through their batch in pieces."""
        outs = [op(*(x if at is None else x.select(at, i) for x, at in zip(args, dims, strict=True))) for i in range(info.batch_size)]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        return tuple(torch.stack(column) for column in zip(*outs, strict=True)), (0,) * len(outs[0])

    return rule


for _op in (window_apply, window_apply_backward, window_attention, window_attention_backward):
    _op.register_vmap(_one_by_one(_op))
_differentiate(window_apply, window_apply_backward)
_differentiate(window_attention, window_attention_backward)


@register_flop_formula(torch.ops.regard.window_apply)
def _apply_flops(w_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2 k^2 for each value of the output: one multiply-add for each pixel of its window, however it is computed."""
    (batch, _, window, phases, height, width), channels = w_shape, v_shape[1] * v_shape[2]
    return 2 * batch * channels * window * phases * height * width


@register_flop_formula(torch.ops.regard.window_apply_backward)
def _apply_backward_flops(dy_shape: Any, w_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _apply_flops(w_shape, v_shape)


@register_flop_formula(torch.ops.regard.window_attention)
def _attention_flops(
    q_shape: Any, k_shape: Any, v_shape: Any, rel_shape: Any, win: int, block: int, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Logits, values, and the products of the queries with the two tables; the one-hot codes only add and are not counted."""
    batch, heads, d, height, width = q_shape
    side = rel_shape[0] // 2 - win + 1
    queries = batch * heads * -(-height // side) * -(-width // side) * side**2
    return 2 * queries * (win**2 * (d + v_shape[2]) + rel_shape[0] * d)


@register_flop_formula(torch.ops.regard.window_attention_backward)
def _attention_backward_flops(
    dy_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, rel_shape: Any, win: int, block: int, *args: Any, **kwargs: Any
) -> int:
    """As the fused kernels count it: the logits once more, and the gradients of both factors of every product."""
    forward, (batch, heads, d, height, width) = _attention_flops(q_shape, k_shape, v_shape, rel_shape, win, block), q_shape
    side = rel_shape[0] // 2 - win + 1
    queries = batch * heads * -(-height // side) * -(-width // side) * side**2
    return 2 * forward + 2 * queries * (win**2 + rel_shape[0]) * d
