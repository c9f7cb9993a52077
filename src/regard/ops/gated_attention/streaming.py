"""Causal chunks one position at a time: the sums of finished chunks, and the keys and values of the one that is being filled."""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import activate


class MixedChunkState(NamedTuple):
    """What one position hands to the next: sums of lk^T v over finished chunks and over the current one, (B, s, e); keys and values of the current
    chunk of c, (B, c, s) and (B, c, e); the half of the last input that shifts on; how many positions there were."""

    sums: Tensor
    filling: Tensor
    keys: Tensor
    values: Tensor
    last: Tensor
    position: Tensor


def mixed_chunk_start(batch: int, chunk: int, s: int, e: int, shifted: int, like: Tensor) -> MixedChunkState:
    """Before the first position; device and precision (float32 at least) of `like`."""
    dd = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    sums, filling, keys, values = (torch.zeros(batch, *shape, **dd) for shape in ((s, e), (s, e), (chunk, s), (chunk, e)))
    position = torch.zeros(batch, dtype=torch.long, device=like.device)
    return MixedChunkState(sums, filling, keys, values, torch.zeros(batch, shifted, **dd), position)


def mixed_chunk_step(
    q: Tensor, k: Tensor, v: Tensor, lq: Tensor, lk: Tensor, bias: Tensor | None, act: str, last: Tensor, state: MixedChunkState
) -> tuple[Tensor, MixedChunkState]:
    """q, k, lq, lk (B, s) and v (B, e), scaled as for `gated_attention`; `last` is kept for the next step. (B, e) in the precision of the state."""
    q, k, v, lq, lk, last = (t.to(state.sums.dtype) for t in (q, k, v, lq, lk, last))
    length = state.keys.shape[1]
    at, j = (state.position % length)[:, None], torch.arange(length, device=q.device)
    first, here = (at == 0)[..., None], (j == at)[..., None]
    sums, filling = state.sums + state.filling * first, state.filling.masked_fill(first, 0.0)
    keys, values = torch.where(here, k[:, None], state.keys), torch.where(here, v[:, None], state.values)
    scores = (keys @ q[..., None])[..., 0]
    if bias is not None:
        scores = scores + bias[length - 1 + j - at]
    out = activate(scores, j <= at, act)[:, None] @ values + lq[:, None] @ sums
    return out[:, 0], MixedChunkState(sums, filling + lk[..., None] * v[:, None], keys, values, last, state.position + 1)
