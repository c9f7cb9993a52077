"""((q k^T) * M) v for masks that depend on the offset of a query from a key alone, M_ij = t[i - j], on a line (Toeplitz) or a grid (block-Toeplitz).

"dense": runs of queries against all keys. Of a run in reversed order the mask is a strided view of the table, t read backwards: no index, no copy.
"fft": every column of k x v is convolved with t, in N log N; its rounding is relative to the largest sum of a column, not to each result.
Both keep only their inputs for the backward pass, and make temporaries of about a megabyte on the CPU.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocked import blocks_of
from .opaque import merged, product

Grid = tuple[int, ...]


def budget(x: Tensor) -> int:
    """Floats of one temporary: what stays in the cache, or fills a device."""
    return 1 << 18 if x.device.type == "cpu" else 1 << 26


def grid_of(shape: tuple[int, ...]) -> Grid:
    """The grid of a table (H, 2 n_1 - 1, 2 n_2 - 1, ...)."""
    return tuple((s + 1) // 2 for s in shape[1:])


def dense_up_to(axes: int, m: int, e: int, causal: bool) -> int:
    """Up to how many positions the dense way is faster on a CPU.

    Measured on one core: 0.5 + 0.028 (m + e) ns for a pair, half of the pairs if causal; 0.4 log2 L ns for each point of the L = 2^axes N of two
    transforms, for each of the m e columns. For m = e = 32 that is about 2200 positions on a line, 5100 on a square.
    """
    n = 2.0
    for _ in range(30):
        n = max(2.0, m * e * 2**axes * 0.2 * math.log2(2**axes * n) / ((0.5 + 0.028 * (m + e)) * (0.5 if causal else 1.0)))
    return int(n)


def faster(n: int, axes: int, m: int, e: int, causal: bool) -> str:
    return "dense" if n <= dense_up_to(axes, m, e, causal) else "fft"


def forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, causal: bool, method: str) -> Tensor:
    """q, k (B, H, N, m), v (B, H, N, e), table (H, 2 n_1 - 1, ...); `causal`: the table is zero where i < j."""
    return _way(q, v, table, causal, method)[0](q, k, v, table, causal)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, causal: bool, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _way(q, v, table, causal, method)[1](grad, q, k, v, table, causal)


def _way(q: Tensor, v: Tensor, table: Tensor, causal: bool, method: str):
    method = faster(q.shape[2], table.ndim - 1, q.shape[3], v.shape[3], causal) if method == "auto" else method
    return (_dense, _dense_backward) if method == "dense" else (_fft, _fft_backward)


@dataclass(frozen=True)
class Run:
    """Queries start..stop of a box of the grid, and the keys 0..keys they may see; `sides` and `seen` are the boxes, `at` the table's first entry."""

    start: int
    stop: int
    keys: int
    sides: Grid
    seen: Grid
    at: Grid

    def mask(self, backwards: Tensor) -> Tensor:
        """(H, *sides, *seen): the view of the table read backwards for the queries in reversed order."""
        strides = backwards.stride()
        offset = backwards.storage_offset() + sum(a * s for a, s in zip(self.at, strides[1:], strict=True))
        size = (backwards.shape[0], *self.sides, *self.seen)
        return backwards.as_strided(size, (*strides, *strides[1:]), offset)


