"""The triangle product: precision settled, the implementation chosen."""

import torch
from torch import Tensor

from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import reference, rows

_dispatch.register("triangle_multiplication", "rows")

Layer = tuple[Tensor, Tensor]


def triangle_product(
    z: Tensor,
    mask: Tensor | None,
    values: tuple[Layer, Layer],
    gates: tuple[Layer, Layer],
    norm: Layer,
    out: Layer,
    gate: Layer,
    *,
    outgoing: bool,
    eps: float = 1e-5,
) -> Tensor:
    """sigmoid(z Wg + bg) (LN(x) W + b), x_ij = sum_k a_ik b_jk, or a_ki b_kj where not `outgoing`; a, b = mask (z Wp + bp) sigmoid(z Wq + bq).

    Args:
        z: (B, N, N, C).
        mask: boolean (B, N, N), True = a pair that is there.
        values, gates: weight (c, C) and bias (c,) of p and q, for a and for b.
        norm, out, gate: weight and bias of LN (c,), of W (D, c) and of Wg (D, C).

    Returns:
        (B, N, N, D). Half precision is computed in float32: sums over N overflow it.
    """
    given = z.dtype
    with full_precision(z):
        dtype = at_least_float32(z)
        weight, bias = (torch.cat([layer[at] for layer in (*values, *gates)]).to(dtype) for at in range(2))
        (nw, nb), (ow, ob), (gw, gb) = ((w.to(dtype), b.to(dtype)) for w, b in (norm, out, gate))
        z = z.to(dtype)
        choice = "rows", "projections and gates some rows at a time, computed again in the backward pass; one product of matrices a channel"
        way = reference if _dispatch.choose("triangle_multiplication", *choice) == "reference" else rows
        a, b = way.project(z, weight, bias, mask)
        x = a @ b.mT if outgoing else a.mT @ b
        return way.emit(x, z, nw, nb, ow, ob, gw, gb, eps).to(given)
