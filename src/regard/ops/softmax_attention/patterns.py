"""The sparse patterns of Sparse Transformers (arXiv:1904.10509): as a relation, as a dense mask, and as a plan of dense pieces.

Between a query i and a key j, with l = stride, c = summary, S = num_stripes:

    strided   A0: |i - j| < l                   A1: (i - j) mod l = 0
    fixed     A0: floor(i / l) = floor(j / l)   A1: l - (s + 1) c <= j mod l < l - s c,  s = h mod S for head h
    local     A0 of strided                     all: every pair

and j <= i where causal. Heads use both factors ("merged"), A0 and A1 in turn ("split"), or all of them that of their layer ("interleaved").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from ...errors import require
from .. import _dispatch
from . import reference
from .api import attend, attention_weights, combine_masks, rows_of
from .blocks import Columns, Layer, Piece, Plan, Residues, Rows, Windows, block_attend, planner

_dispatch.register("sparse_attention", "dense", "blocks", "flex")

KINDS = ("strided", "fixed", "local", "all")
MODES = ("merged", "split", "interleaved")
STEP = 32  # queries that share one window of keys: fewer make small products, more make windows wider than the band
PARTS = 16  # groups of blocks that look at the summaries of earlier blocks: about half the work of one group, and small masks


class Pattern(Protocol):
    """Which pairs attention allows, as data. `plan` names its planner, `numbers()` are the planner's options; `every_pair`: it forbids nothing."""

    plan: ClassVar[str]

    @property
    def causal(self) -> bool: ...
    @property
    def every_pair(self) -> bool: ...
    def numbers(self) -> tuple[int, ...]: ...

    def allows(self, h: Tensor, i: Tensor, j: Tensor, n: int) -> Tensor:
        """Whether head h lets query i attend to key j among n positions; the three broadcast."""
        ...

    def mask(self, n: int, num_heads: int, device: torch.device | None = None, queries: Tensor | None = None) -> Tensor:
        """The allowed pairs, (1 or num_heads, n, n), or their rows for chosen queries."""
        ...

    def dense_because(self, n: int, on_cpu: bool) -> str:
        """Why one masked product is better than blocks for n positions; "" if it is not."""
        ...


@dataclass(frozen=True)
class SparsePattern:
    """`stride` None is ceil(sqrt(N)), and at least summary * num_stripes for "fixed"; `layer_index` is for "interleaved" alone."""

    plan: ClassVar[str] = "sparse"

    kind: str = "strided"
    stride: int | None = None
    summary: int = 1
    num_stripes: int = 1
    head_mode: str = "merged"
    layer_index: int = 0
    causal: bool = True

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "pattern={!r} is not one of {}", self.kind, KINDS)
        require(self.head_mode in MODES, "head_mode={!r} is not one of {}", self.head_mode, MODES)
        require(self.stride is None or self.stride >= 1, "stride={} must be at least 1, or None for ceil(sqrt(N))", self.stride)
        least = min(self.summary, self.num_stripes)
        require(least >= 1, "summary={} and num_stripes={} must be at least 1", self.summary, self.num_stripes)
        require(self.layer_index >= 0, "layer_index={} must not be negative", self.layer_index)
        fits = self.kind != "fixed" or self.stride is None or self.summary * self.num_stripes <= self.stride
        require(fits, "summary={} times num_stripes={} must be at most stride={}", self.summary, self.num_stripes, self.stride)

    def period(self, n: int) -> int:
        """The stride for n positions."""
        if self.stride is not None:
            return self.stride
        return max(math.ceil(math.sqrt(n)), self.summary * self.num_stripes if self.kind == "fixed" else 1)

    def numbers(self) -> tuple[int, ...]:
        """The pattern as the integers that the planner reads."""
        kind, mode = KINDS.index(self.kind), MODES.index(self.head_mode)
        return kind, self.stride or 0, self.summary, self.num_stripes, mode, self.layer_index, int(self.causal)

    def groups(self) -> tuple[tuple[slice, tuple[str, ...]], ...]:
        """Heads, and the factors they use."""
        every = slice(None)
        if self.kind in ("local", "all"):
            return ((every, ("A0",)),)
        if self.head_mode == "merged":
            return ((every, ("A0", "A1")),)
        if self.head_mode == "interleaved":
            return ((every, (("A0", "A1")[self.layer_index % 2],)),)
        return ((slice(0, None, 2), ("A0",)), (slice(1, None, 2), ("A1",)))

    @property
    def every_pair(self) -> bool:
        return self.kind == "all"

    def relation(self, factor: str, h: Tensor, i: Tensor, j: Tensor, period: int) -> Tensor:
        """Whether head h lets query i attend to key j by one factor; the three broadcast."""
        if self.kind == "all":
            seen = (i == i) & (j == j)
        elif factor == "A0":
            seen = i // period == j // period if self.kind == "fixed" else (i - j).abs() < period
        elif self.kind == "fixed":
            column = j % period - (period - (h % self.num_stripes + 1) * self.summary)
            seen = (column >= 0) & (column < self.summary) & (i == i)
        else:
            seen = (i - j) % period == 0
        return seen & (j <= i) if self.causal else seen

    def allows(self, h: Tensor, i: Tensor, j: Tensor, n: int) -> Tensor:
        """Whether head h lets query i attend to key j among n positions; the three broadcast."""
        near, far = (self.relation(factor, h, i, j, self.period(n)) for factor in ("A0", "A1"))
        if self.kind in ("local", "all"):
            return near
        if self.head_mode == "split":
            return torch.where(h % 2 == 0, near, far)
        return near | far if self.head_mode == "merged" else (near, far)[self.layer_index % 2]

    def dense_because(self, n: int, on_cpu: bool) -> str:
        least = (256 if self.causal else 512) if on_cpu else 1024
        if n < least or n < 2 * self.period(n):
            return f"below {least} positions, or two strides, one masked product is faster than several small ones"
        return ""

    def columns(self, period: int, heads: range) -> tuple[tuple[int, ...], ...]:
        """The summary columns of a block, for each head."""
        starts = [period - (h % self.num_stripes + 1) * self.summary for h in heads]
        return tuple(tuple(range(at, at + self.summary)) for at in starts)

    def mask(self, n: int, num_heads: int, device: torch.device | None = None, queries: Tensor | None = None) -> Tensor:
        """The allowed pairs, (1 or num_heads, n, n), or their rows for chosen queries."""
        alike = self.kind in ("local", "all") or (self.head_mode != "split" and (self.kind == "strided" or self.num_stripes == 1))
        h, j = torch.arange(1 if alike else num_heads, device=device), torch.arange(n, device=device)
        i = j if queries is None else queries
        return self.allows(h[:, None, None], i[:, None], j[None, None], n)


