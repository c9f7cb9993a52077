"""Refined blocks gathered one by one, their products in one batch, added up by row: plain operations, for any device and any transform."""

import torch
from torch import Tensor

from .choice import Resolution, choose, counts, in_blocks, mask_blocks, means


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, resolution: Resolution, dropout: float) -> Tensor:
    """(B, H, N, d). Dropout falls on single weights of refined blocks, and on whole ones of the others."""
    (batch, heads, length, _), b = q.shape, resolution.block_size
    n = resolution.rows(length)
    mask = mask_blocks(key_mask, q, n, b) if resolution.masked(length, key_mask) else None
    q, k, v = (in_blocks(x, n, b, mask) for x in (q, k, v))
    scores = scale * means(q, mask) @ means(k, mask).mT
    picked = choose(scores, mask, resolution)
    base = n * torch.arange(batch * heads, device=q.device)[:, None]
    rows, columns = ((base + index.flatten(0, 1)).flatten() for index in (picked // n, picked % n))

    def take(x: Tensor, index: Tensor) -> Tensor:
        return x.flatten(0, 2)[index]

    def gather(x: Tensor) -> Tensor:
        """Sums over the refined blocks of each row: (B, H, n, b, ...)."""
        return x.new_zeros((batch * heads * n, *x.shape[1:])).index_add(0, rows, x).unflatten(0, (batch, heads, n))

    def drop(x: Tensor) -> Tensor:
        return torch.dropout(x, dropout, True) if dropout > 0 else x

    fine = scale * take(q, rows) @ take(k, columns).mT
    if mask is not None:
        fine = fine.masked_fill(~take(mask.expand(-1, heads, -1, -1), columns).unsqueeze(-2), float("-inf"))
    best, coarsest = fine.detach().amax(-1), scores.detach().amax(-1)
    most = best.new_full((batch * heads * n, b), float("-inf")).scatter_reduce(0, rows[:, None].expand_as(best), best, "amax")
    most = most.unflatten(0, (batch, heads, n))
    if resolution.coarse:
        most = torch.maximum(most, coarsest.unsqueeze(-1))
    most = most.masked_fill(most == float("-inf"), 0.0)
    fine = (fine - take(most, rows).unsqueeze(-1)).exp()
    total = gather(fine.sum(-1)).unsqueeze(-1)
    out = gather(drop(fine) @ take(v, columns))
    if resolution.coarse:
        rest = (scores - coarsest.unsqueeze(-1)).exp() * counts(mask, q).unsqueeze(-2)
        rest = rest.masked_fill(torch.zeros_like(rest, dtype=torch.bool).flatten(-2).scatter(-1, picked, True).view_as(rest), 0.0)
        shrink = (coarsest.unsqueeze(-1) - most).exp().unsqueeze(-1)
        mean = drop(rest) @ means(v, mask)
        total = total + shrink * rest.sum(-1)[..., None, None]
        out = out + shrink * mean.unsqueeze(-2)
    out = out / (total + 1e-6)
    out = (out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0.0)).flatten(2, 3)
    # A slice would bind a graph with a free length to lengths that fill their blocks, or to those that do not.
    return out[:, :, :length] if isinstance(length, int) else out.index_select(2, torch.arange(length, device=q.device))
