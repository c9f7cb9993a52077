"""Gated attention: precision settled, dropout's seed drawn, the implementation chosen."""

import torch
from torch import Tensor

from .. import _dispatch
from .._precision import full_precision
from . import opaque, reference

_dispatch.register("gated_attention", "blocks")

ACTIVATIONS = ("relu2", "laplace", "softmax")


def gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    linear: tuple[Tensor, Tensor] | None = None,
    chunk: int | None = None,
    act: str = "relu2",
    causal: bool = False,
    own_chunk: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """act(q k^T + R) v inside each chunk of the sequence, plus lq (sum of lk^T v) over whole chunks.

    Args:
        q, k, v: (B, N, s), (B, N, s), (B, N, e); q has its scale already.
        bias: R by relative position, (2 L - 1) for chunks of L: R_ij = bias[L - 1 + j - i].
        key_mask: boolean (B, N), True = the key counts.
        attn_mask: boolean, broadcastable to (B, N, N), True = the pair counts; not with chunks.
        linear: lq and lk, (B, N, s) each; None for no linear part.
        chunk: positions in a chunk; None for one chunk of all. The last one may be shorter.
        act: "relu2", "laplace" or "softmax".
        causal: a query sees the keys up to its own.
        own_chunk: lq reads its own chunk alone; else all, or, if causal, those before its own.
        dropout: probability of dropping a weight act(.); pass 0 outside training.

    Returns:
        (B, N, e) in v's dtype. Half precision takes products in v's dtype, the function of the scores and the linear part in float32.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    with full_precision(v):
        q, k = q.to(v.dtype), k.to(v.dtype)
        bias = None if bias is None else bias.to(wide)
        linear = None if linear is None else (linear[0].to(v.dtype), linear[1].to(v.dtype))
        impl = _dispatch.choose("gated_attention", "blocks", "never stores more than a block of weights; computes them again for the gradient")
        if impl == "reference":
            return (reference.weights(q, k, bias, key_mask, attn_mask, linear, chunk, act, causal, own_chunk, dropout).to(v.dtype)) @ v
        if linear is not None and key_mask is not None:
            linear = linear[0], linear[1].masked_fill(~key_mask[..., None], 0.0)
        hidden = [None if mask is None else ~mask for mask in (key_mask, attn_mask)]
        seed = torch.randint(2**62, (), device=v.device) if dropout else None
        lq, lk = (None, None) if linear is None else linear
        reach = (chunk or 0) if causal or own_chunk else 0
        return opaque.gated_blocks(q, k, v, bias, *hidden, lq, lk, seed, chunk or 0, reach, act, causal, dropout)


def gated_weights(
    q: Tensor,
    k: Tensor,
    *,
    queries: Tensor | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    linear: tuple[Tensor, Tensor] | None = None,
    chunk: int | None = None,
    act: str = "relu2",
    causal: bool = False,
    own_chunk: bool = False,
) -> Tensor:
    """What `gated_attention` multiplies the values with, (B, N, N); for chosen positions `queries` (R) pass their rows of q, lq and attn_mask."""
    return reference.weights(q, k, bias, key_mask, attn_mask, linear, chunk, act, causal, own_chunk, queries=queries)
