"""One axis of a map cut into blocks of queries, each with the run of keys that it may see."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """Queries 0..n - 1 and keys 0..m - 1, key b allowed for query i if (i - reach) // stride <= b <= (i + reach + 1) // stride.

    All keys are allowed if reach is negative. Without a block there is one block of all queries with all keys; else a block is a multiple of stride.
    """

    n: int
    m: int
    stride: int = 1
    reach: int = -1
    block: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.n // self.block) if self.block else 1

    @property
    def length(self) -> int:
        return self.block or self.n

    @property
    def span(self) -> int:
        """Keys of a block."""
        return span(self.block, self.stride, self.reach) if self.block else self.m

    def queries(self, device: torch.device) -> Tensor:
        """(blocks length): positions; the last ones may lie outside."""
        return torch.arange(self.blocks * self.length, device=device)

    def keys(self, device: torch.device) -> Tensor:
        """(blocks, span): positions; some may lie outside."""
        if not self.block:
            return torch.arange(self.m, device=device)[None]
        first = torch.arange(self.blocks, device=device) * (self.block // self.stride) + -self.reach // self.stride
        return first[:, None] + torch.arange(self.span, device=device)

    def cut_queries(self, t: Tensor, dim: int) -> Tensor:
        return t.index_select(dim, self.queries(t.device).clamp_max(self.n - 1)) if self.block else t

    def cut_keys(self, t: Tensor, dim: int) -> Tensor:
        return t.index_select(dim, self.keys(t.device).clamp(0, self.m - 1).flatten()) if self.block else t

    def allows(self, queries: Tensor, keys: Tensor) -> Tensor:
        inside = (keys >= 0) & (keys < self.m)
        if self.reach < 0:
            return inside
        first, last = (queries - self.reach).div(self.stride, rounding_mode="floor"), (queries + self.reach + 1) // self.stride
        return inside & (keys >= first) & (keys <= last)


def span(block: int, stride: int, reach: int) -> int:
    return (block + reach) // stride + 1 - -reach // stride


def to_blocks(t: Tensor, rows: Axis, columns: Axis, sides: tuple[int, int]) -> Tensor:
    """A cut map (B, rows, columns, H, d), of blocks with these sides, to (B blocks, H, positions, d)."""
    t = t.unflatten(2, (columns.blocks, sides[1])).unflatten(1, (rows.blocks, sides[0]))
    return t.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)


def from_blocks(t: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """(B blocks, H, positions, d) to (B, n of rows, n of columns, H, d)."""
    t = t.unflatten(2, (rows.length, columns.length)).unflatten(0, (-1, rows.blocks, columns.blocks))
    return t.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)[:, : rows.n, : columns.n]
