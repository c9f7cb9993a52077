"""The definition, written out; also the way where the log weights have terms of their own for every pair."""

import torch
from torch import Tensor

from .mixture import Mixture, row


def weights(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture) -> Tensor:
    """The posterior of the components given each query, (B, H, N, M): softmax of `log_weights` over the allowed keys, zeros where there is none."""
    scores, mask = log_weights(q, k, v, mixture), mixture.mask
    if mixture.prior is not None:
        mask = mixture.prior > 0 if mask is None else mask & (mixture.prior > 0)
    if mask is None:
        return scores.softmax(-1)
    empty = ~mask.any(-1, keepdim=True)
    return scores.masked_fill(~mask, float("-inf")).masked_fill(empty, 0.0).softmax(-1).masked_fill(~mask, 0.0)


def log_weights(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture) -> Tensor:
    alpha, beta, q_pos, k_pos = row(mixture.alpha), row(mixture.beta), mixture.q_pos, mixture.k_pos
    q2, k2, v2 = (_norms(x) for x in (q, k, v))
    distances = q2.mT + k2 - 2 * q @ k.mT
    magnitudes = k2
    if q_pos is not None:
        distances = distances + q2.mT + _norms(q_pos)[..., 0, :] - 2 * torch.einsum("bhnd,nmd->bhnm", q, q_pos)
        magnitudes = magnitudes + _norms(q_pos)[..., 0, :]
    if k_pos is not None:
        distances = distances + k2 + _norms(k_pos)[..., 0, :] - 2 * torch.einsum("bhmd,nmd->bhnm", k, k_pos)
        magnitudes = magnitudes + k2 + _norms(k_pos)[..., 0, :]
    scores = -alpha / 2 * distances
    if mixture.v_init is not None:
        scores = scores - beta / 2 * (_norms(mixture.v_init).mT + v2 - 2 * mixture.v_init @ v.mT)
    if mixture.prior is not None:
        return scores + mixture.prior.masked_fill(mixture.prior <= 0, 1.0).log()
    if mixture.magnitude:
        placed = v2 if mixture.v_pos is None else _norms(v[:, :, None] + mixture.v_pos)[..., 0, :]
        scores = scores + alpha / 2 * magnitudes + beta / 2 * placed
    return scores


def _norms(x: Tensor) -> Tensor:
    """Squared lengths of rows, (..., M, d) -> (..., 1, M)."""
    return x.square().sum(-1).unsqueeze(-2)
