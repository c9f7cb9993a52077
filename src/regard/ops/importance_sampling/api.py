"""Estimates of softmax attention through C Gaussian proposals: precision and implementation chosen."""

from torch import Tensor

from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import products, reference
from .reference import Mixture

_dispatch.register("mixture_attention", "products")


def mixture_attention(mixture: Mixture, v: Tensor) -> Tensor:
    """Softmax attention over v (B, H, M, dv), estimated by multiple importance sampling: (B, H, N, dv), zeros where no key is allowed."""
    given = v.dtype
    with full_precision(v):
        mixture, v = _prepared(mixture), v.to(at_least_float32(v))
        impl = _dispatch.choose("mixture_attention", "products", "no logarithm of an N x C matrix, exponentials taken once")
        if impl == "reference":
            mixing, spread = reference.factors(mixture)
            return (mixing @ (spread @ v)).to(given)
        return products.estimate(mixture, v).to(given)


def mixture_weights(mixture: Mixture, queries: Tensor | None = None) -> Tensor:
    """What multiplies the values in `mixture_attention`, for R chosen queries (all if None): (B, H, R, M), at O((R + N + M) C)."""
    with full_precision(mixture.q):
        mixing, spread = reference.factors(_prepared(mixture))
        return (mixing if queries is None else mixing[:, :, queries]) @ spread


def _prepared(x: Mixture) -> Mixture:
    tensors = {name: getattr(x, name) for name in ("q", "k", "q_centres", "k_centres", "samples")}
    dtype = at_least_float32(*tensors.values())
    # Where there is no proposal at all all are taken: they mix zeros.
    present = None if x.present is None else x.present | ~x.present.any(-1, keepdim=True)
    return x._replace(present=present, **{name: t.to(dtype) for name, t in tensors.items()})
