"""Dot-product affinity by associativity: (q k^T) v = q (k^T v), O((N + M) d dv) and no N x M."""

from torch import Tensor


def pairwise_dot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q @ (k.mT @ v / k.shape[1])
