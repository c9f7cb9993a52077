"""Linear attention under a kernel of low rank, K = F F^T >= 0: (phi(q) phi(k)^T) K is one inner product of features phi x F."""

import torch
from torch import Tensor

from .reference import EPS

LIMIT = 2**22  # elements of one block of features: 16 MB in float32


def attend(q: Tensor, k: Tensor, v: Tensor, frequency: Tensor, mask: Tensor | None) -> Tensor:
    """q, k (B, H, N, m) features, v (B, H, N, d), frequency (B, N, r), mask (B, N) of real nodes. O(N m r d)."""
    if mask is not None:
        v, k = v.masked_fill(~mask[:, None, :, None], 0.0), k.masked_fill(~mask[:, None, :, None], 0.0)
    ones = torch.ones_like(v[..., :1]) if mask is None else mask[:, None, :, None].to(v.dtype).expand(*v.shape[:3], 1)
    v = torch.cat((v, ones), -1)
    total = EPS * v.sum(2, keepdim=True)  # eps of every allowed pair is one more feature, equal for all
    step = max(1, LIMIT // max(1, q.shape[0] * q.shape[1] * q.shape[2] * q.shape[3]))
    for at in range(0, frequency.shape[-1], step):
        part = frequency[:, None, :, None, at : at + step]
        states = (k[..., None] * part).flatten(3).mT @ v
        total = total + (q[..., None] * part).flatten(3) @ states
    return total[..., :-1] / total[..., -1:].where(total[..., -1:] > 0, torch.ones_like(total[..., -1:]))
