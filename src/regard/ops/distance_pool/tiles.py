"""One tile of queries at a time against the keys near enough to count, the weights made again in the backward pass: nothing N x N is kept.

On the CPU a tile reaches no further than its widest Gaussian: beyond sqrt((c - log_w_i) / sharpness_i) a key weighs at most e^-c of query i's own,
and with c = -log(eps) + log(N) all that is left out is less than rounding. Elsewhere that would cost a synchronisation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._operator import operator
from .._precision import full_precision
from .reference import LOWEST

FAR = 1e30  # squared distance to a key outside the window: its weight is 0 however flat the Gaussian
BUDGET = 2**20  # weights made at a time on the CPU, 4 MB
Box = tuple[slice, slice]


@dataclass(frozen=True)
class Grid:
    """The positions, cut into tiles of queries; `reach` along each axis is the window, or all of it."""

    height: int
    width: int
    window: int
    causal: bool
    scale: int  # larger tiles where many small operations cost more than large ones

    @property
    def side(self) -> tuple[int, int]:
        flat = (1, 64 if 0 <= self.window < 64 else 128)
        down, across = flat if self.height == 1 else (8, 16)
        return min(down * self.scale, self.height), min(across * self.scale, self.width)

    @property
    def reach(self) -> tuple[int, int]:
        down, across = self.height - 1, self.width - 1
        return (down, across) if self.window < 0 else (min(down, self.window), min(across, self.window))

    def tiles(self) -> Iterator[Box]:
        down, across = self.side
        for y in range(0, self.height, down):
            for x in range(0, self.width, across):
                yield slice(y, min(y + down, self.height)), slice(x, min(x + across, self.width))

    def keys(self, tile: Box, reach: tuple[int, int]) -> Box:
        """The keys within `reach` of a tile."""
        (y, x), (down, across) = tile, reach
        last = x.stop if self.causal else min(x.stop + across, self.width)
        return slice(max(y.start - down, 0), min(y.stop + down, self.height)), slice(max(x.start - across, 0), last)

    def pairs(self) -> int:
        """Pairs of a query and a key that are multiplied at most."""
        return sum(_area(tile) * _area(self.keys(tile, self.reach)) for tile in self.tiles())


def _area(box: Box) -> int:
    y, x = box
    return (y.stop - y.start) * (x.stop - x.start)


class Distances:
    """Squared distances between tiles and keys, cut from one table for each axis."""

    def __init__(self, grid: Grid, like: Tensor) -> None:
        self.grid, self.tables = grid, []
        for side, reach, causal in zip(grid.side, grid.reach, (False, grid.causal), strict=True):
            own, other = (torch.arange(*ends, device=like.device, dtype=like.dtype) for ends in ((0, side), (-reach, side + reach)))
            offset = other - own[:, None]
            table = offset.square()
            if grid.window >= 0:
                table.masked_fill_(offset.abs() > grid.window, FAR)
            self.tables.append(table.masked_fill_(offset > 0, FAR) if causal else table)

    def between(self, tile: Box, keys: Box) -> Tensor:
        """(queries of the tile, keys)."""
        down, across = (
            table[: own.stop - own.start, other.start - own.start + reach : other.stop - own.start + reach]
            for table, own, other, reach in zip(self.tables, tile, keys, self.grid.reach, strict=True)
        )
        return across if self.grid.height == 1 else (down[:, None, :, None] + across[:, None]).flatten(2).flatten(0, 1)


@dataclass(frozen=True)
class Piece:
    """Some samples, a tile of their queries, the keys it reaches, the squared distances between them."""

    some: slice
    tile: Box
    keys: Box
    squares: Tensor

    def queries_of(self, x: Tensor) -> Tensor:
        """(B, H, W, ...) -> (b, R, ...)."""
        return x[self.some, self.tile[0], self.tile[1]].flatten(1, 2)

    def keys_of(self, x: Tensor) -> Tensor:
        return x[self.some, self.keys[0], self.keys[1]].flatten(1, 2)

    def weights(self, log_w: Tensor, sharpness: Tensor) -> Tensor:
        scores = torch.addcmul(self.keys_of(log_w)[:, None], self.squares, self.queries_of(sharpness)[:, :, None], value=-1)
        return scores.softmax(-1)


def _pieces(grid: Grid, log_w: Tensor, sharpness: Tensor) -> Iterator[Piece]:
    """The work, for log-weights and sharpness (B, H, W)."""
    batch, distances, near = log_w.shape[0], Distances(grid, log_w), _dispatch.on_cpu(log_w)
    most = _area((slice(0, grid.side[0]), slice(0, grid.side[1]))) * min(
        grid.height * grid.width, math.prod(s + 2 * r for s, r in zip(grid.side, grid.reach, strict=True))
    )
    step = max(1, BUDGET * (1 if near else 64) // most)
    reaches = None
    if near:
        c = math.log(grid.height * grid.width) - math.log(torch.finfo(log_w.dtype).eps)
        reaches = ((c - log_w) / sharpness).sqrt_().masked_fill_(log_w <= LOWEST, 0.0)
    for first in range(0, batch, step):
        some = slice(first, min(first + step, batch))
        for tile in grid.tiles():
            down, across = grid.reach
            if reaches is not None:
                widest = reaches[some, tile[0], tile[1]].max().item()
                down, across = (int(widest) if widest < r else r for r in (down, across))
            keys = grid.keys(tile, (down, across))
            yield Piece(some, tile, keys, distances.between(tile, keys))


def _grid(x: Tensor, height: int, window: int, causal: bool) -> Grid:
    return Grid(height, x.shape[1] // height, window, causal, 1 if _dispatch.on_cpu(x) else 8)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward(x: Tensor, log_w: Tensor, sharpness: Tensor, height: int, window: int, causal: bool) -> Tensor:
    grid = _grid(x, height, window, causal)
    out = _like(x)
    with full_precision(x):
        x, log_w, sharpness, total = (t.unflatten(1, (grid.height, grid.width)) for t in (x.contiguous(), log_w, sharpness, out))
        for piece in _pieces(grid, log_w, sharpness):
            pooled = piece.weights(log_w, sharpness).to(x.dtype) @ piece.keys_of(x)
            target = total[piece.some, piece.tile[0], piece.tile[1]]
            target.copy_(pooled.unflatten(1, target.shape[1:3]))
    return out


def _backward(
    grad: Tensor, x: Tensor, log_w: Tensor, sharpness: Tensor, out: Tensor, height: int, window: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grid = _grid(x, height, window, causal)
    found = torch.zeros(x.shape, dtype=log_w.dtype, device=x.device), torch.zeros_like(_like(log_w)), torch.zeros_like(_like(sharpness))
    with full_precision(x):
        shape = (grid.height, grid.width)
        grad, out, x, log_w, sharpness = (t.contiguous().unflatten(1, shape) for t in (grad, out, x, log_w, sharpness))
        d_x, d_log_w, d_sharpness = (t.unflatten(1, shape) for t in found)
        for piece in _pieces(grid, log_w, sharpness):
            weights, g = piece.weights(log_w, sharpness), piece.queries_of(grad)
            change = (g @ piece.keys_of(x).mT).to(weights.dtype)
            change -= (g * piece.queries_of(out)).sum(-1, keepdim=True, dtype=weights.dtype)
            change *= weights
            keys, tile = (piece.some, *piece.keys), (piece.some, *piece.tile)
            d_x[keys] += (weights.to(g.dtype).mT @ g).unflatten(1, d_x[keys].shape[1:3])
            d_log_w[keys] += change.sum(1).unflatten(1, d_log_w[keys].shape[1:])
            d_sharpness[tile] -= change.mul_(piece.squares).sum(-1).unflatten(1, d_sharpness[tile].shape[1:])
    return found[0].to(x.dtype), found[1], found[2]


def _like_values(x: Tensor, *_: Any) -> Tensor:
    return _like(x)


def _count(x: Any, log_w: Any, sharpness: Any, height: int, window: int, causal: bool) -> int:
    """2 C for each pair in reach: an upper bound, for tiles of narrow Gaussians reach fewer keys."""
    batch, n, channels = x
    return 2 * batch * channels * Grid(height, n // height, window, causal, 1).pairs()


def _count_backward(grad: Any, x: Any, log_w: Any, sharpness: Any, out: Any, *options: Any) -> int:
    return 2 * _count(x, log_w, sharpness, *options)


distance_pool = operator(
    "distance_pool", _forward, _backward, _like_values, tensors=3, keep_outputs=True, flops=_count, backward_flops=_count_backward
)
