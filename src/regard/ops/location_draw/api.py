"""Locations (B, T) among L, -1 where a sample has none."""

import torch
from torch import Tensor

from ...errors import require, require_type


def draw_location(scores: Tensor, mask: Tensor | None, generator: torch.Generator | None = None, *, noisy: bool = True) -> Tensor:
    """A location from softmax(scores), (B, T, L) -> (B, T), by the Gumbel-max trick; the likeliest one if not `noisy`.

    A location that `mask` (B, 1, L) hides is never taken.
    """
    if noisy:
        device = scores.device if generator is None else generator.device
        waits = torch.empty(scores.shape, dtype=scores.dtype, device=device).exponential_(generator=generator).to(scores.device)
        scores = scores - waits.clamp_min(torch.finfo(scores.dtype).tiny).log()
    if mask is None:
        return scores.argmax(-1)
    return torch.where(mask.any(-1), scores.masked_fill(~mask, float("-inf")).argmax(-1), -1)


def locations_at(x: Tensor, indices: Tensor) -> Tensor:
    """(B, L, D) at (B, T) -> (B, T, D); zero where there is no location."""
    found = x.gather(1, indices.clamp_min(0)[..., None].expand(-1, -1, x.shape[2]))
    return found.masked_fill((indices < 0)[..., None], 0.0)


def check_locations(indices: Tensor, locations: int, shape: tuple[int, ...]) -> None:
    """`indices` must be whole numbers of this shape, from -1 (no location) to `locations` - 1. Values are looked at where they can be."""
    require_type(isinstance(indices, Tensor), "indices must be a long tensor, got {}", type(indices).__name__)
    require_type(indices.dtype == torch.long, "indices must be a long tensor, got {}; use indices.long()", indices.dtype)
    require(tuple(indices.shape) == shape, "indices must have shape {}, got {}", shape, tuple(indices.shape))
    if _can_look(indices):
        outside = indices[(indices < -1) | (indices >= locations)]
        require(outside.numel() == 0, "indices {} lie outside the {} locations", outside, locations)


def check_draw(indices: Tensor, query: Tensor, key_mask: Tensor | None, locations: int) -> Tensor:
    """`indices` for each state of `query` as (B, T), none of them masked; -1 exactly where all are."""
    check_locations(indices, locations, tuple(query.shape[:-1]))
    indices = indices[:, None] if query.ndim == 2 else indices
    if _can_look(indices):
        some = torch.ones_like(indices, dtype=torch.bool) if key_mask is None else key_mask.any(1, keepdim=True).expand_as(indices)
        missing = indices[some & (indices < 0)]
        require(missing.numel() == 0, "indices {} name no location; -1 is only for a sample whose locations are all masked", missing)
        if key_mask is not None:
            hidden = indices[(indices >= 0) & ~key_mask.gather(1, indices.clamp_min(0))]
            require(hidden.numel() == 0, "indices {} lie on masked locations; key_mask is False there", hidden)
    return indices


def _can_look(x: Tensor) -> bool:
    """Whether values may decide what is done: not while a graph is traced, nor on the meta device."""
    return not (torch.compiler.is_compiling() or x.is_meta or torch._C._are_functorch_transforms_active())
