"""The definition, written out."""

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """softmax(scale q k^T + bias) over the allowed keys; a row without any is zero. Softmax in at least float32."""
    scores = (q * scale) @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if mask is None and bias is None:
        return scores.softmax(-1).to(q.dtype)
    # An empty row would be NaN in value and gradient: it gets finite scores first, zero weights after.
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, bias: Tensor | None, dropout: float) -> Tensor:
    return torch.dropout(weights(q, k, scale, mask, bias), dropout, dropout > 0) @ v
