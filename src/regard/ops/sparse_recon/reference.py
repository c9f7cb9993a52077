"""The definitions, written out. The dictionary is formed, and so is the product of all pairs of kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .shrinkage import Shrink


def dictionary(q: Tensor, random: Tensor, static: Tensor | None) -> Tensor:
    """Positive random features of the queries, then the static atoms; columns of unit length over the N positions. (B, H, N, m)."""
    u = F.normalize(q * q.shape[-1] ** -0.25, dim=-1)
    atoms = (u @ random - u.square().sum(-1, keepdim=True) / 2).exp() / random.shape[-1] ** 0.5
    if static is not None:
        atoms = torch.cat((atoms, static.expand(q.shape[0], -1, -1, -1)), -1)
    return F.normalize(atoms, dim=-2)


def sparse_recon(
    q: Tensor, v: Tensor, random: Tensor, static: Tensor | None, mixing: Tensor, threshold: Tensor, step: Tensor, steps: int, shrink: Shrink
) -> tuple[Tensor, Tensor]:
    """The reconstruction P z and the code z."""
    p = dictionary(q, random, static)
    gram, target = p.mT @ p, p.mT @ v
    rate = step / (1 + gram.detach().abs().sum(-1).amax(-1))[..., None, None]
    gram = mixing @ gram @ mixing
    z = shrink(target, threshold)
    for _ in range(steps):
        z = shrink(z - rate * (gram @ z - target), rate * threshold)
    return p @ z, z


def filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Filters of the spectrum, (C, out, in, H, W / 2 + 1), on maps (B, C, in, H, W)."""
    spectrum = (torch.fft.rfft2(x, norm="ortho").unsqueeze(2) * kernel).sum(3)
    return torch.fft.irfft2(spectrum, x.shape[-2:], norm="ortho")


def fourier_recon(x: Tensor, kernel: Tensor, after: Tensor, bound: Tensor, lam: float, steps: int, shrink: Shrink) -> tuple[Tensor, Tensor]:
    """On maps (B, C, H, W): encode by `kernel` (C, r, H, F), iterate, decode by its conjugate and filter by `after` (C, H, F)."""
    encode, decode = kernel[:, :, None], kernel[:, None].conj()
    pairs, bound = encode * decode, bound[:, None, None, None]
    target = filtered(x[:, :, None], encode)
    z = shrink(target, lam)
    for _ in range(steps):
        z = shrink(z - (filtered(z, pairs) - target) / bound, lam / bound)
    return filtered(filtered(z, decode), after[:, None, None])[:, :, 0], z
