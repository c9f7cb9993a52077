"""Attention scores that compare no tokens: predicted from the query alone, or learned constants; and attention by them.

`rows` says which positions the queries stand at: a slice or a tensor of numbers. Keys stand at the first m positions. The parts are asked by a
method `scores`, not called: tools that hook modules refuse a view of a parameter as an output.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import require
from ..ops._precision import at_least_float32, full_precision
from ..ops.linear_attention import blockwise
from ..ops.softmax_attention import attend, causal_mask, combine_masks
from .heads import split_heads
from .linear import Linear

Rows = slice | Tensor
STD = 0.02


class Scores(NamedTuple):
    """q k^T + alpha table + the outer product of a and c, cut to the keys. Batch and head axes may be 1; the parts may be None."""

    q: Tensor | None = None
    k: Tensor | None = None
    table: Tensor | None = None
    alpha: Tensor | None = None
    a: Tensor | None = None
    c: Tensor | None = None

    def plus(self, other: "Scores", factor: Tensor | None) -> "Scores":
        """These scores and `factor` times those of one more mode: factored ones as further channels, so that one product gives all."""
        q, a = (t if t is None or factor is None else t * factor for t in (other.q, other.a))
        if other.table is not None:
            return self._replace(table=other.table, alpha=factor if factor is None else factor.reshape(1, 1, 1, 1))
        if a is not None:
            return self._replace(a=a, c=other.c)
        return self._replace(q=_beside(self.q, q), k=_beside(self.k, other.k))


def _beside(some: Tensor | None, more: Tensor | None) -> Tensor | None:
    if some is None or more is None:
        return more if some is None else some
    batch, heads = (max(some.shape[axis], more.shape[axis]) for axis in (0, 1))
    return torch.cat([t.to(some.dtype).expand(batch, heads, -1, -1) for t in (some, more)], -1)  # under autocast the dtypes may differ


class DenseScores(nn.Module):
    """relu(x W1 + b1) W2 + b2, as queries (B, H, R, e + 1) and keys (1, 1 or H, m, e + 1): the last channel carries b2."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, max_len: int, share_w2: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads, heads = num_heads, 1 if share_w2 else num_heads
        self.w1 = Linear(dim, num_heads * hidden_dim, **dd)
        self.w2 = small(heads, hidden_dim, max_len, **dd)
        self.b2 = nn.Parameter(torch.zeros(heads, max_len, **dd))

    def scores(self, x: Tensor, rows: Rows, m: int) -> Scores:
        z = split_heads(self.w1(x).relu(), self.num_heads)
        keys = torch.cat((self.w2[..., :m].mT, self.b2[:, :m, None]), -1)
        return Scores(q=torch.cat((z, torch.ones_like(z[..., :1])), -1), k=keys[None])


