"""Softmax attention: checks done, masks merged, the kernel chosen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch, _flops  # noqa: F401  (the fused CPU kernel is counted)
from .._precision import at_least_float32, full_precision
from . import reference

_dispatch.register("softmax_attention", "fused")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T + bias) v over the allowed keys.

    Args:
        q, k, v: (B, H, N, d), (B, G, M, d), (B, G, M, dv), where G divides H; query head i uses key head i G // H.
        scale: d ** -0.5 if None.
        mask: boolean, broadcastable to (B, H, N, M), True = may be attended.
        bias: added to the scores, broadcastable to (B, H, N, M).
        causal: key j is allowed for query i if j <= i + M - N (aligned to the end).
        dropout: probability of dropping a weight; pass 0 outside training.

    Returns:
        (B, H, N, dv); a query without any allowed key gets zeros, and passes finite gradients.
    """
    n, m, d = q.shape[2], k.shape[2], q.shape[3]
    factor = d**-0.5 if scale is None else scale
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    if causal and (n != m or mask is not None or bias is not None):
        mask, causal = combine_masks(mask, causal_mask(n, m, q.device)), False
    impl = _dispatch.choose("softmax_attention", "fused", "scaled_dot_product_attention never stores the N x M weights")
    if impl == "reference":
        return reference.attend(q, k, v, factor, causal_mask(n, m, q.device) if causal else mask, bias, dropout)
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, float("-inf"))
    if mask is not None and mask.ndim < 4:
        mask = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    dv = v.shape[-1]
    if d != dv:  # with unequal widths the kernel would fall back to storing the weights
        q, k, v = _widen(q, dv), _widen(k, dv), _widen(v, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=factor)[..., :dv]


def attend_key_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T + b) v with one number b for each key, carried as one more channel: no N x M bias is stored.

    Args:
        q, k, v, scale, mask, causal, dropout: as in `attend`.
        key_bias: (B, H, M) or broadcastable to it, finite; hide keys by `mask`.

    Returns:
        (B, H, N, dv) in v's dtype. Half precision is computed in float32: rounded, a large bias would drown the scores.
    """
    given, factor = v.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(v):
        q, k, v, key_bias = (t.to(at_least_float32(q, k, v)) for t in (q, k, v, key_bias))
        key_bias = (key_bias / factor).unsqueeze(-1).expand(*k.shape[:3], 1)
        q, k = torch.cat((q, torch.ones_like(q[..., :1])), -1), torch.cat((k, key_bias), -1)
        return attend(q, k, v, scale=factor, mask=mask, causal=causal, dropout=dropout).to(given)


def attention_weights(
    q: Tensor, k: Tensor, *, scale: float | None = None, mask: Tensor | None = None, bias: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The weights `attend` uses, (B, H, N, M). For the weights of chosen queries pass those rows of q, mask and bias: O(rows M).

    `causal` stands for all queries being there; with chosen rows pass their rows of `causal_mask` as `mask`.
    """
    n, m = q.shape[2], k.shape[2]
    if causal:
        mask = combine_masks(mask, causal_mask(n, m, q.device))
    given, factor = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q):  # the products leave the range of half precision where the fused kernel's do not
        q, k = (t.to(at_least_float32(t)) for t in (q, k))
        return reference.weights(q, _repeat_heads(k, q.shape[1]), factor, mask, bias).to(given)


def causal_mask(n: int, m: int, device: torch.device | None = None, queries: Tensor | None = None) -> Tensor:
    """(n, m), True where key j <= query i + m - n: the last query sees all keys. The rows of chosen `queries` alone if they are given."""
    queries = torch.arange(n, device=device) if queries is None else queries
    return torch.arange(m, device=device) <= queries[:, None] + (m - n)


def rows_of(t: Tensor | None, queries: Tensor | None) -> Tensor | None:
    """The rows of chosen queries of a mask or bias that broadcasts to (..., N, M)."""
    return t if t is None or queries is None or t.ndim < 2 or t.shape[-2] == 1 else t[..., queries, :]


def combine_masks(*masks: Tensor | None) -> Tensor | None:
    """The conjunction of those that are given; None if none is."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    out = given[0]
    for mask in given[1:]:
        out = out & mask
    return out


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _widen(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
