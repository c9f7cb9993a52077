"""EM in the mixture. All take q (B, H, N, d), k (B, H, M, d), v (B, H, M, dv) and compute half precision in float32 where squared lengths enter."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import require
from .. import _dispatch
from .._precision import at_least_float32, full_precision
from ..softmax_attention import attend, attention_weights
from . import reference
from .checks import check_precision
from .columns import column_sums
from .factors import factors
from .mixture import Mixture, column, take_rows

_dispatch.register("mixture_attention", "factors")

TINY = 1e-20  # the authors': beside the weight of the known tokens that a key has


def mixture_attend(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture) -> Tensor:
    """The values expected of the queries, (B, H, N, dv); with `v_pos` (B, H, N, 2 dv). A query without any allowed key gets zeros."""
    with full_precision(q):
        given, (q, k, v, mixture) = q.dtype, _exact(q, k, v, mixture, spare=True)
        if _by_definition(mixture):
            weights = reference.weights(q, k, v, mixture)
            out = weights @ v
            if mixture.v_pos is not None:
                out = torch.cat((out, torch.einsum("bhnm,nme->bhne", weights, mixture.v_pos)), -1)
        else:
            left, right, scale = _product(q, k, v, mixture)
            out = attend(left, right, v, scale=scale, mask=mixture.mask)
        return out.to(given)


def mixture_weights(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture) -> Tensor:
    """The weights `mixture_attend` uses, (B, H, N, M). For chosen queries pass those rows of q and `mixture.rows(queries)`: O(rows M)."""
    with full_precision(q):
        given, (q, k, v, mixture) = q.dtype, _exact(q, k, v, mixture, spare=True)
        if _by_definition(mixture):
            return reference.weights(q, k, v, mixture).to(given)
        left, right, scale = _product(q, k, v, mixture)
        return attention_weights(left, right, scale=scale, mask=mixture.mask).to(given)


def adapt_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixture: Mixture,
    iters: int,
    *,
    precision: float | Tensor | None = None,
    anchor: Literal["current", "initial"] = "current",
    query_mask: Tensor | None = None,
) -> Tensor:
    """Keys moved towards the queries that weigh them, `iters` times:

        k_j <- (p k_j + alpha_j sum_i W_ij q_i) / (p + alpha_j sum_i W_ij),   without p: sum_i W_ij q_i / sum_i W_ij

    Args:
        precision: p, of the Gaussian prior of the keys; a number or broadcastable to k.
        anchor: p multiplies the current key (as the authors' code does) or the initial one (the maximum of the posterior).
        query_mask: boolean (B, N), True = a query that counts; padding must not.

    Returns:
        (B, H, M, d). A key that no query weighs stays where it is.
    """
    check_precision(precision, "key_prior_precision", tuple(k.shape))
    if iters == 0:
        return k
    with full_precision(q):
        q, k, v, mixture = _exact(q, k, v, mixture)
        start, alpha = k, column(mixture.alpha)
        values = torch.cat((q, torch.ones_like(q[..., :1])), -1)
        values = values if query_mask is None else values.masked_fill(~query_mask[:, None, :, None], 0.0)
        precision = precision.to(k.dtype) if isinstance(precision, Tensor) else precision
        for _ in range(iters):
            total, weight = _collected(q, k, v, mixture, values).tensor_split((-1,), -1)
            if precision is not None:
                total = precision * (k if anchor == "current" else start) + alpha * total
                weight = precision + alpha * weight
            k = torch.where(weight > 0, total / weight.masked_fill(weight <= 0, 1.0), k)
        return k


def propagate_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixture: Mixture,
    iters: int,
    *,
    known: Tensor,
    known_mask: Tensor,
    precision: float | Tensor | None = None,
) -> Tensor:
    """Values moved towards what is known of the queries that weigh them, `iters` times, f_i = 1 where v*_i is known:

        v_j <- (p v_j + beta_j sum_i W_ij f_i v*_i) / (p + beta_j sum_i W_ij f_i),   without p the ratio of the two sums

    Args:
        known, known_mask: v* (B, H, N, dv), and where it holds, boolean (B, N). Only these queries are worked on.
        precision: p, of the Gaussian prior of the values; a number or broadcastable to v.

    Returns:
        (B, H, M, dv). The values of a sample in which nothing is known stay as they are.
    """
    check_precision(precision, "value_prior_precision", tuple(v.shape))
    if iters == 0:
        return v
    with full_precision(q):
        q, k, v, mixture = _exact(q, k, v, mixture)
        beta, some, known = column(mixture.beta), known_mask.any(1)[:, None, None, None], known.to(q.dtype)
        if not (_by_definition(mixture) or _without_data(q)):
            count = int(known_mask.sum(1).max())
            if count == 0:
                return v
            first = known_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
            q, known, mixture = take_rows(q, first), take_rows(known, first), mixture.taken(first)
            known_mask = known_mask.gather(1, first)
        values = torch.cat((known, torch.ones_like(known[..., :1])), -1).masked_fill(~known_mask[:, None, :, None], 0.0)
        precision, collected = precision.to(v.dtype) if isinstance(precision, Tensor) else precision, None
        for _ in range(iters):
            if collected is None or mixture.values_matter:
                collected = _collected(q, k, v, mixture, values)
            total, weight = collected.tensor_split((-1,), -1)
            weight = weight + TINY
            if precision is not None:
                total, weight = precision * v + beta * total, precision + beta * weight
            v = torch.where(some & (weight > 0), total / weight.masked_fill(weight <= 0, 1.0), v)
        return v


def _collected(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture, values: Tensor) -> Tensor:
    """What every key gets of the queries' values: sum_i W_ij values_i."""
    if _by_definition(mixture):
        return reference.weights(q, k, v, mixture).mT @ values
    return column_sums(*factors(q, k, v, mixture), values, mixture.mask)


def _product(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor, float]:
    """Q, K and a scale: the log weights are scale Q K^T."""
    if mixture.is_dot_product:
        return q, k, mixture.alpha  # type: ignore[return-value]
    left, right = factors(q, k, v, mixture)
    spare = 0 if _dispatch.on_cpu(q) else -left.shape[-1] % 8  # the fused kernels of GPUs decline other widths
    return F.pad(left, (0, spare)), F.pad(right, (0, spare)), 1.0


def _exact(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture, spare: bool = False) -> tuple[Tensor, Tensor, Tensor, Mixture]:
    """All in one dtype, float32 at least; `spare` leaves half precision to the kernels of plain dot products."""
    same = q.dtype == k.dtype == v.dtype
    dtype = q.dtype if spare and same and mixture.is_dot_product else at_least_float32(q, k, v)
    return q.to(dtype), k.to(dtype), v.to(dtype), mixture.to(dtype)


def _by_definition(mixture: Mixture) -> bool:
    if mixture.by_pairs:
        impl = _dispatch.choose("mixture_attention", "reference", "prior, q_pos, k_pos and v_pos are N x M as they come")
        require(impl == "reference", "mixture_attention has no {} for prior, q_pos, k_pos and v_pos", impl)
    else:
        impl = _dispatch.choose("mixture_attention", "factors", "the log weights are one product: no N x M tensor is kept")
    return impl == "reference"


def _without_data(q: Tensor) -> bool:
    """Whether the number of known tokens cannot be read off: in a graph, on the meta device, under torch.func."""
    return torch.compiler.is_compiling() or q.is_meta or torch._C._are_functorch_transforms_active()
