"""Quasi-attention with an L1 gate: sums in float32, the implementation chosen."""

import torch
from torch import Tensor

from .. import _dispatch
from .._precision import at_least_float32, full_precision
from ..softmax_attention import causal_mask, combine_masks, rows_of
from . import opaque, reference
from .distances import mean_distance

_dispatch.register("l1_affinity", "chunked")


def l1_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    beta: float | Tensor,
    normalization: str,
    center_over: str,
    far: tuple[Tensor, Tensor] | None = None,
    u: Tensor | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
    pairs: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """W v and W^T u for W = tanh(q k^T) gate(-beta |a_i - b_j|_1), which is 0 where a pair is not allowed.

    Args:
        q, k, v: (B, H, N, d), (B, H, M, d), (B, H, M, dv); a factor of the scores is already in q.
        beta: a number, or one for each head.
        normalization: "center": sigmoid of the distance less its mean; "scale": 2 sigmoid; "none": sigmoid.
        center_over: the mean is over the allowed keys of a "row" or the allowed pairs of the "matrix" of a head.
        far: a and b, (B, H, N, e) and (B, H, M, e), whose distance is taken; q and k if None.
        u: (B, H, N, du), to be gathered by the keys.
        rows, keys, pairs: True = allowed; (B, N), (B, M), and four axes that broadcast to (B, H, N, M).
        causal: key j is allowed for query i if j <= i + M - N.
        dropout: probability of dropping a weight; pass 0 outside training.

    Returns:
        (B, H, N, dv), and (B, H, M, du), which is empty without u.
    """
    given, (a, b) = v.dtype, (q, k) if far is None else far
    with full_precision(v):
        dtype = at_least_float32(q, k, v)
        q, k, a, b, v = (t.to(dtype) for t in (q, k, a, b, v))
        u = None if u is None else u.to(dtype)
        impl = _dispatch.choose("l1_affinity", *_automatic(dropout))
        if impl == "reference":
            options = {"beta": beta, "normalization": normalization, "center_over": center_over, "far": (a, b), "rows": rows, "keys": keys}
            weights = torch.dropout(l1_weights(q, k, **options, pairs=pairs, causal=causal), dropout, dropout > 0)
            out, back = weights @ v, v.new_zeros(0) if u is None else weights.mT @ u
        else:
            beta = q.new_full(q.shape[:2], beta) if not isinstance(beta, Tensor) else beta.to(dtype).expand(q.shape[:2])
            pairs = None if pairs is None else pairs.expand(q.shape[0], -1, -1, -1)
            center = center_over if normalization == "center" else ""
            factor = 2.0 if normalization == "scale" else 1.0
            out, back = opaque.l1_attention(q, k, a, b, v, u, beta, rows, keys, pairs, causal, factor, center)
        return out.to(given), back.to(given)


def l1_weights(
    q: Tensor,
    k: Tensor,
    *,
    beta: float | Tensor,
    normalization: str,
    center_over: str,
    far: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
    pairs: Tensor | None = None,
    causal: bool = False,
    queries: Tensor | None = None,
) -> Tensor:
    """The weights `l1_attention` uses, (B, H, N, M), or the rows of chosen `queries` alone, (B, H, R, M)."""
    given, (a, b), n, m = q.dtype, (q, k) if far is None else far, q.shape[2], k.shape[2]
    with full_precision(q):
        dtype = at_least_float32(q, k)
        q, k, a, b = (t.to(dtype) for t in (q, k, a, b))
        of_rows, of_keys = None if rows is None else rows[:, None, :, None], None if keys is None else keys[:, None, None]
        mask = combine_masks(of_rows, of_keys, pairs, causal_mask(n, m, q.device) if causal and queries is None else None)
        center, chosen, seen = None, a, mask
        if queries is not None:
            q, chosen = q[:, :, queries], a[:, :, queries]
            seen = combine_masks(rows_of(of_rows, queries), of_keys, rows_of(pairs, queries))
            seen = combine_masks(seen, causal_mask(n, m, q.device, queries)) if causal else seen
        far_off = _distance(chosen, b)
        if normalization == "center":
            if center_over == "row" or queries is None:
                center = reference.mean(far_off, seen, center_over)
            elif pairs is None:
                center = mean_distance(a, b, rows, keys)
            else:
                center = reference.mean(_distance(a, b), mask, center_over)
        beta = beta.to(dtype)[:, None, None] if isinstance(beta, Tensor) else beta
        return reference.weights(q @ k.mT, far_off, beta, seen, normalization, center).to(given)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return reference.distance(a, b) if _dispatch.choose("l1_affinity", *_automatic(0.0)) == "reference" else torch.cdist(a, b, p=1)


def _automatic(dropout: float) -> tuple[str, str]:
    if dropout > 0:
        return "reference", "dropout of weights needs the weights"
    return "chunked", "no N x M matrix is kept, and no N x M x d one formed"
