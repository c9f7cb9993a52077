"""Some queries and keys at a time, computed again in the backward pass; one operator to torch.compile and torch.export."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...errors import RegardError
from .. import _dispatch

Piece = tuple[int, slice, slice]
CPU, OTHER = 2**18, 2**25  # floats of (queries, keys, d) in a piece; 1 MB stays in the cache


def _pieces(q: Tensor, k: Tensor) -> Iterator[Piece]:
    """Sample, queries, keys."""
    (b, n, d), m = q.shape, k.shape[1]
    limit = CPU if _dispatch.on_cpu(q) else OTHER
    columns = max(1, min(m, limit // d))
    rows = max(1, limit // (columns * d))
    for i in range(b):
        for row in range(0, n, rows):
            for column in range(0, m, columns):
                yield i, slice(row, row + rows), slice(column, column + columns)


def _inner(q: Tensor, k: Tensor, piece: Piece) -> Tensor:
    i, rows, columns = piece
    return (q[i, rows, None] + k[i, columns]).tanh_()


@torch.library.custom_op("regard::additive_scores", mutates_args=())
def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    for piece in _pieces(q, k):
        out[piece] = _inner(q, k, piece) @ v
    return out


@torch.library.custom_op("regard::additive_scores_backward", mutates_args=())
def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for piece in _pieces(q, k):
        i, rows, columns = piece
        g, t = grad[piece], _inner(q, k, piece)
        dv += g.flatten() @ t.flatten(0, 1)
        t = t.square_()  # the derivative of tanh is 1 - t^2
        dq[i, rows] += g.sum(1, keepdim=True) - (g[:, None] @ t)[:, 0]
        dk[i, columns] += g.sum(0)[:, None] - t.mul_(g[..., None]).sum(0)
    return dq.mul_(v), dk.mul_(v), dv


@scores.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1])


@backward.register_fake
def _(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _once(ctx: Any, *grads: Tensor) -> Any:
    raise RegardError("additive scores are differentiable once; for second derivatives use use_impl('reference')")


scores.register_autograd(lambda ctx, grad: backward(grad, *ctx.saved_tensors), setup_context=_keep)
backward.register_autograd(_once, setup_context=_keep)


@register_flop_formula(torch.ops.regard.additive_scores)
def _flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The product with v."""
    return 2 * q[0] * q[1] * k[1] * q[2]


@register_flop_formula(torch.ops.regard.additive_scores_backward)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two for each of the three gradients."""
    return 3 * _flops(q, k, v)