def sparse_pattern(
    n: int,
    num_heads: int = 1,
    pattern: str = "strided",
    stride: int | None = None,
    summary: int = 1,
    num_stripes: int = 1,
    head_mode: str = "merged",
    layer_index: int = 0,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """The pairs that sparse attention allows, boolean (num_heads, n, n), True = may be attended."""
    allowed = SparsePattern(pattern, stride, summary, num_stripes, head_mode, layer_index, causal)
    return allowed.mask(n, num_heads, None if device is None else torch.device(device)).expand(num_heads, n, n)


def sparse_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T) v over the pairs of a pattern that the masks allow too.

    Args:
        q, k, v: (B, H, N, d), of the same shape.
        scale: d ** -0.5 if None.
        key_mask: boolean (B, N), True = may be attended.
        attn_mask: boolean, broadcastable to (B, H, N, N); with it, as with dropout, the N x N mask is built.
        dropout: probability of dropping a weight; pass 0 outside training.

    Returns:
        (B, H, N, d); a query without any allowed key gets zeros.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    n, h = q.shape[2], q.shape[1]
    impl = _dispatch.choose("sparse_attention", *_automatic(pattern, q, attn_mask, dropout))
    if impl in ("blocks", "flex"):
        require(not pattern.every_pair, "sparse_attention has no {} where all pairs are allowed", impl)
        require(attn_mask is None and dropout == 0, "sparse_attention by {} takes no attn_mask and no dropout", impl)
        if impl == "flex":
            from .flex import flex_attend

            return flex_attend(q, k, v, pattern, scale, key_mask)
        return block_attend(q, k, v, pattern.plan, pattern.numbers(), scale=scale, key_mask=key_mask)
    keys = None if key_mask is None else key_mask[:, None, None]
    if impl == "dense" and pattern.every_pair:
        return attend(q, k, v, scale=scale, mask=combine_masks(keys, attn_mask), causal=pattern.causal, dropout=dropout)
    mask = combine_masks(pattern.mask(n, h, q.device), keys, attn_mask)
    if impl == "reference":
        return reference.attend(q, k, v, scale, mask, None, dropout)
    return attend(q, k, v, scale=scale, mask=mask, dropout=dropout)


