"""The definitions, written out with all N x M weights."""

import math

import torch
from torch import Tensor


def product(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(q k^T) v; causal: the sum over keys j <= i alone."""
    weights = q @ k.mT
    return (weights.tril() if causal else weights) @ v


def prefix_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out_t = sum_c q_tc sum_{s <= t} softmax_s(k_sc) v_s, the softmax over the positions up to t."""
    n = k.shape[2]
    later = torch.ones(n, n, dtype=torch.bool, device=k.device).triu(1)
    share = k.unsqueeze(2).expand(-1, -1, n, -1, -1).masked_fill(later[..., None], float("-inf")).softmax(3)
    return torch.einsum("bhtc,bhtsc,bhse->bhte", q, share, v)


def toeplitz_mask(table: Tensor, queries: Tensor) -> Tensor:
    """Rows `queries` of M_ij = table[h, i_1 - j_1 + n_1 - 1, ...] for a table (H, 2 n_1 - 1, ...): (H, R, N), positions row by row."""
    index = queries.new_zeros(1, 1)
    count = math.prod((s + 1) // 2 for s in table.shape[1:])
    keys, after = torch.arange(count, device=queries.device), count
    for side in table.shape[1:]:
        n = (side + 1) // 2
        after = after // n
        index = index * side + (queries[:, None] // after) % n - (keys // after) % n + n - 1
    return table.flatten(1)[:, index]


def toeplitz(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """((q k^T) * M) v."""
    return ((q @ k.mT) * toeplitz_mask(table, torch.arange(q.shape[2], device=q.device))) @ v


def ring_weights(weights: Tensor, queries: Tensor, height: int, width: int) -> Tensor:
    """weights (B, H, R, rings + 1) of positions `queries`, spread over the map by min(distance, rings): (B, H, R, N)."""
    keys = torch.arange(height * width, device=queries.device)
    rows, columns = (queries[:, None] // width - keys // width).abs(), (queries[:, None] % width - keys % width).abs()
    index = torch.maximum(rows, columns).clamp_max(weights.shape[3] - 1)
    return weights.gather(3, index.expand(*weights.shape[:2], -1, -1))


def rings(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """sum_t w[p, min(D, R)] (q_p . k_t) v_t."""
    return ((q @ k.mT) * ring_weights(weights, torch.arange(q.shape[2], device=q.device), height, width)) @ v
