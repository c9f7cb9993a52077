"""The definition. The norm all but removes the inner products s: it is made of the statistics of the map that s multiplies, so that the gradient
of s is no difference of large numbers.
"""

import torch
from torch import Tensor


def relate_groups(tpg: Tensor, out: Tensor, weight: Tensor, bias: Tensor, groups: int, scale: float, eps: float) -> Tensor:
    t, p, g = (part.unflatten(1, (groups, -1)) for part in tpg.chunk(3, 1))
    s = scale * (p * g).sum((2, 3))
    z = torch.matmul(out.unflatten(0, (groups, -1)), t)
    z = z - z.mean((2, 3), keepdim=True)
    factor = _factor(s, z.square().mean((2, 3)), eps)
    return (z * factor[:, :, None, None]).flatten(1, 2) * weight[:, None] + bias[:, None]


def _factor(s: Tensor, variance: Tensor, eps: float) -> Tensor:
    """s (s^2 v + eps)^-1/2, where s^2 v > eps as +-(v + eps / s^2)^-1/2."""
    large = s.square() * variance > eps
    some = torch.where(large, s, 1.0)
    above = some.sign() * (torch.where(large, variance, 1.0) + eps / some.square()).rsqrt()
    below = s * (torch.where(large, 0.0, s.square() * variance) + eps).rsqrt()
    return torch.where(large, above, below)
