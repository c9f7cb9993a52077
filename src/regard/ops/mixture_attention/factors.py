"""The log weights as one product of wider queries and keys: nothing N x M beside what attention itself forms.

Spread out, and without what is the same for all keys, log w_ij = alpha_j q_i.k_j + beta_j v0_i.v_j + b_j, less alpha_j |q_i|^2 / 2 and
beta_j |v0_i|^2 / 2 where the precision differs from key to key. The number b_j and these two are one channel each.
"""

import torch
from torch import Tensor

from .mixture import Mixture, column, is_zero, per_key


def factors(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Q (B, H, N, D) and K (B, H, M, D) whose product Q K^T is the log weights up to a number for each query."""
    alpha, beta, v_init = column(mixture.alpha), column(mixture.beta), mixture.v_init
    left, right = [q], [alpha * k]
    biases = [] if mixture.magnitude else [-alpha / 2 * _norms(k)]
    if per_key(mixture.alpha):
        left, right = [*left, -_norms(q) / 2], [*right, alpha.expand(*k.shape[:3], 1)]
    if v_init is not None and not is_zero(mixture.beta):
        left, right = [*left, v_init], [*right, beta * v]
        if per_key(mixture.beta):
            left, right = [*left, -_norms(v_init) / 2], [*right, beta.expand(*k.shape[:3], 1)]
        if not mixture.magnitude:  # which takes back |v|^2, as it does |k|^2
            biases.append(-beta / 2 * _norms(v))
    elif mixture.values_matter:
        biases.append(beta / 2 * _norms(v))
    if biases:
        left, right = [*left, torch.ones_like(q[..., :1])], [*right, sum(biases[1:], biases[0])]
    return (left[0], right[0]) if len(left) == 1 else (torch.cat(left, -1), torch.cat(right, -1))


def _norms(x: Tensor) -> Tensor:
    """Squared lengths, (..., 1)."""
    return x.square().sum(-1, keepdim=True)
