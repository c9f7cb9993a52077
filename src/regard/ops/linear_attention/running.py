"""Plain sums carried from position to position: causal kernel attention whose features need no rescaling."""

from typing import NamedTuple

import torch
from torch import Tensor


class RunningSums(NamedTuple):
    """What one position hands to the next: the sum of features times [v, 1], (B, H, m, e + 1)."""

    sums: Tensor


def running_start(batch: int, heads: int, features: int, width: int, like: Tensor) -> RunningSums:
    """Before the first position; `width` e of a value, device and precision (float32 at least) of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return RunningSums(torch.zeros(batch, heads, features, width + 1, device=like.device, dtype=dtype))


def running_step(q: Tensor, k: Tensor, v: Tensor, state: RunningSums) -> tuple[Tensor, RunningSums]:
    """Features (B, H, 1, m) and a value (B, H, 1, e) -> (B, H, 1, e), in the precision of the state."""
    q, k, v = (t.to(state.sums.dtype) for t in (q, k, v))
    sums = state.sums + k.mT @ torch.cat((v, torch.ones_like(v[..., :1])), -1)
    out = q @ sums
    return out[..., :-1] / out[..., -1:], RunningSums(sums)
