"""The definition, written out with all weights."""

import math

import torch
from torch import Tensor


def weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    linear: tuple[Tensor, Tensor] | None,
    chunk: int | None,
    act: str,
    causal: bool,
    own_chunk: bool,
    dropout: float = 0.0,
    queries: Tensor | None = None,
) -> Tensor:
    """What multiplies the values, (B, R, N), for the queries at the positions `queries` (R), all if None."""
    n = k.shape[1]
    length = n if chunk is None else chunk
    j = torch.arange(n, device=k.device)
    i = (j if queries is None else queries)[:, None]
    allowed = (i // length == j // length) & ((j <= i) | (not causal))
    keys = None if key_mask is None else key_mask[:, None]
    for mask in (keys, attn_mask):
        allowed = allowed if mask is None else allowed & mask
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias[(length - 1 + j - i).clamp(0, 2 * length - 2)]
    out = torch.dropout(activate(scores, allowed, act), dropout, dropout > 0)
    if linear is not None:
        before, same = j // length < i // length, j // length == i // length
        seen = before if causal else same if own_chunk else before | ~before
        seen = seen if keys is None else seen & keys
        out = out + (linear[0] @ linear[1].mT).masked_fill(~seen, 0.0)
    return out


def activate(scores: Tensor, allowed: Tensor, act: str) -> Tensor:
    """The function of the scores; zero where a pair is not allowed. A softmax is over the allowed keys alone."""
    if act == "softmax":
        hidden = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        return hidden.softmax(-1).masked_fill(~allowed, 0.0)
    if act == "laplace":  # the normal distribution function with mean sqrt(1/2) and standard deviation sqrt(1/(4 pi))
        return (0.5 + 0.5 * torch.erf((scores - math.sqrt(0.5)) * math.sqrt(2 * math.pi))).masked_fill(~allowed, 0.0)
    return scores.relu().masked_fill(~allowed, 0.0).square()
