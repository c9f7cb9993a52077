"""Pairwise affinities, the way of computing chosen: queries (B, N, d), keys (B, M, d), values (B, M, dv), which the caller has checked."""

import torch
from torch import Tensor

from .. import _dispatch
from ..softmax_attention import attend
from . import associative, narrow, ordered, reference
from .reference import Kind

_dispatch.register("pairwise_attention", "fused", "narrow")
_dispatch.register("pairwise_dot", "associative")
_dispatch.register("pairwise_relu", "ordered")
STORED_BYTES, NARROW_STORED_BYTES = 4 << 20, 16 << 20  # for queries as wide as the values, and for narrower ones
NARROW_VALUES = 64  # under this width of the values zeros cost less than the blocks of queries do


def pairwise_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 1.0) -> Tensor:
    """softmax_j(scale q_i . k_j) v_j summed over j: (B, N, dv), in memory as rows or as columns, which a 1x1 convolution takes as they lie."""
    impl = _dispatch.choose("pairwise_attention", *_choose_attention(q, k, v))
    if impl == "reference":
        return reference.attend(_wide(q), _wide(k), _wide(v), scale).to(v.dtype)
    if impl == "narrow":
        return narrow.pairwise_attention(q, k, v, scale)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # the fused kernel declines other layouts
    return attend(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]


def pairwise_dot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(q_i . k_j / M) v_j summed over j: (B, N, dv). Sums in float32 at least."""
    impl = _dispatch.choose("pairwise_dot", "associative", "q (k^T v) needs no N x M weights")
    args = _wide(q), _wide(k), _wide(v)
    out = associative.pairwise_dot(*args) if impl == "associative" else reference.weights(*args[:2], "dot") @ args[2]
    return out.to(v.dtype)


def pairwise_relu(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """(relu(a_i + b_j) / M) v_j summed over j, for numbers a (B, N), b (B, M): (B, N, dv). Sums in float32 at least."""
    impl = _dispatch.choose("pairwise_relu", "ordered", "prefix sums over sorted keys are exact and need no N x M weights")
    args = _wide(a), _wide(b), _wide(v)
    out = ordered.pairwise_relu(*args) if impl == "ordered" else reference.weights(*args[:2], "relu") @ args[2]
    return out.to(v.dtype)


def affinity_weights(a: Tensor, b: Tensor, kind: Kind, *, scale: float = 1.0) -> Tensor:
    """The weights, (B, N, M), computed in float32 at least; "relu" takes numbers a (B, N), b (B, M)."""
    return reference.weights(_wide(a), _wide(b), kind, scale).to(a.dtype)


def _choose_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, str]:
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or q.dtype not in (torch.float32, torch.float64)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not plain and training and _dispatch.on_cpu(q) and q.shape[2] <= v.shape[2]:
        size = q.shape[0] * q.shape[1] * k.shape[1] * q.element_size()
        if size <= (STORED_BYTES if q.shape[2] == v.shape[2] else NARROW_STORED_BYTES):
            return "reference", f"in training on CPU, {size / 1e6:.1f} MB of weights are kept faster than they are computed again"
    wide = q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.float64)
    if wide and _dispatch.on_cpu(q) and q.shape[2] < v.shape[2] >= NARROW_VALUES:
        return "narrow", "the fused kernel would pad queries and keys to the width of the values"
    return "fused", "scaled_dot_product_attention never stores the N x M weights"


def _wide(x: Tensor) -> Tensor:
    """Unscaled scores and sums over positions leave the range of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
