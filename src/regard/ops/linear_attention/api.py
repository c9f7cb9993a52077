"""Linear attention: masks applied, sums in float32, the implementation chosen."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _dispatch
from . import blocked, chunked, favor, prefix, reference
from .chunks import chunk_size, fitted, full_precision

_dispatch.register("linear_attention", "chunked")
_dispatch.register("prefix_softmax_attention", "chunked")
_dispatch.register("blockwise", "whole", "blocked")
_dispatch.register("favor_attention", "features", "pieces")

BLOCK = 1 << 21  # floats of temporaries in a block: 8 MB
# Up to here (64 MB) keeping them is faster than computing them again, and no single one is above 32 MB.
KEPT = 2**24


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    normalize: bool = False,
    key_eps: float = 0.0,
    denom_min: float | None = None,
) -> Tensor:
    """q (k^T v) for features q and k, in time and memory linear in the number of positions.

    Args:
        q, k, v: (B, H, N, m), (B, H, M, m), (B, H, M, e).
        mask: boolean, broadcastable to (B, H, M), True = the key counts.
        causal: query i sums over keys j <= i; N and M must be equal.
        normalize: divide by q (sum k + key_eps). A sum of exactly zero (no key at all) gives zeros.
        denom_min: smallest denominator.

    Returns:
        (B, H, N, e) in v's dtype; sums are kept in float32 at least.
    """
    given = v.dtype
    with full_precision(v):
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        if mask is not None:
            gone = ~mask.unsqueeze(-1)
            k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
        if normalize:
            v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        impl = _dispatch.choose("linear_attention", "chunked", "never stores the N x M weights")
        if impl == "reference":
            out = reference.product(q, k, v, causal)
        else:
            out = chunked.product(q, k, v, causal, fitted(chunk_size(q.shape[3], v.shape[3]), q.shape[2]))
        if normalize:
            out, total = out[..., :-1], out[..., -1:]
            total = total + key_eps * q.sum(-1, keepdim=True) if key_eps else total
            out = out / (total.masked_fill(total == 0, 1.0) if denom_min is None else total.clamp_min(denom_min))
        return out.to(given)


def favor_runs_in_pieces(q: Tensor, w: Tensor) -> bool:
    """Whether to call `favor_attention` rather than to make the features."""
    choice = "pieces", "features stay in the cache and none is kept for the backward pass"
    if torch._C._are_functorch_transforms_active() or not _dispatch.on_cpu(q):
        choice = "features", "under a function transform or not on the CPU"
    elif w.requires_grad and torch.is_grad_enabled():
        choice = "features", "a projection that learns needs its gradient"
    return _dispatch.choose("favor_attention", *choice) == "pieces"


def favor_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *, mask: Tensor | None, floor: float, denom_min: float | None) -> Tensor:
    """Normalised attention through positive random features f + floor of queries and keys, none of which is kept.

    Args:
        q, k, v: (B, H, N, d), (B, H, M, d), (B, H, M, e).
        w: the projection, (1, 1 or H, m, d); gets no gradient.
        mask: boolean (B, M), True = the key counts.
        floor, denom_min: added to each feature; smallest denominator.

    Returns:
        (B, H, N, e), differentiable once; sums are kept in float32 at least.
    """
    with full_precision(q):
        return favor.favor(q, k, v, w, mask, floor, denom_min)[0]


def prefix_softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Causal attention whose keys are softmaxed, channel by channel, over the positions up to the query: q_t . sum_s softmax_{s <= t}(k_s) v_s.

    Args:
        q: weights of the channels, (B, H, N, c). k: scores of the positions, (B, H, N, c). v: (B, H, N, e).
        mask: boolean, broadcastable to (B, H, N), True = the key counts. A query without any gets zeros.
    """
    given = v.dtype
    with full_precision(v):
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        if mask is not None:
            gone = ~mask.unsqueeze(-1)
            k, v = k.masked_fill(gone, prefix.LOWEST), v.masked_fill(gone, 0.0)
        if _dispatch.choose("prefix_softmax_attention", "chunked", "never stores the N x N weights") == "reference":
            return reference.prefix_softmax(q, k, v).to(given)
        return prefix.prefix_softmax(q, k, v).to(given)


def blockwise(core: Callable[..., Tensor], *tensors: Tensor | None, floats: int) -> Tensor:
    """core(*tensors), a function of (B or 1, H or 1, ...) tensors that treats every batch element and head alone, (B, H, N, e).

    In eager mode on the CPU it runs on a few (batch, head) pairs at a time and again in the backward pass, so that its temporaries are small and
    none is kept. `core` must be deterministic and own no parameters: all it depends on comes in as `tensors`.

    Args:
        floats: about how many floats of temporaries `core` makes for one pair.
    """
    q = tensors[0]
    assert q is not None
    batch, heads = q.shape[:2]
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or q.device.type != "cpu":
        choice = "whole", "compiled, under a function transform or not on the CPU"
    elif batch * heads * floats <= (KEPT if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors) else BLOCK):
        choice = "whole", "its temporaries are small"
    else:
        choice = "blocked", "temporaries stay in the cache and none is kept for the backward pass"
    if _dispatch.choose("blockwise", *choice) != "blocked":
        return core(*tensors)
    return blocked.run(core, tensors, blocked.blocks_of(batch, heads, floats, BLOCK))
