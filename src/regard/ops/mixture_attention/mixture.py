"""The mixture: what decides the weights besides queries, keys and values."""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..softmax_attention import rows_of

Precision: TypeAlias = float | Tensor


@dataclass(frozen=True)
class Mixture:
    """One Gaussian component for each key, over queries and, where `v_init` is known, over values.

    Args:
        alpha, beta: precisions of queries and values: numbers, or tensors that broadcast to (B, H, M).
        magnitude: without `prior`, weigh a component by e^(alpha |key|^2 / 2 + beta |value|^2 / 2), which makes the scores dot products.
        prior: probabilities of the components, broadcastable to (B, H, N, M); 0 hides a key.
        v_init: values that the queries are believed to have, (B, H, N, dv).
        q_pos, k_pos: places, (N, M, d), that query and key of a pair are drawn to.
        v_pos: what a pair adds to the output on further channels, (N, M, dv).
        mask: boolean, four axes that broadcast to (B, H, N, M), True = may be attended.
    """

    alpha: Precision
    beta: Precision = 0.0
    magnitude: bool = True
    prior: Tensor | None = None
    v_init: Tensor | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    v_pos: Tensor | None = None
    mask: Tensor | None = None

    @property
    def by_pairs(self) -> bool:
        """Whether there are terms of their own for every pair."""
        return any(t is not None for t in (self.prior, self.q_pos, self.k_pos, self.v_pos))

    @property
    def values_matter(self) -> bool:
        """Whether the weights depend on the values of the keys."""
        return not is_zero(self.beta) and (self.v_init is not None or (self.magnitude and self.prior is None))

    @property
    def is_dot_product(self) -> bool:
        """Whether the log weights are alpha q_i . k_j with a number alpha."""
        return self.magnitude and not isinstance(self.alpha, Tensor) and not self.values_matter and not self.by_pairs

    def to(self, dtype: torch.dtype) -> "Mixture":
        return replace(self, **{f.name: t.to(dtype) for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor) and f.name != "mask"})

    def rows(self, queries: Tensor | None) -> "Mixture":
        """The same for chosen queries, (R,)."""
        if queries is None:
            return self
        places = {name: t[queries] for name in ("q_pos", "k_pos", "v_pos") if (t := getattr(self, name)) is not None}
        v_init = None if self.v_init is None else self.v_init[:, :, queries]
        return replace(self, prior=rows_of(self.prior, queries), mask=rows_of(self.mask, queries), v_init=v_init, **places)

    def taken(self, index: Tensor) -> "Mixture":
        """The same for chosen queries of each sample, (B, R); without terms for pairs."""
        mask = self.mask if self.mask is None or self.mask.shape[2] == 1 else take_rows(self.mask, index)
        return replace(self, mask=mask, v_init=None if self.v_init is None else take_rows(self.v_init, index))


def is_zero(precision: Precision) -> bool:
    return not isinstance(precision, Tensor) and precision == 0


def per_key(precision: Precision) -> bool:
    """Whether a precision differs from key to key."""
    return isinstance(precision, Tensor) and precision.ndim > 0 and precision.shape[-1] != 1


def column(precision: Precision) -> Any:
    """A precision beside the keys: (..., M, 1)."""
    return precision.unsqueeze(-1) if isinstance(precision, Tensor) and precision.ndim else precision


def row(precision: Precision) -> Any:
    """A precision beside the scores: (..., 1, M)."""
    return precision.unsqueeze(-2) if isinstance(precision, Tensor) and precision.ndim else precision


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Chosen rows, (B, R), of (B or 1, H, N, d): (B, H, R, d)."""
    return x.take_along_dim(index[:, None, :, None], 2)
