"""What the fast ways share: the features, and all that happens once the N positions are summed over."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .shrinkage import Shrink


def unit(q: Tensor) -> Tensor:
    return F.normalize(q * q.shape[-1] ** -0.25, dim=-1)


def features(u: Tensor, random: Tensor) -> Tensor:
    """Positive random features of unit vectors, (B, H, N, m): the columns of the dictionary, not yet of unit length."""
    return (u @ random).sub_((u.square().sum(-1, keepdim=True) + math.log(random.shape[-1])) / 2).exp_()


def static_atoms(static: Tensor) -> tuple[Tensor, Tensor]:
    """Unit columns, and their products: shared by the whole batch."""
    atoms = F.normalize(static, dim=-2)
    return atoms, atoms.mT @ atoms


def solve(
    gram: Tensor,
    target: Tensor,
    cross: Tensor | None,
    static_target: Tensor | None,
    static_gram: Tensor | None,
    mixing: Tensor,
    threshold: Tensor,
    step: Tensor,
    steps: int,
    shrink: Shrink,
) -> tuple[Tensor, Tensor]:
    """The code z, and z as it multiplies the features and the static atoms, from f^T f, f^T v and, with static atoms s, f^T s, s^T v and s^T s.

    The norms of the columns of f are the diagonal of f^T f: they are divided out here, where things are small. With r = step / (1 + largest row sum
    of |G|) a step z <- S(z - r (U G U z - y)) is z <- S(A z + r y), one product.
    """
    own = gram.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(1e-12).unsqueeze(-1)
    gram, target = gram / (own * own.mT), target / own
    if cross is not None and static_target is not None and static_gram is not None:
        mixed, fixed = cross / own, static_gram.expand(*gram.shape[:2], -1, -1)
        gram = torch.cat((torch.cat((gram, mixed), -1), torch.cat((mixed.mT, fixed), -1)), -2)
        target = torch.cat((target, static_target), -2)
        own = torch.cat((own, torch.ones_like(static_target[..., :1])), -2)
    rate = step / (1 + gram.detach().abs().sum(-1).amax(-1))[..., None, None]
    z = shrink(target, threshold)
    if steps:
        a = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) - rate * (mixing @ gram @ mixing)
        target, threshold = rate * target, rate * threshold
    for _ in range(steps):
        z = shrink(a @ z + target, threshold)
    return z, z / own
