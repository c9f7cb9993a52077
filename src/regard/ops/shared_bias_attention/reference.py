"""The definition, written out."""

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """softmax(q k^T + bias) over the allowed keys, (B, R, H, L, L), in at least float32; a row without any is zero."""
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias[:, None]
    if mask is None:
        return scores.softmax(-1)
    # A row without keys would be NaN in value and gradient: it gets finite scores first, zero weights after.
    hidden = ~mask[:, :, None, None]
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)


def attention(
    x: Tensor, whole: Tensor, gate_bias: Tensor, out_weight: Tensor, out_bias: Tensor, bias: Tensor | None, mask: Tensor | None, heads: int
) -> Tensor:
    """`whole` (4 H d, C) holds the projections to scaled queries, keys, values and gates."""
    q, k, v, g = (x @ whole.mT).unflatten(3, (4, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    o = (weights(q, k, bias, mask).to(v.dtype) @ v).transpose(2, 3).flatten(3)
    return (o * (g.transpose(2, 3).flatten(3) + gate_bias).sigmoid()) @ out_weight.mT + out_bias
