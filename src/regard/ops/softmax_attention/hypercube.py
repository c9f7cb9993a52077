"""The hypercube pattern of arXiv:2205.14014 over blocks of positions, and a score of attention graphs inspired by that paper.

Block i carries the Gray code g(i) = i XOR (i >> 1); blocks are adjacent iff they are equal or their codes differ in one bit. Codes differ in bit t
alone exactly where i XOR j = 2^(t + 1) - 1: the neighbour lies mirrored in the aligned group of 2^(t + 1) blocks. With t = -1 for the block itself,

    neighbours of i = { i XOR (2^s - 1) : s = 0, 1, ..., ceil(log2 n) } below n,        i and j are adjacent iff x & (x + 1) = 0, x = i XOR j
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...errors import require, require_type
from .blocks import Layer, Piece, Plan, Windows, planner

PIECE = 128  # queries whose neighbours are gathered at a time: with 256 training takes more memory than one masked product at N = 1024


def hypercube_layout(num_blocks: int, device: torch.device | str | None = None) -> Tensor:
    """Which of `num_blocks` blocks attend to which, boolean (num_blocks, num_blocks): a hypercube, its nodes in Gray order, cut to size.

    >>> import regard
    >>> regard.hypercube_layout(4).int().tolist()
    [[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]]
    """
    require(num_blocks >= 1, "num_blocks={} must be at least 1", num_blocks)
    at = torch.arange(num_blocks, device=device)
    return _adjacent(at[:, None], at)


def _adjacent(i: Tensor, j: Tensor) -> Tensor:
    x = i ^ j
    return x & (x + 1) == 0


@dataclass(frozen=True)
class HypercubePattern:
    """All heads alike; positions in blocks of `block_size`, dense between adjacent blocks."""

    plan: ClassVar[str] = "hypercube"

    block_size: int = 16

    def __post_init__(self) -> None:
        require(self.block_size >= 1, "block_size={} must be at least 1", self.block_size)

    @property
    def causal(self) -> bool:
        return False

    @property
    def every_pair(self) -> bool:
        return False

    def numbers(self) -> tuple[int, ...]:
        """The pattern as the integers that the planner reads."""
        return (self.block_size,)

    def allows(self, h: Tensor, i: Tensor, j: Tensor, n: int) -> Tensor:
        """Whether query i may attend to key j; the two broadcast."""
        return _adjacent(i // self.block_size, j // self.block_size)

    def mask(self, n: int, num_heads: int, device: torch.device | None = None, queries: Tensor | None = None) -> Tensor:
        """The allowed pairs, (1, n, n), or their rows for chosen queries."""
        j = torch.arange(n, device=device)
        return self.allows(j, (j if queries is None else queries)[:, None], j[None, None], n)

    def dense_because(self, n: int, on_cpu: bool) -> str:
        least = 512 if on_cpu else 1024
        few = n < least or n <= 4 * self.block_size
        return f"below {least} positions, or up to four blocks, one masked product is faster than a gather of neighbours" if few else ""


@dataclass(frozen=True)
class Mirrors:
    """For each of `count` blocks of `size` positions from block `first`: its neighbours on a cube of `bits` bits, (B count, H, (bits + 1) size, d).

    Neighbours that would lie beyond block `blocks` - 1 are block `blocks`, the padding.
    """

    size: int
    first: int
    count: int
    bits: int
    blocks: int

    def _index(self, device: torch.device) -> Tensor:
        at = torch.arange(self.first, self.first + self.count, device=device)[:, None]
        return (at ^ (2 ** torch.arange(self.bits + 1, device=device) - 1)).clamp(max=self.blocks).flatten()

    def take(self, x: Tensor) -> Tensor:
        found = x.unflatten(1, (-1, self.size)).index_select(1, self._index(x.device))
        return found.unflatten(1, (self.count, -1)).flatten(0, 1).flatten(1, 2).transpose(1, 2)

    def add(self, total: Tensor, part: Tensor) -> None:
        part = part.transpose(1, 2).unflatten(1, (-1, self.size)).unflatten(0, (-1, self.count)).flatten(1, 2)
        total.unflatten(1, (-1, self.size)).index_add_(1, self._index(total.device), part)


@planner
def hypercube(n: int, num_heads: int, block_size: int) -> Plan:
    """Some blocks of queries at a time against their neighbours, gathered. One block of padding stands for those beyond the end of a cut cube."""
    blocks = max(1, -(-n // block_size))
    bits, step = (blocks - 1).bit_length(), max(1, PIECE // block_size)
    pieces = []
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        keys = Mirrors(block_size, first, count, bits, blocks)
        pieces.append(Piece(Windows(first * block_size, count, block_size, block_size), keys))
    return Plan((blocks + (blocks < 2**bits)) * block_size, False, ((slice(None), (Layer(tuple(pieces)),)),))


def nip(adjacency: Tensor, max_layers: int = 64, cost: Literal["max", "mean"] = "max") -> tuple[float, int]:
    """How much the worst-connected pair of an attention graph learns of each other, for the edges it costs: (score, number of layers).

    P is `adjacency` with rows scaled to sum to one. After r layers of uniform attention the worst pair shares n min(P^r), 1 on the complete graph;
    the score is the largest of n min(P^r) / (r deg / n) over r = 1, ..., max_layers, and (0.0, 0) if some pair is never joined.

    Inspired by the Normalized Information Payload of "What Dense Graph Do You Need for Self-Attention?", arXiv:2205.14014: rebuilt from its
    abstract, not from its definition. It orders graphs as the published scores do, with other values; only the complete graph's 1 is the same.

    Args:
        adjacency: (n, n), entry (i, j) above zero where query i attends to key j, loops included.
        max_layers: most layers tried.
        cost: deg is the largest row sum ("max", what padded rows cost) or the mean one ("mean", edges).
    """
    require_type(isinstance(adjacency, Tensor), "adjacency must be a tensor, got {}", type(adjacency).__name__)
    square = adjacency.ndim == 2 and adjacency.shape[0] == adjacency.shape[1] > 0
    require(square, "adjacency must be square, (n, n), got {}", tuple(adjacency.shape))
    require(cost in ("max", "mean"), "cost={!r} is not one of {}", cost, ("max", "mean"))
    require(max_layers >= 1, "max_layers={} must be at least 1", max_layers)
    edges, n = adjacency.detach().double(), adjacency.shape[0]
    degree = edges.sum(1)
    require(bool((edges >= 0).all()), "adjacency must not be negative, its least entry is {}", edges.min().item())
    require(bool((degree > 0).all()), "adjacency has a row of zeros, {}: every query needs a key, itself at least", int(degree.argmin()))
    step = edges / degree[:, None]
    paid = (degree.max() if cost == "max" else degree.mean()).item() / n
    reached, best, layers = step, 0.0, 0
    for r in range(1, max_layers + 1):
        reached = reached if r == 1 else reached @ step
        score = n * reached.min().item() / (r * paid)
        if score > best + 1e-12:
            best, layers = score, r
    return best, layers
