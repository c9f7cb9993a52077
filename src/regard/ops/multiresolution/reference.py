"""The definition, written out: the weights of single tokens.

With l_ij = scale Q_i . K_j between block means, R_i = max_j l_ij, and M_r the larger of R_i and the best refined score of row r in block i,

    w_rc = e^(scale q_r . k_c - M_r)   c in a refined block j      w_rc = e^(l_ij - M_r)   c in any other block j, or 0 without coarse blocks
    out_r = sum_c w_rc v_c / (sum_c w_rc + 1e-6)
"""

import torch
from torch import Tensor

from .choice import Resolution, choose, counts, in_blocks, mask_blocks, means, parts


def refined(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, resolution: Resolution) -> tuple[Tensor, Tensor, Tensor | None]:
    """Coarse scores, and which blocks are refined, both (B, H, n, n); the mask of tokens in blocks."""
    n, b = resolution.rows(q.shape[2]), resolution.block_size
    mask = mask_blocks(key_mask, q, n, b) if resolution.masked(q.shape[2], key_mask) else None
    scores = scale * means(in_blocks(q, n, b, mask), mask) @ means(in_blocks(k, n, b, mask), mask).mT
    picked = torch.zeros_like(scores, dtype=torch.bool).flatten(-2)
    return scores, picked.scatter(-1, choose(scores, mask, resolution), True).unflatten(-1, (n, n)), mask


def weights(q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, resolution: Resolution, queries: Tensor | None = None) -> Tensor:
    """(B, H, N, N); for R chosen queries (B, H, R, N)."""
    scores, picked, mask = refined(q, k, key_mask, scale, resolution)
    length, n, b = q.shape[2], scores.shape[-1], resolution.block_size
    at = torch.arange(length, device=q.device) if queries is None else queries
    valid = q.new_ones((1, 1, n * b), dtype=torch.bool) if mask is None else mask.flatten(-2)
    q, k = (in_blocks(x, n, b, mask).flatten(2, 3) for x in (q, k))
    scores, picked = scores[:, :, at // b], picked[:, :, at // b]
    fine = scale * q[:, :, at] @ k.mT
    fine = fine.masked_fill(~(picked.repeat_interleave(b, -1) & valid.unsqueeze(-2)), float("-inf"))
    most = fine.detach().amax(-1, keepdim=True)
    if resolution.coarse:
        most = torch.maximum(most, scores.detach().amax(-1, keepdim=True))
    most = most.masked_fill(most == float("-inf"), 0.0)
    w = (fine - most).exp()
    total = w.sum(-1, keepdim=True)
    if resolution.coarse:
        rest = (scores - most).exp().masked_fill(picked, 0.0)
        t = counts(mask, q.unflatten(2, (n, b))).unsqueeze(-2)
        total = total + (rest * t).sum(-1, keepdim=True)
        tokens = rest * t * parts(mask, q.unflatten(2, (n, b))).unsqueeze(-2)
        w = w + tokens.repeat_interleave(b, -1) * valid.unsqueeze(-2)
    return (w / (total + 1e-6) * valid[..., at].unsqueeze(-1))[..., :length]
