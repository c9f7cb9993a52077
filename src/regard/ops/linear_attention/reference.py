"""The definitions, written out with all N x M weights."""

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
