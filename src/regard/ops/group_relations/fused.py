"""The same with few passes over the map, and nothing kept but the inputs: what the gradient needs is quickly made again.

With z = out t, m and v its mean and variance over a group: the norm of s z is a (z - m), a = s (s^2 v + eps)^-1/2, da/ds = eps (s^2 v + eps)^-3/2.
"""

import torch
from torch import Tensor

from .._operator import operator


def relate_groups(tpg: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: float, eps: float) -> Tensor:
    return _relate(tpg, out, weight, bias, groups, scale, eps)


def _centred(tpg: Tensor, out: Tensor, groups: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """z - m (B, G, C / G * N), s (B, G), v (B, G)."""
    t, p, g = tpg.chunk(3, 1)
    s = scale * _dots(p.unflatten(1, (groups, -1)).flatten(2), g.unflatten(1, (groups, -1)).flatten(2))
    z = torch.matmul(out.unflatten(0, (groups, -1)), t.unflatten(1, (groups, -1))).flatten(2)
    z = z.sub_(z.mean(2, keepdim=True))
    return z, s, torch.linalg.vector_norm(z, dim=2).square() / z.shape[2]


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis, as matrix products: no map of products."""
    return torch.matmul(a.unsqueeze(-2), b.unsqueeze(-1)).flatten(-3)


def _forward(tpg: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: float, eps: float) -> Tensor:
    z, s, variance = _centred(tpg, out, groups, scale)
    factor = s * (s.square() * variance + eps).rsqrt()
    slope = factor[:, :, None] * weight.view(groups, -1)
    z = z.view(*tpg.shape[:1], out.shape[0], *tpg.shape[2:])
    return torch.addcmul(bias[:, None], z, slope.flatten(1)[:, :, None], out=z)


def _fake(tpg: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: float, eps: float) -> Tensor:
    return tpg.new_empty(tpg.shape[0], out.shape[0], tpg.shape[2])


def _backward(
    grad: Tensor, tpg: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, n = tpg.shape[0], tpg.shape[1] // 3, tpg.shape[2]
    z, s, variance = _centred(tpg, out, groups, scale)
    size = z.shape[2]
    z, grad = (one.reshape(b, groups, out.shape[0] // groups, n) for one in (z, grad))
    by_channel = weight.view(groups, -1)
    root = (s.square() * variance + eps).rsqrt()
    factor = s * root
    total, along = grad.sum(3), _dots(grad, z)
    dfactor = (along * by_channel).sum(2)
    slope = (factor[:, :, None] * by_channel)[..., None]
    curve = (dfactor * factor.pow(3) / -size)[:, :, None, None]
    level = (factor * (total * by_channel).sum(2) / -size)[:, :, None, None]
    dz = torch.addcmul(level, z, curve, out=z).addcmul_(grad, slope)
    ds = (dfactor * root.pow(3) * (eps * scale))[:, :, None, None]
    t, p, g = (part.view(b, groups, h // groups, n) for part in tpg.chunk(3, 1))
    dt, dout = torch.matmul(out.unflatten(0, (groups, -1)).mT, dz), torch.matmul(dz, t.mT).sum(0).flatten(0, 1)
    del z, dz
    dtpg = torch.empty_like(tpg)
    places = dtpg.view(b, 3, groups, h // groups, n)
    places[:, 0] = dt
    torch.mul(g, ds, out=places[:, 1])
    torch.mul(p, ds, out=places[:, 2])
    return dtpg, dout, (along * factor[:, :, None]).sum(0).flatten(), total.sum(0).flatten()


def _flops(tpg, out, *options) -> int:
    return 2 * tpg[0] * tpg[2] * out[0] * out[1]


def _backward_flops(grad, *rest) -> int:
    return 3 * _flops(*rest)


_relate = operator("relate_groups", _forward, _backward, _fake, tensors=4, flops=_flops, backward_flops=_backward_flops)
