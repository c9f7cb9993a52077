"""Multiresolution attention: checked by the caller; the way of computing chosen, half precision computed in float32."""

import torch
from torch import Tensor

from ...errors import require
from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import pairs, reference, rows
from .choice import Resolution

_dispatch.register("multiresolution", "pairs", "rows")


def multiresolution(
    q: Tensor, k: Tensor, v: Tensor, resolution: Resolution, *, scale: float, key_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention whose score matrix is exact in the blocks that matter, and one value a block in the others.

    Args:
        q, k, v: (B, H, N, d), of the same shape.
        resolution: the blocks, how many are refined, which are preferred.
        key_mask: boolean (B, N), True for real tokens; others are neither seen nor computed: their rows are zero.
        dropout: probability of dropping the weight of a pair in refined blocks, or of a block in the others; pass 0 outside training.

    Returns:
        (B, H, N, d), zero where a query sees no key.
    """
    impl = _dispatch.choose("multiresolution", *_automatic(q, dropout))
    given, dtype = v.dtype, at_least_float32(q, k, v)
    with full_precision(v):
        if impl == "rows":
            require(_dispatch.on_cpu(q) and dropout == 0, "multiresolution by rows runs on CPU and without dropout; use 'pairs'")
            return rows.attend(q, k, v, key_mask, scale, resolution)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if impl == "reference":
            weights = reference.weights(q, k, key_mask, scale, resolution)
            return ((torch.dropout(weights, dropout, True) if dropout > 0 else weights) @ v).to(given)
        return pairs.attend(q, k, v, key_mask, scale, resolution, dropout).to(given)


def multiresolution_weights(
    q: Tensor, k: Tensor, resolution: Resolution, *, scale: float, key_mask: Tensor | None = None, queries: Tensor | None = None
) -> Tensor:
    """What `multiresolution` multiplies each value by, (B, H, N, N), or its rows for chosen queries; q holds all, for the choice of blocks."""
    with full_precision(q):
        dtype = at_least_float32(q, k)
        return reference.weights(q.to(dtype), k.to(dtype), key_mask, scale, resolution, queries).to(q.dtype)


def refined_blocks(q: Tensor, k: Tensor, resolution: Resolution, *, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """Which blocks of pairs are exact, boolean (B, H, n, n)."""
    with torch.no_grad(), full_precision(q):
        dtype = at_least_float32(q, k)
        return reference.refined(q.to(dtype), k.to(dtype), key_mask, scale, resolution)[1]


def _automatic(q: Tensor, dropout: float) -> tuple[str, str]:
    if not _dispatch.on_cpu(q):
        return "pairs", "plain operations, and no wait for the device"
    if dropout > 0:
        return "pairs", "dropout acts on single weights, which the fused kernel does not form"
    return "rows", "on CPU rows of blocks sorted by their number of refined ones go through the fused kernel in few calls"