class FactorizedDenseScores(nn.Module):
    """Two predictions a, c of a and L / a numbers, whose outer product is the row of scores: a (B, H, R, a), c (B, H, R, L / a)."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, factors: tuple[int, int], share_w2: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads, heads = num_heads, 1 if share_w2 else num_heads
        self.w1 = Linear(dim, num_heads * hidden_dim, **dd)
        self.w2_a, self.w2_b = (small(heads, hidden_dim, size, **dd) for size in factors)
        self.b2_a, self.b2_b = (nn.Parameter(torch.zeros(heads, size, **dd)) for size in factors)

    def scores(self, x: Tensor, rows: Rows, m: int) -> Scores:
        z, wide = split_heads(self.w1(x).relu(), self.num_heads), self.b2_b.shape[1]
        used = (m + wide - 1) // wide  # of a: the others stand for keys that are not there
        return Scores(a=z @ self.w2_a[..., :used] + self.b2_a[:, None, :used], c=z @ self.w2_b + self.b2_b[:, None])


class RandomScores(nn.Module):
    """A learned or frozen table (1, H, R, m)."""

    weight: Tensor

    def __init__(self, num_heads: int, max_len: int, trainable: bool, **dd: Any) -> None:
        super().__init__()
        if trainable:
            self.weight = small(num_heads, max_len, max_len, **dd)
        else:
            self.register_buffer("weight", torch.randn(num_heads, max_len, max_len, **dd))

    def scores(self, x: Tensor, rows: Rows, m: int) -> Scores:
        return Scores(table=self.weight[None, :, rows, :m])


class FactorizedRandomScores(nn.Module):
    """A learned table of low rank, as queries (1, H, R, k) and keys (1, H, m, k)."""

    def __init__(self, num_heads: int, max_len: int, rank: int, **dd: Any) -> None:
        super().__init__()
        self.r1, self.r2 = (small(num_heads, max_len, rank, **dd) for _ in range(2))

    def scores(self, x: Tensor, rows: Rows, m: int) -> Scores:
        return Scores(q=self.r1[None, :, rows], k=self.r2[None, :, :m])


def small(*shape: int, **dd: Any) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, **dd) * STD)


def divisors_near_root(length: int, factors: tuple[int, int] | None) -> tuple[int, int]:
    """`factors`, checked to multiply to `length`; of None, the pair of divisors a <= b closest to its root."""
    if factors is None:
        a = next(a for a in range(int(length**0.5), 0, -1) if length % a == 0)
        return a, length // a
    fits = len(factors) == 2 and min(factors) > 0 and factors[0] * factors[1] == length
    require(fits, "factors={} must be two numbers whose product is max_len={}", factors, length)
    return factors[0], factors[1]


def synthetic_weights(s: Scores, m: int, mask: Tensor | None) -> Tensor:
    """The softmax of the scores over the allowed keys, in float32 at least; a row without any is zero."""
    weights, empty = _weights(s, m, mask)
    return weights if empty is None else weights.masked_fill(empty, 0.0)


def synthetic_attend(s: Scores, v: Tensor, *, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0) -> Tensor:
    """The weighted sums of v (B, H, M, d): (B, H, N, d).

    Args:
        mask: boolean with four axes, True = may be attended.
        causal: key j is allowed for query i if j <= i + M - N.
        dropout: probability of dropping a weight; pass 0 outside training.
    """
    batch, heads, m, d = v.shape
    n = next(t.shape[2] for t in (s.q, s.table, s.a) if t is not None)
    of_samples = [t for t in (s.q, s.a, mask) if t is not None and t.shape[0] > 1]
    shared = batch > 1 and not of_samples and dropout == 0
    if s.q is not None and s.k is not None and s.table is None and s.a is None and not shared:
        q, k = s.q.expand(batch, heads, -1, -1), s.k.expand(batch, heads, -1, -1)
        return attend(q, k, v, scale=1.0, mask=mask, causal=causal, dropout=dropout)
    mask = combine_masks(mask, causal_mask(n, m, v.device)[None, None] if causal else None)
    if shared:  # the weights are those of every sample: the samples become columns of one product
        v = v.permute(1, 2, 0, 3).reshape(1, heads, m, batch * d)

    def core(v: Tensor, *tensors: Tensor | None) -> Tensor:
        *parts, mask = tensors
        with full_precision(v):
            weights, empty = _weights(Scores(*parts), m, mask)
            if dropout > 0:
                weights = torch.dropout(weights.expand(batch, heads, -1, -1), dropout, True)
            out = weights @ v.to(weights.dtype)
            return (out if empty is None else out.masked_fill(empty, 0.0)).to(v.dtype)

    out = core(v, *s, mask) if dropout > 0 else blockwise(core, v, *s, mask, floats=3 * n * m)
    return out.unflatten(3, (batch, d))[0].permute(2, 0, 1, 3) if shared else out


def _weights(s: Scores, m: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights, where a row without any allowed key has those of no mask, and which rows these are."""
    given = [t for t in s if t is not None]
    with full_precision(given[0]):
        q, k, table, alpha, a, c = (None if t is None else t.to(at_least_float32(*given)) for t in s)
        parts = [] if q is None or k is None else [q @ k.mT]
        if table is not None:
            parts.append(table if alpha is None else alpha * table)
        if a is not None and c is not None:
            parts.append((a.unsqueeze(-1) * c.unsqueeze(-2)).flatten(-2)[..., :m])
        scores = sum(parts[1:], parts[0])
        if mask is None:
            return scores.softmax(-1), None
        empty = ~mask.any(-1, keepdim=True)
        return scores.masked_fill(~(mask | empty), float("-inf")).softmax(-1), empty
