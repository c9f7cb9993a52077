"""Additive scores: precision settled, the implementation chosen."""

from torch import Tensor

from ...validate import check_option
from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import pieces, reference

_dispatch.register("additive_scores", "pieces")


def additive_scores(q: Tensor, k: Tensor, v: Tensor, activation: str = "tanh") -> Tensor:
    """s_nm = v . f(q_n + k_m).

    Args:
        q, k, v: (B, N, d), (B, M, d), (d,).
        activation: f, "tanh" or "relu".

    Returns:
        (B, N, M), in float32 at least.
    """
    check_option(activation, ("tanh", "relu"), "activation")
    with full_precision(q):
        q, k, v = (t.to(at_least_float32(q, k, v)) for t in (q, k, v))
        choice = "pieces", "some queries at a time, so that (N, M, d) is never stored"
        return (reference if _dispatch.choose("additive_scores", *choice) == "reference" else pieces).scores(q, k, v, activation)
