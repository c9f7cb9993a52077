"""Attention through positive random features, some positions at a time: no feature is kept, forward or backward. One operator to torch.compile.

    f(y) = exp(W y' - |y'|^2 / 2 - c) / sqrt(m), y' = y d^-1/4;   S = sum_j (f(k_j) + floor) [v_j, 1];   [u, z] = (f(q) + floor) S;   out = u / z

c, which passes no gradient, is the largest W y' of a query, and of all keys of a head; the sum over keys is rescaled as a larger one is met.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ...errors import RegardError
from .._precision import at_least_float32

FLOATS = 2**19  # of features of all heads at a time: 2 MB
LOWEST = -1e30  # W y' of a key that is not there


def _parts(n: int, heads: int, features: int) -> list[slice]:
    size = max(16, FLOATS // (heads * features))
    return [slice(first, min(first + size, n)) for first in range(0, n, size)]


def _projected(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """W y', (H, n, m), and what is to be taken from it besides c: |y'|^2 / 2 + log sqrt(m)."""
    half = x.square().sum(-1, keepdim=True).mul_(0.5 * x.shape[-1] ** -0.5)
    return x @ w.mT, half.add_(0.5 * math.log(w.shape[-2]))


def _of_queries(x: Tensor, w: Tensor) -> Tensor:
    y, half = _projected(x, w)
    return y.sub_(half.add_(y.amax(-1, keepdim=True))).exp_()


def _scaled(w: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return (w[0].to(dtype) * w.shape[-1] ** -0.25).expand(heads, -1, -1).contiguous()


@custom_op("regard::favor", mutates_args=())
def favor(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None, floor: float, denom_min: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, H, N, e), and what the backward pass needs: z (B, H, N, 1), S (B, H, m, e + 1), c of the keys (B, H, 1, 1)."""
    (b, h, n, _), m, e, dtype = q.shape, w.shape[-2], v.shape[-1], at_least_float32(q, k, v)
    w = _scaled(w, h, dtype)
    out, z, sums, c = _empty(q, v, m, dtype)
    for i in range(b):
        total, shift = sums[i].zero_(), torch.full((h, 1, 1), LOWEST, dtype=dtype, device=q.device)
        count = torch.zeros(h, 1, e + 1, dtype=dtype, device=q.device)
        for part in _parts(k.shape[2], h, m):
            x, ones = k[i, :, part].to(dtype), torch.ones(h, part.stop - part.start, e + 1, dtype=dtype, device=q.device)
            ones[..., :e] = v[i, :, part]
            gone = None if mask is None else ~mask[i, part, None]
            x = x if gone is None else x.masked_fill(gone, 0.0)
            y, half = _projected(x, w)
            if gone is not None:
                ones.masked_fill_(gone, 0.0)
                y.masked_fill_(gone, LOWEST)
            larger = torch.maximum(shift, y.amax((1, 2), keepdim=True))
            total.mul_((shift - larger).exp_()).baddbmm_(y.sub_(half.add_(larger)).exp_().mT, ones)
            shift, count = larger, count + ones.sum(1, keepdim=True)
        c[i] = shift
        total.add_(floor * count)
        least = floor * total.sum(1, keepdim=True)
        for part in _parts(n, h, m):
            both = torch.baddbmm(least, _of_queries(q[i, :, part].to(dtype), w), total)
            found = both[..., e:]
            z[i, :, part] = found.masked_fill(found == 0, 1.0) if denom_min is None else found.clamp_min(denom_min)
            out[i, :, part] = both[..., :e] / z[i, :, part]
    return out, z, sums, c


@custom_op("regard::favor_backward", mutates_args=())
def favor_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    mask: Tensor | None,
    out: Tensor,
    z: Tensor,
    sums: Tensor,
    c: Tensor,
    floor: float,
    denom_min: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, h, n, d), m, e, dtype = q.shape, w.shape[-2], v.shape[-1], sums.dtype
    w, dq, dk, dv = _scaled(w, h, dtype), _merged(q), _merged(k), _merged(v)

    def of_inputs(x: Tensor, change: Tensor) -> Tensor:
        """From the gradient of the exponent, W y' - |y'|^2 / 2, to that of y."""
        return torch.baddbmm(x * change.sum(-1, keepdim=True), change, w, beta=-(d**-0.5))

    for i in range(b):
        change, count = sums.new_zeros(h, m, e + 1), sums.new_zeros(h, 1, e + 1)
        for part in _parts(n, h, m):
            x, g = q[i, :, part].to(dtype), grad[i, :, part].to(dtype) / z[i, :, part]
            of_z = (g * out[i, :, part]).sum(-1, keepdim=True).neg_()
            of_z = of_z if denom_min is None else of_z.masked_fill(z[i, :, part] <= denom_min, 0.0)
            f, both = _of_queries(x, w), torch.cat((g, of_z), -1)
            change.baddbmm_(f.mT, both)
            count += both.sum(1, keepdim=True)
            dq[i, :, part] = of_inputs(x, (both @ sums[i].mT).mul_(f))
        change.add_(floor * count)
        of_v, of_one = change[..., :e], change[..., e:]
        least = floor * of_v.sum(1, keepdim=True)
        for part in _parts(k.shape[2], h, m):
            x, value = k[i, :, part].to(dtype), v[i, :, part].to(dtype)
            gone = None if mask is None else ~mask[i, part, None]
            if gone is not None:
                x, value = x.masked_fill(gone, 0.0), value.masked_fill(gone, 0.0)
            y, half = _projected(x, w)
            f = y.sub_(half.add_(c[i])).exp_()
            f = f if gone is None else f.masked_fill_(gone, 0.0)
            found = torch.baddbmm(least, f, of_v)
            dv[i, :, part] = found if gone is None else found.masked_fill_(gone, 0.0)
            dk[i, :, part] = of_inputs(x, torch.baddbmm(of_one.mT, value, of_v.mT).mul_(f))
    return dq, dk, dv


def _merged(x: Tensor) -> Tensor:
    """An empty (B, H, N, d) whose heads merge without a copy."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _empty(q: Tensor, v: Tensor, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, n, _ = q.shape
    out = v.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(b, h, n, 1, dtype=dtype), q.new_empty(b, h, m, v.shape[-1] + 1, dtype=dtype), q.new_empty(b, h, 1, 1, dtype=dtype)


@favor.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(q, v, w.shape[-2], at_least_float32(q, k, v))


@favor_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _merged(q), _merged(k), _merged(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    return *favor_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


def _once(ctx: Any, *grads: Any) -> Any:
    raise RegardError("attention in pieces is differentiable once; for second derivatives use use_impl('reference')")


favor.register_autograd(_differentiate, setup_context=_keep)
favor_backward.register_autograd(_once, setup_context=lambda ctx, inputs, output: None)


@register_flop_formula(torch.ops.regard.favor)
def _flops(q: Any, k: Any, v: Any, w: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Features of queries and keys, and their products with values and sums."""
    return 2 * q[0] * q[1] * (q[2] + k[2]) * w[-2] * (q[3] + v[3] + 1)


@register_flop_formula(torch.ops.regard.favor_backward)
def _backward_flops(grad: Any, q: Any, k: Any, v: Any, w: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The features once more, from them to the inputs, and two for each product with values and sums."""
    return 2 * _flops(q, k, v, w)
