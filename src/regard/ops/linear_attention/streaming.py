"""One position at a time: the sums that linear attention carries from position to position, and the step that reads and extends them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .memory import slot_softmax, slot_weights


class PerformerState(NamedTuple):
    """What one position hands to the next: sums of features times [v, 1], of [v, 1] alone, the stabilisers so far, and the number of positions."""

    sums: Tensor
    values: Tensor
    key_shift: Tensor
    query_shift: Tensor
    position: Tensor


class LunaState(NamedTuple):
    """What one position hands to the next: sums of k^T w and of w^T v, how many positions, and the memory's queries and mask."""

    keys_by_weights: Tensor
    weights_by_values: Tensor
    count: Tensor
    memory_queries: Tensor
    memory_mask: Tensor


class EfficientState(NamedTuple):
    """What one position hands to the next: for each key channel the mean of the values so far, and the log of the sum of exponentiated keys."""

    context: Tensor
    total: Tensor


def performer_start(batch: int, heads: int, features: int, width: int, like: Tensor) -> PerformerState:
    """Before the first position; `width` of a value, device and precision (float32 at least) of `like`."""
    dd = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    shift = torch.full((batch, heads, 1, 1), float("-inf"), **dd)
    sums, values = torch.zeros(batch, heads, features, width + 1, **dd), torch.zeros(batch, heads, 1, width + 1, **dd)
    return PerformerState(sums, values, shift, shift.clone(), torch.zeros(batch, dtype=torch.long, device=like.device))


def performer_step(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], v: Tensor, floor: float, state: PerformerState, key_eps: float, denom_min: float | None
) -> tuple[Tensor, PerformerState]:
    """q, k: features (B, H, 1, m) and the stabiliser they were made with; `floor` is in those of the query, not yet in those of the key."""
    (fq, cq), (fk, ck) = q, k
    v1 = torch.cat((v, torch.ones_like(v[..., :1])), -1).to(state.sums.dtype)
    sums, values = state.sums * (state.key_shift - ck).exp() + fk.mT @ v1, state.values + v1
    out = fq @ (sums + floor * values)
    total = out[..., -1:] + key_eps * fq.sum(-1, keepdim=True)
    out = out[..., :-1] / (total if denom_min is None else total.clamp_min(denom_min))
    ck, cq = ck.expand_as(state.key_shift), cq.expand_as(state.query_shift)
    return out.to(v.dtype), PerformerState(sums, values, ck, cq, state.position + 1)


def luna_start(p: Tensor, memory_mask: Tensor | None) -> LunaState:
    """Before the first position; p: queries of the memory, (B, H, L, d)."""
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    batch, _, slots, _ = p.shape
    mask = torch.ones(batch, slots, dtype=torch.bool, device=p.device) if memory_mask is None else memory_mask
    sums = p.new_zeros(*p.shape[:2], p.shape[3], slots)
    return LunaState(sums, sums.mT.clone(), torch.zeros(batch, dtype=torch.long, device=p.device), p, mask)


def luna_step(q: Tensor, kp: Tensor, k: Tensor, v: Tensor, state: LunaState) -> tuple[Tensor, LunaState]:
    """(B, H, 1, d) each -> (B, H, 1, d), in the precision of the state."""
    q, kp, k, v = (t.to(state.keys_by_weights.dtype) for t in (q, kp, k, v))
    w, count = slot_weights(kp, state.memory_queries), state.count + 1
    kw, wv = state.keys_by_weights + k.mT @ w, state.weights_by_values + w.mT @ v
    scale = count[:, None, None, None]
    a = slot_softmax((q * q.shape[-1] ** -0.5) @ kw / scale, state.memory_mask[:, None, None])
    return a @ wv / scale, LunaState(kw, wv, count, state.memory_queries, state.memory_mask)


def efficient_start(batch: int, heads: int, key_head: int, value_head: int, like: Tensor) -> EfficientState:
    """Before the first position; device and precision (float32 at least) of `like`."""
    dd = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    context = torch.zeros(batch, heads, key_head, value_head, **dd)
    return EfficientState(context, torch.full((batch, heads, key_head, 1), float("-inf"), **dd))


def efficient_step(q: Tensor, k: Tensor, v: Tensor, state: EfficientState) -> tuple[Tensor, EfficientState]:
    """(B, H, c), (B, H, c), (B, H, e) -> (B, H, 1, e), in the precision of the state."""
    q, k, v = (t.to(state.context.dtype) for t in (q, k, v))
    total = torch.logaddexp(state.total, k.unsqueeze(-1))
    context = state.context * (state.total - total).exp() + (k.unsqueeze(-1) - total).exp() * v.unsqueeze(2)
    return q.softmax(-1).unsqueeze(2) @ context, EfficientState(context, total)
