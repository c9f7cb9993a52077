"""Three adjoint products over the pairs (n, j) of query n and key start_n + j, each the derivative of the others:

    dots    s_nj = q_n . k_(start_n + j)       sums    y_n = sum_j w_nj v_(start_n + j)       spread    g_m = sum_(n, j: start_n + j = m) w_nj q_n

Operators to torch.compile and torch.export, differentiable any number of times.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from . import bands, gathered


@custom_op("regard::run_dots", mutates_args=())
def dots(q: Tensor, k: Tensor, start: Tensor, count: int, banded: bool) -> Tensor:
    return (bands if banded else gathered).dots(q, k, start, count)


@custom_op("regard::run_sums", mutates_args=())
def sums(w: Tensor, v: Tensor, start: Tensor, banded: bool) -> Tensor:
    return (bands if banded else gathered).sums(w, v, start)


@custom_op("regard::run_spread", mutates_args=())
def spread(w: Tensor, q: Tensor, start: Tensor, keys: int, banded: bool) -> Tensor:
    return (bands if banded else gathered).spread(w, q, start, keys)


@dots.register_fake
def _(q: Tensor, k: Tensor, start: Tensor, count: int, banded: bool) -> Tensor:
    return q.new_empty(*start.shape, count)


@sums.register_fake
def _(w: Tensor, v: Tensor, start: Tensor, banded: bool) -> Tensor:
    return v.new_empty(*start.shape, v.shape[2])


@spread.register_fake
def _(w: Tensor, q: Tensor, start: Tensor, keys: int, banded: bool) -> Tensor:
    return q.new_empty(q.shape[0], keys, q.shape[2])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.banded = inputs[-1]


def _of_dots(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, start = ctx.saved_tensors
    return sums(grad, k, start, ctx.banded), spread(grad, q, start, k.shape[1], ctx.banded), None, None, None


def _of_sums(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, v, start = ctx.saved_tensors
    return dots(grad, v, start, w.shape[2], ctx.banded), spread(w, grad, start, v.shape[1], ctx.banded), None, None


def _of_spread(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, q, start = ctx.saved_tensors
    return dots(q, grad, start, w.shape[2], ctx.banded), sums(w, grad, start, ctx.banded), None, None, None


for _op, _gradients in ((dots, _of_dots), (sums, _of_sums), (spread, _of_spread)):
    _op.register_autograd(_gradients, setup_context=_keep)


@register_flop_formula(torch.ops.regard.run_dots)
def _dots_flops(q: Any, k: Any, start: Any, count: int, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One multiply-add for each channel of each pair, however it is computed."""
    return 2 * start[0] * start[1] * count * k[2]


@register_flop_formula([torch.ops.regard.run_sums, torch.ops.regard.run_spread])
def _sums_flops(w: Any, v: Any, start: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * start[0] * start[1] * w[2] * v[2]