def _runs(grid: Grid, causal: bool, limit: int) -> Iterator[Run]:
    """The grid cut, in order, into boxes of about `limit` positions that follow one another."""
    axis = next(a for a in range(len(grid)) if math.prod(grid[a + 1 :]) <= limit or a == len(grid) - 1)
    after = math.prod(grid[axis + 1 :])
    step, start = max(1, limit // after), 0
    for fixed in itertools.product(*map(range, grid[:axis])):
        for i in range(0, grid[axis], step):
            ends = (*(f + 1 for f in fixed), min(i + step, grid[axis]), *grid[axis + 1 :])
            sides = (*[1] * axis, ends[axis] - i, *grid[axis + 1 :])
            seen = (ends[0] if causal else grid[0], *grid[1:])
            stop = start + sides[axis] * after
            yield Run(start, stop, math.prod(seen), sides, seen, tuple(n - end for n, end in zip(grid, ends, strict=True)))
            start = stop


def _blocks(batch: int, heads: int, floats: int, limit: int) -> list[tuple[slice, slice]]:
    """As `blocks_of`, the whole batch of a head before the next head: they share its mask."""
    return [(samples, some) for some, samples in blocks_of(heads, batch, floats, limit)]


def _dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor, causal: bool) -> Tensor:
    (batch, heads, n, _), grid, limit = q.shape, grid_of(table.shape), budget(q)
    rows = max(1, min(n, limit // n))
    backwards, out = table.flatten(1).flip(1).view(table.shape), merged(v, v.shape[3])
    for block in _blocks(batch, heads, rows * n, limit):
        queries, keys, values = (t[block].contiguous() for t in (q, k, v))
        for run in _runs(grid, causal, rows):
            scores = queries[:, :, run.start : run.stop].flip(2) @ keys[:, :, : run.keys].mT
            scores.view(*scores.shape[:2], *run.sides, *run.seen).mul_(run.mask(backwards[block[1]]))
            out[block][:, :, run.start : run.stop] = (scores @ values[:, :, : run.keys]).flip(2)
    return out


def _dense_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, heads, n, _), grid, limit = q.shape, grid_of(table.shape), budget(q)
    rows = max(1, min(n, limit // n))
    backwards = table.flatten(1).flip(1).view(table.shape)
    dq, dk, dv, dtable = (t.new_empty(t.shape) for t in (q, k, v, table))
    dtable.zero_()
    for block in _blocks(batch, heads, rows * n, limit):
        queries, keys, values, g = (t[block].contiguous() for t in (q, k, v, grad))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for run in _runs(grid, causal, rows):
            some, seen = slice(run.start, run.stop), slice(0, run.keys)
            shape, mask = (*queries.shape[:2], *run.sides, *run.seen), run.mask(backwards[block[1]])
            own, given = queries[:, :, some].flip(2), g[:, :, some].flip(2)
            scores, change = own @ keys[:, :, seen].mT, given @ values[:, :, seen].mT
            part = (scores * change).sum(0) if len(scores) > 1 else (scores * change)[0]
            box = tuple(slice(a, a + side + s - 1) for a, side, s in zip(run.at, run.sides, run.seen, strict=True))
            dtable[(block[1], *box)] += _diagonals(part.view(shape[1:]), len(grid))
            scores.view(shape).mul_(mask)
            change.view(shape).mul_(mask)
            dvalues[:, :, seen] += scores.mT @ given
            dkeys[:, :, seen] += change.mT @ own
            dq[block][:, :, some] = (change @ keys[:, :, seen]).flip(2)
        dk[block], dv[block] = dkeys, dvalues
    return dq, dk, dv, dtable.flatten(1).flip(1).view(table.shape)


def _diagonals(x: Tensor, axes: int) -> Tensor:
    """Sums of x (H, q_1 .. q_d, k_1 .. k_d) over equal q_l + k_l: (H, q_1 + k_1 - 1, ...), the adjoint of `Run.mask`."""
    for axis in range(1, axes + 1):
        x = x.movedim(axis, axes)  # now (H, sums so far, other q, q, k, other k)
        (*lead, q, k), inner = x.shape[: axes + 2], x.shape[axes + 2 :]
        padded = x.new_zeros(*lead, q, k + q, *inner)
        padded.narrow(axes + 1, 0, k).copy_(x)
        width = (k + q - 1) * math.prod(inner)  # rows read one entry too short: each is shifted by one against the row before
        x = padded.flatten(axes)[..., : q * width].unflatten(-1, (q, width)).sum(-2).unflatten(-1, (k + q - 1, *inner)).movedim(axes, axis)
    return x


def _sizes(grid: Grid) -> Grid:
    """Lengths of transforms without wrap-around: the next product of 2, 3 and 5 from 2 n - 1 on."""

    def good(n: int) -> bool:
        for p in (2, 3, 5):
            while n % p == 0:
                n //= p
        return n == 1

    return tuple(next(size for size in itertools.count(2 * n - 1) if good(size)) for n in grid)


def _ahead(x: Tensor, sizes: Grid) -> Tensor:
    """The transform of x (..., n_1 .. n_d), padded with zeros."""
    f = torch.fft.rfft(x, n=sizes[-1])
    for axis in range(2, len(sizes) + 1):
        f = torch.fft.fft(f, n=sizes[-axis], dim=-axis)
    return f


def _back(f: Tensor, sizes: Grid, grid: Grid) -> Tensor:
    """Its inverse, of which the grid's part is kept."""
    for axis in range(len(sizes), 1, -1):
        f = torch.fft.ifft(f, dim=-axis).narrow(-axis, 0, grid[-axis])
    return torch.fft.irfft(f, n=sizes[-1])[..., : grid[-1]]


def _spectrum(table: Tensor, sizes: Grid, grid: Grid) -> Tensor:
    kernel = table.new_zeros(table.shape[0], *sizes)
    kernel[(slice(None), *(slice(0, s) for s in table.shape[1:]))] = table
    axes = tuple(range(1, table.ndim))
    return _ahead(kernel.roll([1 - n for n in grid], axes), sizes).unsqueeze(1)


def _fft(q: Tensor, k: Tensor, v: Tensor, table: Tensor, causal: bool) -> Tensor:
    grid, out = grid_of(table.shape), merged(v, v.shape[3])
    sizes, limit = _sizes(grid), 2 * budget(q)
    spectrum, points = _spectrum(table, sizes, grid), math.prod(sizes)
    for block in blocks_of(q.shape[0], q.shape[1], v.shape[3] * points, limit):
        queries, keys, values = (t[block].mT.contiguous().unflatten(-1, grid) for t in (q, k, v))
        s, start = spectrum[block[1]], 0
        for u in values.split(max(1, limit // points), 2):
            total = torch.zeros_like(u)
            for a in range(q.shape[3]):
                f = _ahead(keys[:, :, a, None] * u, sizes)
                total.addcmul_(queries[:, :, a, None], _back(f.mul_(s), sizes, grid))
            out[block][..., start : start + u.shape[2]] = total.flatten(3).mT
            start += u.shape[2]
    return out


def _fft_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grid, (batch, heads, _, m) = grid_of(table.shape), q.shape
    sizes, limit = _sizes(grid), 2 * budget(q)
    spectrum, points = _spectrum(table, sizes, grid), math.prod(sizes)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dspectrum = torch.zeros_like(spectrum[:, 0])
    for block in blocks_of(batch, heads, v.shape[3] * points, limit):
        queries, keys, values, g = (t[block].mT.contiguous().unflatten(-1, grid) for t in (q, k, v, grad))
        s, step, start = spectrum[block[1]], max(1, limit // points), 0
        dqueries, dkeys = torch.zeros_like(queries), torch.zeros_like(keys)
        for u, given in zip(values.split(step, 2), g.split(step, 2), strict=True):
            total = torch.zeros_like(u)
            for a in range(m):
                f, h = _ahead(keys[:, :, a, None] * u, sizes), _ahead(queries[:, :, a, None] * given, sizes)
                dspectrum[block[1]] += (h * f.conj()).sum((0, 2))
                dqueries[:, :, a] += (given * _back(f.mul_(s), sizes, grid)).sum(2)
                change = _back(h.mul_(s.conj()), sizes, grid)
                dkeys[:, :, a] += (change * u).sum(2)
                total.addcmul_(keys[:, :, a, None], change)
            dv[block][..., start : start + u.shape[2]] = total.flatten(3).mT
            start += u.shape[2]
        dq[block], dk[block] = dqueries.flatten(3).mT, dkeys.flatten(3).mT
    dkernel = _back(dspectrum, sizes, sizes).roll([n - 1 for n in grid], tuple(range(1, table.ndim)))
    return dq, dk, dv, dkernel[(slice(None), *(slice(0, s) for s in table.shape[1:]))].contiguous()


def count(q: Grid, k: Grid, v: Grid, table: Grid, causal: bool, method: str) -> int:
    """Multiply-adds of the pairs needed; of the FFTs, taken at twice the sides, as 5/4 L log2 L for each of two transforms of L real numbers."""
    (b, h, n, m), e, axes = q, v[3], len(table) - 1
    if (faster(n, axes, m, e, causal) if method == "auto" else method) == "dense":
        return b * h * (m + e) * (n * (n + 1) // 2 if causal else n * n)
    points = 2**axes * n
    return int(b * h * m * e * (2.5 * points * math.log2(points) + 2 * n))


toeplitz_product = product("toeplitz_product", forward, backward, count)
