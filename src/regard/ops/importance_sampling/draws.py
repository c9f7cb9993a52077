"""Keys drawn with their softmax probabilities, some queries at a time: the N x M probabilities are never stored."""

import torch
from torch import Tensor

from .. import _dispatch
from .._precision import at_least_float32, full_precision
from ..softmax_attention import attention_weights, causal_mask, combine_masks, rows_of

_dispatch.register("draw_keys", "inverse", "race")

BLOCK = {True: 1 << 20, False: 1 << 26}  # probabilities at a time, on the CPU (4 MB) and elsewhere


@torch.no_grad()
def draw_keys(
    q: Tensor,
    k: Tensor,
    count: int = 1,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`count` independent keys for each query, key m with the probability that `attend` gives it: indices (B, H, N, count).

    A query without any allowed key gets some index. q, k, scale, mask and causal are those of `attend`.
    """
    (b, h, n, _), m = q.shape, k.shape[2]
    cpu = _dispatch.on_cpu(q)
    # A parallel running sum is rounded in another order, so that a masked key might be hit: there the race, whose random numbers cost less there.
    automatic = ("inverse", "one random number for each draw") if cpu else ("race", "exact where running sums are parallel")
    impl = _dispatch.choose("draw_keys", *automatic)
    whole = torch.compiler.is_compiling() or q.is_meta or impl == "reference"
    step = n if whole else max(1, BLOCK[cpu] // (b * h * m))
    drawn = []
    with full_precision(q):
        q, k = (t.to(at_least_float32(q, k)) for t in (q, k))
        points = torch.rand(b, h, n, count, generator=generator, dtype=q.dtype, device=q.device) if impl != "race" else None
        for start in range(0, 1 if whole else n, step):
            rows = torch.arange(start, n if whole else min(start + step, n), device=q.device)
            allowed = combine_masks(rows_of(mask, rows), causal_mask(n, m, q.device, rows) if causal else None)
            p = attention_weights(q[:, :, rows], k, scale=scale, mask=allowed)
            drawn.append(_race(p, count, generator) if points is None else _inverse(p, points[:, :, rows]))
    return torch.cat(drawn, 2)


def _inverse(p: Tensor, points: Tensor) -> Tensor:
    """The first key at which the running sum exceeds a random share of the total."""
    sums = p.cumsum(-1)
    below = points * sums[..., -1:] * (1 - 1e-6)  # rounded up to the total itself it would be past the last key
    return torch.searchsorted(sums, below, right=True).clamp_max(p.shape[-1] - 1)


def _race(p: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Key m arrives after an exponential time of rate p_m; the first one wins."""
    return torch.stack([(p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1) for _ in range(count)], -1)
