"""Projections and gates some rows at a time, computed again in the backward pass; two operators to torch.compile and torch.export."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._linear import linear, linear_gradients
from .._operator import operator

CPU, OTHER = 2**19, 2**26  # projected numbers at a time; 2 MB stay in the cache


def _pieces(z: Tensor, width: int) -> Iterator[tuple[int, slice]]:
    """Sample, rows."""
    step = max(1, (CPU if _dispatch.on_cpu(z) else OTHER) // max(1, z.shape[2] * width))
    for i in range(z.shape[0]):
        for row in range(0, z.shape[1], step):
            yield i, slice(row, row + step)


def _flat(z: Tensor) -> Tensor:
    return z.reshape(-1, z.shape[-1])


def _projected(z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Values and gates, (m, 2 c) each."""
    values, gates = linear(z, weight, bias).chunk(2, 1)
    return values, gates.sigmoid_()


def _project(z: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    c = len(bias) // 4
    out = [z.new_empty(z.shape[0], c, *z.shape[1:3]) for _ in range(2)]
    for i, rows in _pieces(z, len(bias)):
        values, gates = _projected(_flat(z[i, rows]), weight, bias)
        values *= gates
        if mask is not None:
            values *= mask[i, rows].reshape(-1, 1)
        for half, t in enumerate(out):
            t[i, :, rows] = values[:, half * c : (half + 1) * c].mT.unflatten(1, (-1, z.shape[2]))
    return out[0], out[1]


def _project_backward(grad_a: Tensor, grad_b: Tensor, z: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> list[Tensor]:
    dz, d_weight, d_bias = z.new_empty(z.shape), torch.zeros_like(weight), torch.zeros_like(bias)
    for i, rows in _pieces(z, len(bias)):
        here = _flat(z[i, rows])
        values, gates = _projected(here, weight, bias)
        g = torch.cat([grad[i, :, rows].flatten(1) for grad in (grad_a, grad_b)]).mT.contiguous()
        if mask is not None:
            g *= mask[i, rows].reshape(-1, 1)
        g *= gates
        dy = torch.cat((g, values.mul_(g).mul_(1 - gates)), 1)
        back, found = linear_gradients(dy, here, weight)
        dz[i, rows].flatten(0, 1).copy_(back)
        d_weight += found
        d_bias += dy.sum(0)
    return [dz, d_weight, d_bias]


def _emit(
    x: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, gate_weight: Tensor, gate_bias: Tensor, eps: float
) -> Tensor:
    out = z.new_empty(*z.shape[:3], len(bias))
    for i, rows in _pieces(z, len(norm_weight) + len(bias)):
        normed = torch.layer_norm(x[i, :, rows].flatten(1).mT.contiguous(), norm_weight.shape, norm_weight, norm_bias, eps)
        gate = linear(_flat(z[i, rows]), gate_weight, gate_bias).sigmoid_()
        torch.mul(linear(normed, weight, bias), gate, out=out[i, rows].flatten(0, 1))
    return out


def _emit_backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dz = x.new_empty(x.shape), z.new_empty(z.shape)
    sums = [torch.zeros_like(t) for t in (norm_weight, norm_bias, weight, bias, gate_weight, gate_bias)]
    d_norm_weight, d_norm_bias, d_weight, d_bias, d_gate_weight, d_gate_bias = sums
    for i, rows in _pieces(z, len(norm_weight) + len(bias)):
        turned, here, g = x[i, :, rows].flatten(1).mT.contiguous(), _flat(z[i, rows]), _flat(grad[i, rows])
        normed, mean, rstd = torch.native_layer_norm(turned, norm_weight.shape, norm_weight, norm_bias, eps)
        gate = linear(here, gate_weight, gate_bias).sigmoid_()
        dy = g * gate
        d_gate = linear(normed, weight, bias).mul_(dy).mul_(1 - gate)
        back, found = linear_gradients(d_gate, here, gate_weight)
        dz[i, rows].flatten(0, 1).copy_(back)
        d_gate_weight += found
        d_gate_bias += d_gate.sum(0)
        d_normed, found = linear_gradients(dy, normed, weight)
        d_weight += found
        d_bias += dy.sum(0)
        masks = [True, True, True]
        back = torch.ops.aten.native_layer_norm_backward(d_normed, turned, norm_weight.shape, mean, rstd, norm_weight, norm_bias, masks)
        dx[i, :, rows] = back[0].mT.unflatten(1, (-1, z.shape[2]))
        d_norm_weight += back[1]
        d_norm_bias += back[2]
    return dx, dz, d_norm_weight, d_norm_bias, d_weight, d_bias, d_gate_weight, d_gate_bias


def _like_projected(z: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = z.shape[0], bias.shape[0] // 4, *z.shape[1:3]
    return z.new_empty(shape), z.new_empty(shape)


def _like_emitted(
    x: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, gate_weight: Tensor, gate_bias: Tensor, eps: float
) -> Tensor:
    return z.new_empty(*z.shape[:3], bias.shape[0])


def _product(z: Any, *weights: Any) -> int:
    return sum(2 * z[0] * z[1] * z[2] * w[0] * w[1] for w in weights)


project = operator(
    "triangle_project",
    _project,
    _project_backward,
    _like_projected,
    tensors=4,
    wanted=range(3),
    outputs=2,
    flops=lambda z, weight, *_: _product(z, weight),
    backward_flops=lambda grad_a, grad_b, z, weight, *_: 3 * _product(z, weight),
)
emit = operator(
    "triangle_emit",
    _emit,
    _emit_backward,
    _like_emitted,
    tensors=8,
    flops=lambda x, z, nw, nb, weight, bias, gate_weight, *_: _product(z, weight, gate_weight),
    backward_flops=lambda grad, x, z, nw, nb, weight, bias, gate_weight, *_: 3 * _product(z, weight, gate_weight),
)
