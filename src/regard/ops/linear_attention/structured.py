"""Kernel attention whose weights also depend on where query and key stand: checks done, the way chosen."""

import torch
from torch import Tensor

from ...validate import check_option
from .. import _dispatch
from . import reference, rings, toeplitz

_dispatch.register("toeplitz_product", "dense", "fft")
_dispatch.register("ring_product", "dense", "window", "sat")


def toeplitz_product(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, causal: bool = False, method: str = "auto") -> Tensor:
    """((q k^T) * M) v with M_ij = table[h, i_1 - j_1 + n_1 - 1, i_2 - j_2 + n_2 - 1, ...].

    Args:
        q, k, v: (B, H, N, m), (B, H, N, m), (B, H, N, e), float32 or float64; positions of the grid n_1 x n_2 x ... row by row.
        table: (H, 2 n_1 - 1, 2 n_2 - 1, ...).
        causal: query i sees keys j <= i.
        method: "dense", "fft" or "auto", the faster of the two on a CPU.
    """
    check_option(method, ("auto", "dense", "fft"), "method")
    if causal:  # whether i < j depends on the offset alone: offsets before the middle of the table
        flat = table.flatten(1)
        table = flat.masked_fill(torch.arange(flat.shape[1], device=flat.device) < flat.shape[1] // 2, 0.0).view(table.shape)
    if method != "auto" or torch.compiler.is_compiling():  # compiled, a free length is not to be looked at: the operator chooses
        automatic, why = method, "asked for by method"
    else:
        automatic = toeplitz.faster(q.shape[2], table.ndim - 1, q.shape[3], v.shape[3], causal)
        why = f"{'fewer operations' if automatic == 'fft' else 'dense products are faster'} at {q.shape[2]} positions"
    impl = _dispatch.choose("toeplitz_product", automatic, why)
    if impl == "reference":
        return reference.toeplitz(q, k, v, table)
    return toeplitz.toeplitz_product(q, k, v, table, causal, impl)


def ring_product(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, height: int, width: int, *, method: str = "auto") -> Tensor:
    """sum_t w[p, min(D, R)] (q_p . k_t) v_t, with D = max(|dy|, |dx|) the distance of pixel t from pixel p.

    Args:
        q, k, v: (B, H, N, m), (B, H, N, m), (B, H, N, e), float32 or float64; N = height width pixels row by row.
        weights: (B, H, N, R + 1), of the rings 0 .. R - 1 of each pixel, and of all beyond.
        method: "dense", "window", "sat" or "auto", the fastest of the three on a CPU.
    """
    check_option(method, ("auto", "dense", "window", "sat"), "method")
    if method != "auto" or torch.compiler.is_compiling():  # compiled, a free length is not to be looked at: the operator chooses
        automatic, why = method, "asked for by method"
    else:
        automatic = rings.faster(height, width, weights.shape[3] - 1, q.shape[3], v.shape[3])
        why = {"window": "a tile sees little of the map", "dense": "a tile sees most of the map", "sat": "few columns and many rings"}[automatic]
    impl = _dispatch.choose("ring_product", automatic, why)
    if impl == "reference":
        return reference.rings(q, k, v, weights, height, width)
    return rings.ring_product(q, k, v, weights, height, width, impl)