def sparse_weights(
    q: Tensor,
    k: Tensor,
    pattern: Pattern,
    *,
    scale: float | None = None,
    queries: Tensor | None = None,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The weights `sparse_attend` uses, dense: (B, H, N, N). For R chosen `queries` pass those rows of q: (B, H, R, N)."""
    keys = None if key_mask is None else key_mask[:, None, None]
    mask = combine_masks(pattern.mask(k.shape[2], k.shape[1], k.device, queries), keys, rows_of(attn_mask, queries))
    return attention_weights(q, k, scale=scale, mask=mask)


def _automatic(pattern: Pattern, q: Tensor, attn_mask: Tensor | None, dropout: float) -> tuple[str, str]:
    if pattern.every_pair:
        return "dense", "every pair is allowed"
    if attn_mask is not None or dropout > 0:
        return "dense", "attn_mask and dropout act on single weights, which blocks do not form"
    if isinstance(q.shape[2], torch.SymInt):
        return "blocks", "a graph with a free length must not depend on it"
    why = pattern.dense_because(q.shape[2], _dispatch.on_cpu(q))
    return ("dense", why) if why else ("blocks", "the pattern falls into dense blocks, far fewer pairs than N x N")


@planner
def sparse(n: int, num_heads: int, kind: int, stride: int, summary: int, num_stripes: int, head_mode: int, layer_index: int, causal: int) -> Plan:
    """The pieces of `SparsePattern.numbers()`. Where both factors hold a pair, A0 leaves it to A1 or, for own blocks of causal "fixed", A1 to A0."""
    pattern = SparsePattern(KINDS[kind], stride or None, summary, num_stripes, MODES[head_mode], layer_index, bool(causal))
    period = pattern.period(n)
    count = max(1, -(-n // period))
    reach = STEP * -(-(period - 1) // STEP)
    windows = max(0, -(-(n - reach) // STEP))
    rows = count * period
    if pattern.kind != "fixed":
        rows = max(rows, reach + STEP * windows + (0 if pattern.causal else reach))
    groups = []
    for heads, factors in pattern.groups():
        own, layers = range(num_heads)[heads], ()
        if pattern.kind == "fixed":
            layers = _fixed(pattern, factors, period, count, own)
        else:
            near = (_band(pattern, factors, period, reach, windows),) if "A0" in factors else ()
            far = (Layer((Piece(Residues(period, count), Residues(period, count), causal=pattern.causal),)),) if "A1" in factors else ()
            layers = near + far
        if len(own):
            groups.append((heads, layers))
    return Plan(rows, pattern.causal, tuple(groups))


Mask: TypeAlias = Callable[[torch.device], Tensor]


def _masked(pattern: SparsePattern, factors: tuple[str, ...], i: range, j: range, period: int, heads: range) -> Mask:
    """The mask of a piece: A0, less what A1 holds if both are used."""

    def mask(device: torch.device) -> Tensor:
        at, to = torch.arange(i.start, i.stop, device=device), torch.arange(j.start, j.stop, device=device)
        h = torch.arange(heads.start, heads.stop, heads.step, device=device)[: None if pattern.num_stripes > 1 else 1, None, None]
        first, *second = (pattern.relation(factor, h, at[:, None], to[None, None], period) for factor in factors)
        return first & ~second[0] if second else first

    return mask


def _band(pattern: SparsePattern, factors: tuple[str, ...], period: int, reach: int, windows: int) -> Layer:
    """|i - j| < period: the first `reach` queries, then STEP queries at a time with `reach` keys before (and, not causal, after) them."""
    after = 0 if pattern.causal else reach
    head = reach + (after if windows else 0)
    pieces = []
    if reach:
        pieces.append(Piece(Rows(0, reach), Rows(0, head), _masked(pattern, factors, range(reach), range(head), period, range(1))))
    if windows:
        width = reach + STEP + after
        mask = _masked(pattern, factors, range(reach, reach + STEP), range(width), period, range(1))
        pieces.append(Piece(Windows(reach, windows, STEP, STEP), Windows(0, windows, STEP, width), mask))
    return Layer(tuple(pieces))


def _fixed(pattern: SparsePattern, factors: tuple[str, ...], period: int, count: int, heads: range) -> tuple[Layer, ...]:
    columns, block, blocks = pattern.columns(period, heads), range(period), Windows(0, count, period, period)
    near = Piece(blocks, blocks, causal=True)
    if not pattern.causal:
        near = Piece(blocks, blocks, _masked(pattern, factors, block, block, period, heads) if len(factors) > 1 else None)
        far = Piece(Rows(0, count * period), Columns(period, count, columns))
        return tuple(Layer((piece,)) for factor, piece in (("A0", near), ("A1", far)) if factor in factors)

    def own(device: torch.device) -> Tensor:
        return torch.tensor(columns, device=device)[:, None] <= torch.arange(period, device=device)[:, None]

    layers = (Layer((near if "A0" in factors else Piece(blocks, Columns(period, count, columns, own=True), own),)),)
    group = -(-(count - 1) // PARTS)
    if "A1" in factors and count > 1:
        stops = [(first, min(first + group, count)) for first in range(1, count, group)]
        pieces = []
        for a, b in stops:
            mask = _earlier(a, b, period, pattern.summary) if b - a > 1 else None
            pieces.append(Piece(Rows(a * period, b * period), Columns(period, b - 1, columns), mask))
        layers += (Layer(tuple(pieces), start=period),)
    return layers


def _earlier(first: int, stop: int, period: int, summary: int) -> Mask:
    """Queries of blocks first..stop against the summaries of blocks 0..stop - 1: those of earlier blocks."""

    def mask(device: torch.device) -> Tensor:
        blocks = torch.arange(stop - 1, device=device).repeat_interleave(summary)
        return blocks < torch.arange(first, stop, device=device).repeat_interleave(period)[:, None]

    return mask
