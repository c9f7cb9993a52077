"""Separable scores: precision settled, the way chosen."""

import torch
from torch import Tensor

from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import reference
from .chunked import chunked_attend
from .extended import extended_attend

_dispatch.register("separable_scores", "chunked", "extended")
WIDEST = 128


def separable_attention(q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """softmax over the keys (a, b), row-major, of q_p . k_ab + row_pa + column_pb, times v.

    Args:
        q, k, v: (B, H, N, d), (B, H, A C, d), (B, H, A C, dv); d may be 0.
        row, column: (B, H, N, A), (B, H, N, C), finite; expanded views are read in place.

    Returns:
        (B, H, N, dv) in v's dtype.
    """
    given = v.dtype
    impl = _dispatch.choose("separable_scores", *_automatic(q, row.shape[-1] + column.shape[-1]))
    if impl == "extended":
        return extended_attend(q.to(given), k.to(given), v, row, column)
    with full_precision(v):
        q, k, v, row, column = (t.to(at_least_float32(q, k, v, row, column)) for t in (q, k, v, row, column))
        out = reference.attend(q, k, v, row, column) if impl == "reference" else chunked_attend(q, k, v, row, column)[0]
        return out.to(given)


def separable_weights(q: Tensor, k: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The weights, (B, H, N, A C); those of R chosen queries for their rows of q, row and column."""
    with full_precision(q):
        wide = (t.to(at_least_float32(q, k, row, column)) for t in (q, k, row, column))
        return reference.weights(*wide).to(q.dtype)


def _automatic(q: Tensor, width: int) -> tuple[str, str]:
    if _dispatch.on_cpu(q):
        return "chunked", "on CPU two additions in the cache cost less than wider heads"
    if q.dtype == torch.float16:
        return "chunked", "scores that hide a key leave the range of float16"
    if width > WIDEST:
        return "chunked", f"rows and columns would widen the heads by {width}, more than {WIDEST}"
    return "extended", "scaled_dot_product_attention on heads widened by rows and columns"
