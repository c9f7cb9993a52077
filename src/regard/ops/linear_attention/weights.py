"""The N x M matrix that linear attention stands for, or chosen rows of it: to look at, not to compute with."""

import torch
from torch import Tensor

from .chunks import full_precision
from .prefix import LOWEST


def effective_weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    normalize: bool = False,
    key_eps: float = 0.0,
    denom_min: float | None = None,
) -> Tensor:
    """What multiplies the values in `linear_attention`, for the queries given: (B, H, R, m), (B, H, M, m) -> (B, H, R, M).

    Args:
        mask: boolean, broadcastable to (B, H, R, M), True = the key counts; causal masks are passed here, row by row.
        normalize, key_eps, denom_min: as there.
    """
    with full_precision(q):
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
        weights = q @ k.mT
        weights = weights if mask is None else weights.masked_fill(~mask, 0.0)
        if not normalize:
            return weights
        total = weights.sum(-1, keepdim=True)
        total = total + key_eps * q.sum(-1, keepdim=True) if key_eps else total
        return weights / (total.masked_fill(total == 0, 1.0) if denom_min is None else total.clamp_min(denom_min))


def prefix_softmax_weights(q: Tensor, k: Tensor, queries: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
    """What multiplies the values in `prefix_softmax_attention`: (B, H, R, c), (B, H, N, c) -> (B, H, R, N).

    Args:
        queries: the positions (R,) whose rows q holds; all N if None.
        mask: boolean, broadcastable to (B, H, N), True = the key counts.
    """
    with full_precision(q):
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
        at = torch.arange(k.shape[2], device=k.device)
        seen = at <= (at if queries is None else queries)[:, None]
        seen = seen if mask is None else seen & mask.unsqueeze(-2)
        k = k if mask is None else k.masked_fill(~mask.unsqueeze(-1), LOWEST)
        total = k.logcumsumexp(2)
        total = total if queries is None else total[:, :, queries]
        out = q.new_zeros(*q.shape[:3], k.shape[2])
        for one, key, norm in zip(q.unbind(-1), k.unbind(-1), total.unbind(-1), strict=True):  # channel by channel: no (R, N, c) tensor
            out = out + one.unsqueeze(-1) * (key.unsqueeze(-2) - norm.unsqueeze(-1)).masked_fill(~seen, -torch.inf).exp()
        return out
