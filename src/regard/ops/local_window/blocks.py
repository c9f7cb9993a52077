"""Attention of blocks to their windows, some rows of blocks at a time; the backward computes the weights again instead of keeping them.

The relative term is separable: for query (y, x) and key (i, j) it is R[i] + C[j], where the codes R and C depend on the query alone. So the
logits are one product of widened vectors: [scale q, R, C] times [k, i one-hot, j one-hot]. A border mask is a large negative code.
Codes run from the last row (column) of the window to the first, so that they are a plain strided view of q times the reversed tables.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .window import accumulator, add_band, add_windows, chunks, read_band, read_blocks, windows, write_blocks

Box = tuple[slice, slice, slice]


def forward(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool) -> Tensor:
    """q (B, N, d, Hq, Wq), k (B, N, d, H, W), v (B, N, dv, H, W), rel (2 (win + side - 1), d), reversed -> (B, N, dv, Hq, Wq)."""
    out = v.new_empty(*q.shape[:2], v.shape[2], *q.shape[-2:])
    blocks = _Blocks(q, k, v, rel, win, block, first, scale, mask)
    for box in blocks.boxes():
        weights = blocks.weights(blocks.queries(box), blocks.keys(box))
        blocks.write(out, box, torch.bmm(blocks.values(box), weights.mT))
    return out


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and rel."""
    acc = accumulator(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros_like(x, dtype=acc, memory_format=torch.contiguous_format) for x in (k, v))
    drel = torch.zeros_like(rel, dtype=acc)
    blocks, d = _Blocks(q, k, v, rel, win, block, first, scale, mask), q.shape[2]
    for box in blocks.boxes():
        queries, keys, dy = blocks.queries(box), blocks.keys(box), blocks.read(dout, box)
        weights = blocks.weights(queries, keys)
        blocks.add_window(dv, box, torch.bmm(dy, weights))
        dlogits = torch.bmm(dy.mT, blocks.values(box))
        dlogits = torch._softmax_backward_data(dlogits, weights, -1, acc)
        blocks.add_window(dk, box, torch.bmm(queries[:, :d], dlogits))
        dqueries = torch.bmm(keys, dlogits.mT)
        drelative = blocks.from_codes(dqueries[:, d:])
        drel += torch.bmm(drelative, queries[:, :d].mT).sum(0)
        dqueries = torch.baddbmm(dqueries[:, :d], blocks.rel.mT.expand(dqueries.shape[0], -1, -1), drelative)
        blocks.write(dq, box, dqueries.mul_(scale))
    return dq, dk.to(k.dtype), dv.to(v.dtype), drel.to(rel.dtype)


