"""The chunked way as an operator with its own backward: whole to torch.compile and torch.export, and counted."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ...errors import RegardError
from . import chunked


@custom_op("regard::l1_attention", mutates_args=())
def l1_attention(
    q: Tensor,
    k: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    u: Tensor | None,
    beta: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    pairs: Tensor | None,
    causal: bool,
    factor: float,
    center: str,
) -> tuple[Tensor, Tensor]:
    return chunked.forward(chunked.Problem(q, k, a, b, v, u, beta, rows, keys, pairs, causal, factor, center))


@custom_op("regard::l1_attention_backward", mutates_args=())
def l1_attention_backward(
    d_out: Tensor,
    d_back: Tensor,
    q: Tensor,
    k: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    u: Tensor | None,
    beta: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    pairs: Tensor | None,
    causal: bool,
    factor: float,
    center: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return chunked.backward(d_out, d_back, chunked.Problem(q, k, a, b, v, u, beta, rows, keys, pairs, causal, factor, center))


@l1_attention.register_fake
def _(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor, u: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    out = v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, v.new_empty(0) if u is None else u.new_empty(*v.shape[:3], u.shape[3])


@l1_attention_backward.register_fake
def _(d_out: Tensor, d_back: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor, u: Tensor | None, beta: Tensor, *options: Any) -> Any:
    return (*(torch.empty_like(t) for t in (q, k, a, b, v)), v.new_empty(0) if u is None else torch.empty_like(u), torch.empty_like(beta))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _attention_gradient(ctx: Any, d_out: Tensor, d_back: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    *found, du, dbeta = l1_attention_backward(d_out, d_back, *tensors, *ctx.options)
    return (*found, None if tensors[5] is None else du, dbeta, *[None] * 6)


def _once(ctx: Any, *grads: Any) -> Any:
    raise RegardError("l1_affinity is differentiable once; for second derivatives use use_impl('reference')")


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


l1_attention.register_autograd(_attention_gradient, setup_context=_keep)
l1_attention_backward.register_autograd(_once, setup_context=_keep_nothing)


@register_flop_formula(torch.ops.regard.l1_attention)
def _flops(q: Any, k: Any, a: Any, b: Any, v: Any, u: Any, *options: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The products alone; the distances, 3 N M d additions and absolute values, are element-wise work."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3] + (u[3] if u is not None else 0))


@register_flop_formula(torch.ops.regard.l1_attention_backward)
def _backward_flops(d_out: Any, d_back: Any, q: Any, k: Any, a: Any, b: Any, v: Any, u: Any, *options: Any, **kwargs: Any) -> int:
    """The scores once more, and the gradients of both factors of every product."""
    return 2 * _flops(q, k, a, b, v, u) + 2 * q[0] * q[1] * q[2] * k[2] * q[3]
