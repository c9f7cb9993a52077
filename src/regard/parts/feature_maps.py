"""Feature maps of kernel attention, phi(q) . phi(k) in place of exp(q . k), and the random projections they use."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import require
from ..ops.linear_attention import full_precision
from ..validate import check_option

# From each position's own stabiliser (..., N, 1) to the one that is used: itself, the largest of all positions, a running maximum.
Stabilise = Callable[[Tensor], Tensor]


def random_projection(
    num_features: int,
    head_dim: int,
    *,
    num_heads: int | None = None,
    orthogonal: bool = True,
    scaling: int = 0,
    generator: torch.Generator | None = None,
    device=None,
    dtype=None,
) -> Tensor:
    """(num_features, head_dim), or one for each head: (num_heads, num_features, head_dim).

    Rows are independent Gaussian vectors or, when `orthogonal`, blocks of head_dim orthonormal rows, each row scaled to the length of an
    independent Gaussian vector (`scaling=0`) or to sqrt(head_dim) (`scaling=1`).
    """
    check_option(scaling, (0, 1), "ortho_scaling")
    dd = {"generator": generator, "device": device, "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)}
    heads = num_heads or 1
    if not orthogonal:
        out = torch.randn(heads, num_features, head_dim, **dd)
    else:
        blocks = math.ceil(num_features / head_dim)
        rows = torch.linalg.qr(torch.randn(heads, blocks, head_dim, head_dim, **dd)).Q.mT.flatten(1, 2)[:, :num_features]
        length = torch.randn(heads, num_features, head_dim, **dd).norm(dim=-1, keepdim=True) if scaling == 0 else head_dim**0.5
        out = rows * length
    return (out if num_heads else out[0]).to(dtype or torch.get_default_dtype())


def projection_per_head(w: Tensor, heads: int, d: int) -> Tensor:
    """A projection, (m, d) or (H, m, d), as (1, 1 or H, m, d)."""
    own = w.shape[0] if w.ndim == 3 else 1
    fits = w.ndim in (2, 3) and w.shape[-1] == d and own in (1, heads)
    require(fits, "projection must be (features, {}) or ({}, features, {}), got {}", d, heads, d, tuple(w.shape))
    return w.reshape(1, own, *w.shape[-2:])


def counts_as_forward() -> bool:
    """Whether this is a forward in eager mode; compiled ones are not counted, nor a recomputation inside a backward pass (checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1


@dataclass(frozen=True)
class FeatureMap:
    """phi(y) = exp(-c) features(y) + floor, for y (B, H, N, d) and a projection (..., m, d) or None; y' = y d^-1/4.

    Args:
        kind: "favor+": exp(W y' - |y'|^2 / 2) / sqrt(m), c the largest W y'; "trig": exp(|y'|^2 / 2) [sin W y', cos W y'] / sqrt(m), c the largest
            |y'|^2 / 2; "relu": kernel(W y'), c = 0; "softmax": exp(y), up to y = 60 for sums to stay finite, c = 0.
        eps: added to each feature, the floor; divided by sqrt(m) with "favor+" and `eps_inside_ratio`.
        kernel: the function of "relu".
    """

    kind: str
    eps: float
    eps_inside_ratio: bool = True
    kernel: Callable[[Tensor], Tensor] = F.relu

    def floor(self, projection: Tensor | None) -> float:
        return self.eps * projection.shape[-2] ** -0.5 if projection is not None and self.kind == "favor+" and self.eps_inside_ratio else self.eps

    def __call__(self, y: Tensor, projection: Tensor | None, stabilise: Stabilise) -> tuple[Tensor, Tensor]:
        """The features without their floor, in at least float32, and the c they were made with (no gradient flows through it)."""
        with full_precision(y):
            y = y.to(torch.promote_types(y.dtype, torch.float32))
            if self.kind == "softmax":
                return y.clamp_max(60.0).exp(), y.new_zeros(())
            scale = y.shape[-1] ** -0.25
            projected = y * scale if projection is None else y @ (projection.to(y.dtype) * scale).mT
            if self.kind == "relu":
                return self.kernel(projected), projected.new_zeros(())
            half_norm = y.square().sum(-1, keepdim=True) * (scale**2 / 2)
            log_ratio = 0.5 * math.log(projected.shape[-1])
            if self.kind == "favor+":
                c = stabilise(projected.detach().amax(-1, keepdim=True))
                return (projected + (-half_norm - c - log_ratio)).exp_(), c
            c = stabilise(half_norm.detach())
            return torch.cat((projected.sin(), projected.cos()), -1) * (half_norm - (c + log_ratio)).exp(), c

    def queries(self, q: Tensor, projection: Tensor | None, stabilise: Stabilise) -> tuple[Tensor, Tensor]:
        """Features of queries with their floor, and their c: each query's own with "favor+", else by `stabilise`. "softmax" is over the channels."""
        if self.kind == "softmax":
            return q.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1), q.new_zeros(())
        f, c = self(q, projection, itself if self.kind == "favor+" else stabilise)
        return f + self.floor(projection), c

    def keys(self, k: Tensor, projection: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
        """Features of all keys with their floor; keys that `mask` (B, 1, M, 1) hides leave the maximum c. "softmax" is over the positions."""
        if self.kind == "softmax" and not causal:
            k = k.to(torch.promote_types(k.dtype, torch.float32))
            return (k if mask is None else k.masked_fill(~mask, torch.finfo(k.dtype).min)).softmax(-2)
        k = k if mask is None else k.masked_fill(~mask, 0.0)
        return self(k, projection, largest(mask))[0] + self.floor(projection)


def itself(own: Tensor) -> Tensor:
    """Each position keeps its own stabiliser."""
    return own


def largest(mask: Tensor | None) -> Stabilise:
    """The largest over the positions that count (B or 1, H or 1, N, 1); zero if none does."""

    def over_positions(own: Tensor) -> Tensor:
        if mask is None:
            return own.amax(-2, keepdim=True)
        c = own.masked_fill(~mask, float("-inf")).amax(-2, keepdim=True)
        return c.masked_fill(c == float("-inf"), 0.0)

    return over_positions


def running(so_far: Tensor) -> Stabilise:
    """The larger of `so_far` and a new position's own."""
    return lambda own: torch.maximum(own, so_far)


def kernel_features(z: Tensor, kind: str, projection: Tensor | None = None) -> Tensor:
    """Features of z (B, H, N, d), each position alone, in at least float32: relu(z), elu(z) + 1, or "favor" with no maximum subtracted,
    exp(W z' - |z'|^2 / 2) / sqrt(m), z' = z d^-1/4, for a projection (m, d) or (H, m, d).
    """
    with full_precision(z):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if kind == "relu":
            return F.relu(z)
        if kind == "elu":  # compiled, the backward pass of F.elu fails on the strides of heads; eager, it is ten times faster
            return F.relu(z) + z.clamp_max(0.0).exp() if torch.compiler.is_compiling() else F.elu(z) + 1
        assert projection is not None
        z = z * z.shape[-1] ** -0.25
        projected = z @ projection_per_head(projection.to(z.dtype), z.shape[1], z.shape[3]).mT
        return (projected - z.square().sum(-1, keepdim=True) / 2).exp() * projected.shape[-1] ** -0.5