class _Blocks:
    """A map cut into blocks, and the boxes (images, heads, rows of blocks) of them that are worked on at a time."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool) -> None:
        self.q, self.k, self.v, self.win, self.block, self.first, self.scale, self.mask = q, k, v, win, block, first, scale, mask
        self.reach = rel.shape[0] // 2  # offsets along one axis
        self.side = self.reach - win + 1
        self.rows, self.columns = (-(-n // self.side) for n in q.shape[-2:])
        self.dtype = accumulator(q)
        self.rel = rel.to(self.dtype)

    def boxes(self) -> Iterator[Box]:
        width = 2 * self.side**2 + self.q.shape[2] + self.v.shape[2] + 2 * self.win
        unit = self.columns * self.win**2 * width * self.dtype.itemsize
        return ((b, n, rows) for b, n, rows in chunks((*self.q.shape[:2], self.rows), unit, self.q.device))

    def queries(self, box: Box) -> Tensor:
        """(blocks, d + 2 win, queries): scaled queries and their codes."""
        b, n, rows = box
        d, win = self.q.shape[2], self.win
        q = read_blocks(self.q[b, n], rows, self.columns, self.side).permute(0, 1, 3, 5, 2, 4, 6)
        out = q.new_empty(*q.shape[:4], d + 2 * win, self.side, self.side, dtype=self.dtype)
        torch.mul(q, self.scale, out=out[..., :d, :, :]) if q.dtype == self.dtype else out[..., :d, :, :].copy_(q).mul_(self.scale)
        flat = out.view(-1, d + 2 * win, self.side**2)
        relative = torch.bmm(self.rel.expand(flat.shape[0], -1, -1), flat[:, :d])
        high, wide = self._codes(relative)
        flat[:, d : d + win].unflatten(2, (self.side, -1)).copy_(high)
        flat[:, d + win :].unflatten(2, (self.side, -1)).copy_(wide)
        if self.mask:
            outside = torch.finfo(self.dtype).min / 4
            high, wide = self._outside(rows.start, rows.stop, self.k.shape[-2]), self._outside(0, self.columns, self.k.shape[-1])
            out[..., d : d + win, :, :].masked_fill_(high[:, None, :, None, None], outside)
            out[..., d + win :, :, :].masked_fill_(wide[:, :, None, None], outside)
        return flat

    def _outside(self, start: int, stop: int, length: int) -> Tensor:
        """(blocks, win), True where that row (or column) of the window of that block is not on the map; last row first."""
        at = torch.arange(start, stop, device=self.k.device)[:, None] * self.block + self.first + torch.arange(self.win, device=self.k.device)
        return ((at < 0) | (at >= length)).flip(1)

    def _codes(self, relative: Tensor) -> tuple[Tensor, Tensor]:
        """Views (blocks, win, side, side) of the products with the tables (blocks, 2 reach, queries): entry (win - 1 - i) + y, and for columns."""
        n, side = relative.shape[0], self.side
        outer, row, one = relative.stride()
        at, shape = relative.storage_offset(), (n, self.win, side, side)
        high = relative.as_strided(shape, (outer, row, row + side * one, one), at)
        return high, relative.as_strided(shape, (outer, row, side * one, row + one), at + self.reach * row)

    def from_codes(self, codes: Tensor) -> Tensor:
        """The transpose of `_codes`: gradients of the codes (blocks, 2 win, queries) -> (blocks, 2 reach, queries)."""
        out = codes.new_zeros(codes.shape[0], 2 * self.reach, codes.shape[2])
        for target, part in zip(self._codes(out), codes.split(self.win, 1), strict=True):
            target.copy_(part.unflatten(2, (self.side, -1)))
        return out

    def keys(self, box: Box) -> Tensor:
        """(blocks, d + 2 win, win^2): keys and the one-hot codes of their row and column."""
        k = self._windows(self.k, box)
        d, win = self.k.shape[2], self.win
        out = k.new_empty(*k.shape[:4], d + 2 * win, win, win)
        out[..., :d, :, :] = k
        one = torch.eye(win, dtype=self.dtype, device=k.device).flip(0)
        out[..., d : d + win, :, :] = one[:, :, None]
        out[..., d + win :, :, :] = one[:, None, :]
        return out.view(-1, d + 2 * win, win * win)

    def values(self, box: Box) -> Tensor:
        """(blocks, dv, win^2)."""
        return self._windows(self.v, box).reshape(-1, self.v.shape[2], self.win**2)

    def _windows(self, x: Tensor, box: Box) -> Tensor:
        b, n, rows = box
        high, wide = ((count - 1) * self.block + self.win for count in (rows.stop - rows.start, self.columns))
        band = read_band(x[b, n], rows.start * self.block + self.first, self.first, high, wide, self.dtype)
        return windows(band, self.win, self.block)

    def add_window(self, dx: Tensor, box: Box, parts: Tensor) -> None:
        b, n, rows = box
        dx, count = dx[b, n], rows.stop - rows.start
        band = dx.new_zeros(*dx.shape[:3], (count - 1) * self.block + self.win, (self.columns - 1) * self.block + self.win)
        add_windows(band, parts.view(*dx.shape[:2], count, self.columns, -1, self.win, self.win), self.block)
        add_band(dx, band, rows.start * self.block + self.first, self.first)

    def weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        logits = torch.bmm(queries.mT, keys)
        return torch.softmax(logits, -1, out=logits)

    def write(self, out: Tensor, box: Box, y: Tensor) -> None:
        b, n, rows = box
        part = out[b, n]
        y = y.view(*part.shape[:2], rows.stop - rows.start, self.columns, -1, self.side, self.side)
        write_blocks(part, rows, y.permute(0, 1, 4, 2, 5, 3, 6))

    def read(self, dout: Tensor, box: Box) -> Tensor:
        b, n, rows = box
        part = read_blocks(dout[b, n], rows, self.columns, self.side)
        return part.permute(0, 1, 3, 5, 2, 4, 6).to(self.dtype).reshape(-1, dout.shape[2], self.side**2)
