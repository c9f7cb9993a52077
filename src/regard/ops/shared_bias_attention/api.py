"""Gated attention within rows: projections joined, precision settled, the implementation chosen."""

import torch
from torch import Tensor

from .. import _dispatch
from .._linear import linear
from .._precision import at_least_float32, full_precision
from . import reference, rows

_dispatch.register("shared_bias_attention", "rows", "kept")


def row_attention(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor],
    num_heads: int,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(sigmoid(x Wg + bg) o) Wo + bo, where o = softmax(d^-1/2 q k^T + bias) v within each row and head.

    Args:
        x: (B, R, L, C): R rows of L elements.
        q, k, v: (H d, C), the weights of the projections of x.
        gate, out: weight and bias, (H d, C) and (H d,), (D, H d) and (D,).
        bias: (B, H, L, L), added to the scores of every row.
        mask: boolean (B, R, L), True = may be attended.

    Returns:
        (B, R, L, D); an element whose row has no allowed key has o = 0.
    """
    given = x.dtype
    with full_precision(x):
        whole = torch.cat((q * (q.shape[0] // num_heads) ** -0.5, k, v, gate[0]))
        dtype = torch.promote_types(x.dtype, whole.dtype)
        x, whole, gate_bias, out_weight, out_bias = (t.to(dtype) for t in (x, whole, gate[1], *out))
        if bias is not None:
            bias = bias.to(at_least_float32(x))
        impl = _dispatch.choose("shared_bias_attention", *_automatic(x, whole))
        if impl == "kept":
            return rows.attention(linear(x.contiguous(), whole), None, gate_bias, out_weight, out_bias, bias, mask, num_heads).to(given)
        return (reference if impl == "reference" else rows).attention(x, whole, gate_bias, out_weight, out_bias, bias, mask, num_heads).to(given)


def _automatic(x: Tensor, whole: Tensor) -> tuple[str, str]:
    if torch.is_grad_enabled() and (x.requires_grad or whole.requires_grad):
        return "kept", "some rows at a time, no logits stored; the projections are kept, for computing them again takes a fifth of a training step"
    return "rows", "projections and attention some rows at a time: neither projections nor logits are stored"


def row_weights(
    x: Tensor, q: Tensor, k: Tensor, num_heads: int, *, bias: Tensor | None = None, mask: Tensor | None = None, queries: Tensor | None = None
) -> Tensor:
    """The weights of `row_attention`, (B, R, H, L, L); for chosen places `queries` of every row, (B, R, H, chosen, L)."""
    with full_precision(x):
        asked = x if queries is None else x[:, :, queries]
        if bias is not None and queries is not None:
            bias = bias[:, :, queries]
        q = q * (q.shape[0] // num_heads) ** -0.5
        heads = [(t @ w.to(t.dtype).mT).unflatten(3, (num_heads, -1)).transpose(2, 3) for t, w in ((asked, q), (x, k))]
        return reference.weights(heads[0], heads[1], bias, mask)
