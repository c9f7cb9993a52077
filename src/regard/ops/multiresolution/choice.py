"""Which blocks are refined: what every way of computing shares. Blocks of q, k, v are (..., n, b, d), their mask (..., n, b)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor

from ...errors import require

HIDDEN, PRIOR = 1e4, 5e3


@dataclass(frozen=True)
class Resolution:
    """The options. `num_blocks` blocks are refined, or, if None, `blocks_per_row` for each row of blocks; `coarse`: the others count as well."""

    block_size: int = 32
    num_blocks: int | None = None
    blocks_per_row: int = 4
    coarse: bool = True
    first_blocks: int = 0
    diagonal_blocks: int = 0

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "block_size={} must be at least 1", self.block_size)
        require(self.num_blocks is None or self.num_blocks >= 1, "num_blocks={} must be at least 1, or None", self.num_blocks)
        require(self.blocks_per_row >= 1, "blocks_per_row={} must be at least 1", self.blocks_per_row)
        least = min(self.first_blocks, self.diagonal_blocks)
        require(least >= 0, "first_blocks={} and diagonal_blocks={} must not be negative", self.first_blocks, self.diagonal_blocks)

    def numbers(self) -> list[int]:
        """The options as integers, for an operator; `of` reads them."""
        return [self.block_size, self.num_blocks or 0, self.blocks_per_row, int(self.coarse), self.first_blocks, self.diagonal_blocks]

    @staticmethod
    def of(numbers: Sequence[int]) -> "Resolution":
        return Resolution(numbers[0], numbers[1] or None, numbers[2], bool(numbers[3]), *numbers[4:])

    def rows(self, length: int) -> int:
        """n, the blocks that `length` positions fill."""
        return (length + self.block_size - 1) // self.block_size

    def refined(self, n: int) -> int:
        """How many of n x n blocks are refined."""
        return torch.sym_min(self.num_blocks or n * self.blocks_per_row, n * n)  # pyright: ignore[reportReturnType]

    def masked(self, length: int, key_mask: Tensor | None) -> bool:
        """Whether there is padding to hide. A graph with a free length must not depend on the length: it always hides some."""
        return key_mask is not None or isinstance(length, SymInt) or length % self.block_size != 0


def in_blocks(x: Tensor, n: int, size: int, mask: Tensor | None = None) -> Tensor:
    """(..., N, d) -> (..., n, size, d), zero where padded or where `mask` (..., n, size) is False."""
    missing = n * size - x.shape[-2]
    x = x if isinstance(missing, int) and missing == 0 else F.pad(x, (0, 0, 0, missing))
    x = x.unflatten(-2, (n, size))
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0.0)


def mask_blocks(key_mask: Tensor | None, like: Tensor, n: int, size: int) -> Tensor:
    """(B, 1, n, size), True for real tokens that the mask lets pass, of `like` (B, H, N, d)."""
    valid = like.new_ones((like.shape[0], like.shape[2]), dtype=torch.bool) if key_mask is None else key_mask
    return F.pad(valid, (0, n * size - like.shape[2])).unflatten(1, (n, size))[:, None]


def counts(mask: Tensor | None, blocks: Tensor) -> Tensor:
    """t, the real tokens of each block, (..., n)."""
    return blocks.new_full((blocks.shape[-3],), blocks.shape[-2]) if mask is None else mask.sum(-1).to(blocks.dtype)


def parts(mask: Tensor | None, blocks: Tensor) -> Tensor:
    """What one token of a block adds to the mean of the block, (..., n): 1 / t."""
    t = counts(mask, blocks)
    return 1 / t if mask is None else 1 / (t + 1e-6)


def means(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the real tokens of each block, (..., n, d); zero where there is none."""
    return x.sum(-2) * parts(mask, x).unsqueeze(-1)


def choose(scores: Tensor, mask: Tensor | None, resolution: Resolution) -> Tensor:
    """The refined blocks of each matrix of coarse scores (..., n, n), as flat indices i n + j, (..., K)."""
    n = scores.shape[-1]
    priority = scores.detach() - scores.detach().amax(-1, keepdim=True)
    if mask is not None:
        real = mask.any(-1)
        priority = priority.sub(HIDDEN * (~(real.unsqueeze(-1) & real.unsqueeze(-2))).to(scores.dtype))
    at = torch.arange(n, device=scores.device)
    if resolution.diagonal_blocks:
        priority = priority + PRIOR * ((at[:, None] - at).abs() <= resolution.diagonal_blocks // 2)
    if resolution.first_blocks:
        first = PRIOR * (at < resolution.first_blocks)
        priority = priority + (first[:, None] + first)
    return priority.flatten(-2).topk(resolution.refined(n), sorted=False).indices
