"""Causal attention through the slots of a memory: how much of each position goes into a slot, and what a query reads from the slots so far."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .api import blockwise, linear_attention
from .chunks import full_precision


def slot_weights(kp: Tensor, p: Tensor) -> Tensor:
    """How much of each position goes into each slot, (B, H, N, L): w = log2(1 + 2^(kp . p / sqrt(d)))."""
    return F.softplus(kp @ (p * kp.shape[-1] ** -0.5).mT, beta=math.log(2))


def slot_softmax(scores: Tensor, slots: Tensor | None) -> Tensor:
    """Softmax over the slots that count (True); zeros where none does."""
    if slots is None:
        return scores.softmax(-1)
    return scores.masked_fill(~slots, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~slots, 0.0)


def causal_memory_attention(
    q: Tensor,
    kp: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    key_mask: Tensor | None,
    memory_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Tensor:
    """F(softmax(F(q / sqrt(d), k, w)), w, v) with w the slot weights of kp and p, and F(X, Y, Z)_t = X_t mean_{j <= t} Y_j^T Z_j.

    Args:
        q, kp, k, v: (B, H, N, d). p: queries of the memory, (B or 1, H, L, d).
        key_mask, memory_mask: boolean (B, N) and (B, L), True = the position, or the slot, counts.
        dropout: probability of dropping a slot weight, and a weight of the softmax.
        return_weights: the softmax, (B, H, N, L), in place of the output.
    """
    n = q.shape[2]
    mask = None if key_mask is None else key_mask[:, None]
    counts = torch.arange(1, n + 1, device=q.device).expand(1, 1, n) if mask is None else mask.cumsum(-1).clamp_min(1)
    slots = None if memory_mask is None else memory_mask[:, None, None]
    tensors = (q, kp, k, v, p, counts.unsqueeze(-1), mask, slots)
    if dropout or return_weights:  # the same units must fall out when the backward pass computes again
        return _core(*tensors, dropout=dropout, return_weights=return_weights)
    return blockwise(_core, *tensors, floats=4 * n * (p.shape[2] + q.shape[3]))


def _core(
    q: Tensor,
    kp: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    counts: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Tensor:
    given = q.dtype
    with full_precision(q):
        q, kp, k, p = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, kp, k, p))
        w = slot_weights(kp, p)
        w = F.dropout(w, dropout) if dropout else w
        a = slot_softmax(linear_attention(q * q.shape[-1] ** -0.5, k, w, mask=mask, causal=True) / counts, slots)
        if return_weights:
            return a.to(given)
        a = F.dropout(a, dropout) if dropout else a
        return (linear_attention(a, w, v.to(a.dtype), mask=mask, causal=True) / counts).to(given)
