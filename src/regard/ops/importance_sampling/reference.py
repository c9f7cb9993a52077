"""The estimate, written out in logarithms.

L(y, w) = s w.y - s |y|^2 / 2,   r_c(n) = log alpha_c(n) + L(q_n, w_c) + log sum_m exp L(k_m, w_c) - g_c
out_n = sum_c softmax_c(r_c(n)) sum_m softmax_m(L(k_m, w_c)) v_m
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = -1e30  # of what does not count: finite, so that nothing is NaN where nothing counts


class Mixture(NamedTuple):
    """Queries, keys and the C proposals between them.

    Args:
        q, k: (B, H, N, d), (B, H, M, d).
        q_centres, k_centres: (B, H, C, d); proposal c is a Gaussian around q_centres + k_centres.
        samples: one of each proposal, (B, H, C, d), or two, (B, H, 2 C, d), the first of all proposals first.
        mis_type: how proposals are weighed, "mis-opt", "mis-bh" or "mis-biased". alpha_coeff: of the share of "mis-opt" that depends on the query.
        key_mask: boolean (B, 1, M), True = may be attended. query_mask: (B, 1, N), queries that "mis-opt" counts.
        present: (B, 1, C), proposals that exist.
    """

    q: Tensor
    k: Tensor
    q_centres: Tensor
    k_centres: Tensor
    samples: Tensor
    mis_type: str
    alpha_coeff: float = 1.0
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    present: Tensor | None = None


def log_feature(y: Tensor, w: Tensor) -> Tensor:
    """L of every y (..., n, d) under every w (..., c, d): (..., c, n)."""
    scale = y.shape[-1] ** -0.5
    return scale * (w @ y.mT) - 0.5 * scale * y.square().sum(-1).unsqueeze(-2)


def densities(mu: Tensor, w: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """log of a proposal's own density at its sample, and of the sum of all, (B, H, C') each; what is absent is in no sum."""
    copies = w.shape[2] // mu.shape[2]
    every = log_feature(mu, w)
    if present is not None:
        every = every.masked_fill(~present.unsqueeze(2), LOWEST)
    mu, scale = mu.repeat(1, 1, copies, 1), mu.shape[-1] ** -0.5
    own = scale * (w * mu).sum(-1) - 0.5 * scale * mu.square().sum(-1)
    if present is not None:
        own = own.masked_fill(~present.repeat(1, 1, copies), LOWEST)
    return own, every.logsumexp(-1) + math.log(copies)


def factors(x: Mixture) -> tuple[Tensor, Tensor]:
    """How each query mixes the proposals (B, H, N, C'), and how each proposal weighs the keys (B, H, C', M)."""
    q, w, present, scale = x.q, x.samples, x.present, x.q.shape[-1] ** -0.5
    mu, copies = x.q_centres + x.k_centres, w.shape[2] // x.q_centres.shape[2]
    own, total = densities(mu, w, present)
    scores = log_feature(x.k, w)
    if x.key_mask is not None:
        scores = scores.masked_fill(~x.key_mask.unsqueeze(2), LOWEST)
    ratio = log_feature(q, w).mT + (scores.logsumexp(-1) - (own if x.mis_type == "mis-opt" else total)).unsqueeze(2)
    if x.mis_type == "mis-biased":
        ratio = ratio + scale * (q @ mu.mT).repeat(1, 1, 1, copies)
    if x.mis_type == "mis-opt":
        share = scale * (q @ x.q_centres.mT)
        share = (share if x.query_mask is None else share.masked_fill(~x.query_mask.unsqueeze(-1), LOWEST)).softmax(2)
        counted = share.mean(-1, keepdim=True)
        if present is not None:
            share = share * present.unsqueeze(2)
            counted = share.sum(-1, keepdim=True) / present.unsqueeze(2).sum(-1, keepdim=True)
        extra = (x.alpha_coeff * (share - counted)).repeat(1, 1, 1, copies)
        ratio = ratio + ((own - total).exp().unsqueeze(2) + extra).clamp_min(1e-8).log()
    if present is not None:
        ratio = ratio.masked_fill(~present.repeat(1, 1, copies).unsqueeze(2), LOWEST)
    mixing, spread = ratio.softmax(-1), scores.softmax(-1)
    return mixing, spread if x.key_mask is None else torch.where(x.key_mask.unsqueeze(2), spread, 0.0)
