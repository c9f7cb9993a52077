"""Attention of blocks to their windows, some rows of blocks at a time; the backward computes the weights again instead of keeping them.

The relative term is separable: for query (y, x) and key (i, j) it is R[i] + C[j], where the codes R and C depend on the query alone. So the
logits are one product of widened vectors: [scale q, R, C] times [k, i one-hot, j one-hot]. A border mask is a large negative code, and so is what
lies outside a query's own window when every pixel has one: windows of pixels are the windows of their block less a band.
Codes run from the last row (column) of the window to the first, so that they are a plain strided view of q times the reversed tables.
Channels are innermost everywhere: then a row of a window is one run of memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .window import accumulator, add_band, add_windows, chunks, read_band, read_blocks, windows, write_blocks

Box = tuple[slice, slice, slice]
NARROW = 16  # products with fewer columns than a vector register holds are three times slower on the CPU (measured), so they get zero columns


def forward(q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool, band: bool) -> Tensor:
    """q (B, N, d, Hq, Wq), k (B, N, d, H, W), v (B, N, dv, H, W), rel (2 (win + side - 1), d), reversed -> (B, N, dv, Hq, Wq).

    band: each query sees only the win - side + 1 rows and columns of the window that begin at its own place.
    """
    out = channels_last(v, (*q.shape[:2], v.shape[2], *q.shape[-2:]))
    blocks = _Blocks(q, k, v, rel, win, block, first, scale, mask, band)
    for box in blocks.boxes():
        weights = blocks.weights(blocks.queries(box), blocks.keys(box))
        blocks.write(out, box, torch.bmm(weights, blocks.values(box)))
    return out


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool, band: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and rel."""
    acc, d, dv_ = accumulator(q), q.shape[2], v.shape[2]
    dq = channels_last(q, q.shape)
    dk, dv = (channels_last(x, x.shape, acc).zero_() for x in (k, v))
    drel = torch.zeros_like(rel, dtype=acc)
    blocks = _Blocks(q, k, v, rel, win, block, first, scale, mask, band)
    for box in blocks.boxes():
        queries, keys, dy = blocks.queries(box), blocks.keys(box), blocks.read(dout, box)
        weights = blocks.weights(queries, keys)
        blocks.add_window(dv, box, torch.bmm(weights.mT, dy))
        dlogits = torch.bmm(dy[..., :dv_], blocks.values(box)[..., :dv_].mT)
        dlogits = torch._softmax_backward_data(dlogits, weights, -1, acc)
        blocks.add_window(dk, box, torch.bmm(dlogits.mT, queries[..., : max(d, NARROW)]))
        dqueries = torch.bmm(dlogits, keys).flatten(0, 1)
        drelative = blocks.from_codes(dqueries[:, d:])
        drel.addmm_(drelative.mT, queries.flatten(0, 1)[:, :d])
        dqueries = torch.addmm(dqueries[:, :d], drelative, blocks.rel, beta=scale, alpha=scale)
        blocks.write(dq, box, dqueries)
    return dq, dk.to(k.dtype), dv.to(v.dtype), drel.to(rel.dtype)


def pixels_forward(q: Tensor, k: Tensor, v: Tensor, rel: Tensor | None, kernel: int, first: int, scale: float, mask: bool) -> Tensor:
    """A window of its own for every pixel, as a band of its block's window; rel (1, 2 k, d), rows and columns."""
    side, (q, k, v) = _side(q, kernel), _innermost(q, k, v)
    return forward(q, k, v, _banded(q, rel, kernel, side), side + kernel - 1, side, first, scale, mask, True).contiguous()


def pixels_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rel: Tensor | None, kernel: int, first: int, scale: float, mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    side, (dout, q, k, v) = _side(q, kernel), _innermost(dout, q, k, v)
    tables = _banded(q, rel, kernel, side)
    dq, dk, dv, drel = backward(dout, q, k, v, tables, side + kernel - 1, side, first, scale, mask, True)
    drel = drel.unflatten(0, (2, -1))[:, side - 1 : side + kernel - 1].flip(1).reshape(1, 2 * kernel, -1)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), drel if rel is not None else q.new_empty(0)


def _side(q: Tensor, kernel: int) -> int:
    """Large blocks multiply much that their band leaves out, small ones copy much of their windows: the best of the sizes in between, measured."""

    def cost(side: int) -> int:
        return -(-q.shape[-2] // side) * -(-q.shape[-1] // side) * (side + kernel - 1) ** 2 * (side**2 + 32)

    return min(range(4, 9), key=cost)


def _innermost(*maps: Tensor) -> Iterator[Tensor]:
    return (channels_last(x, x.shape).copy_(x) for x in maps)


def _banded(q: Tensor, rel: Tensor | None, kernel: int, side: int) -> Tensor:
    """Tables (2 (kernel + 2 side - 2), d), reversed, zero outside the band."""
    out = q.new_zeros(2, kernel + 2 * (side - 1), q.shape[2])
    if rel is not None:
        out[:, side - 1 : side + kernel - 1] = rel.view(2, kernel, -1).flip(1)
    return out.flatten(0, 1)


def channels_last(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An empty (B, N, d, H, W) with memory (B, H, W, N, d): a map of channels N d, channels last."""
    batch, heads, d, height, width = shape
    return like.new_empty(batch, height, width, heads, d, dtype=dtype).permute(0, 3, 4, 1, 2)


class _Blocks:
    """A map cut into blocks, and the boxes (images, heads, rows of blocks) of them that are worked on at a time."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rel: Tensor, win: int, block: int, first: int, scale: float, mask: bool, band: bool) -> None:
        self.q, self.k, self.v, self.win, self.block, self.first, self.scale = q, k, v, win, block, first, scale
        self.mask, self.banded = mask, band
        self.reach = rel.shape[0] // 2  # offsets along one axis
        self.side = self.reach - win + 1
        self.rows, self.columns = (-(-n // self.side) for n in q.shape[-2:])
        self.dtype = accumulator(q)
        self.rel, self.outside = rel.to(self.dtype), torch.finfo(self.dtype).min / 4
        self._keys: Tensor | None = None

    def boxes(self) -> Iterator[Box]:
        width = 2 * self.side**2 + self.q.shape[2] + self.v.shape[2] + 2 * self.win
        unit = self.columns * self.win**2 * width * self.dtype.itemsize
        return chunks((self.q.shape[0], self.q.shape[1], self.rows), unit, self.q.device)

    def queries(self, box: Box) -> Tensor:
        """(blocks, queries, d + 2 win): scaled queries and their codes."""
        q, d, win, side = self.q[box[0], box[1]], self.q.shape[2], self.win, self.side
        q = read_blocks(q, box[2], self.columns, side).permute(0, 1, 3, 5, 4, 6, 2)
        out = q.new_empty(*q.shape[:-1], d + 2 * win, dtype=self.dtype)
        torch.mul(q.to(self.dtype), self.scale, out=out[..., :d])
        flat = out.view(-1, d + 2 * win)
        relative = flat[:, :d] @ self.rel.mT
        if self.banded:  # entry (win - 1 - i) + y of the codes belongs to a key i - y places after the first of its query
            for table in relative.split(self.reach, 1):
                table[:, : side - 1] = table[:, win:] = self.outside
        high, wide = self._codes(relative)
        out.view(-1, side, side, d + 2 * win)[..., d : d + win].copy_(high)
        out.view(-1, side, side, d + 2 * win)[..., d + win :].copy_(wide)
        if self.mask:
            high, wide = self._outside(box[2], self.k.shape[-2]), self._outside(slice(0, self.columns), self.k.shape[-1])
            out[..., d : d + win].masked_fill_(high[:, None, None, None], self.outside)
            out[..., d + win :].masked_fill_(wide[:, None, None], self.outside)
        return out.view(-1, side**2, d + 2 * win)

    def _outside(self, blocks: slice, length: int) -> Tensor:
        """(blocks, win), True where that row (or column) of the window of that block is not on the map; last row first."""
        at = torch.arange(blocks.start, blocks.stop, device=self.k.device)[:, None] * self.block + self.first
        at = at + torch.arange(self.win, device=self.k.device)
        return ((at < 0) | (at >= length)).flip(1)

    def _codes(self, relative: Tensor) -> tuple[Tensor, Tensor]:
        """Views (blocks, side, side, win) of the products with the tables (all queries, 2 reach): entry (win - 1 - i) + y; and for columns."""
        side, row = self.side, 2 * self.reach
        shape = (relative.shape[0] // side**2, side, side, self.win)
        high = relative.as_strided(shape, (side**2 * row, side * row + 1, row, 1))
        return high, relative.as_strided(shape, (side**2 * row, side * row, row + 1, 1), self.reach)

    def from_codes(self, codes: Tensor) -> Tensor:
        """The transpose of `_codes`: gradients of the codes (all queries, 2 win) -> (all queries, 2 reach)."""
        out = codes.new_zeros(codes.shape[0], 2 * self.reach)
        for target, part in zip(self._codes(out), codes.split(self.win, 1), strict=True):
            target.copy_(part.view(target.shape))
        return out

    def keys(self, box: Box) -> Tensor:
        """(blocks, win^2, d + 2 win): keys and the one-hot codes of their row and column."""
        k, d, win = self._windows(self.k, box), self.k.shape[2], self.win
        if self._keys is None or self._keys.shape[:-1] != k.shape[:-1]:  # the codes are the same for every box
            self._keys = k.new_empty(*k.shape[:-1], d + 2 * win)
            one = torch.eye(win, dtype=self.dtype, device=k.device).flip(0)
            self._keys[..., d : d + win] = one[:, None]
            self._keys[..., d + win :] = one
        self._keys[..., :d] = k
        return self._keys.view(-1, win * win, d + 2 * win)

    def values(self, box: Box) -> Tensor:
        """(blocks, win^2, dv), with zero columns if dv is small."""
        return _wide(self._windows(self.v, box)).reshape(-1, self.win**2, max(self.v.shape[2], NARROW))

    def _windows(self, x: Tensor, box: Box) -> Tensor:
        """(B, N, rows, columns, win, win, channels)."""
        b, n, rows = box
        band = self._band(x[b, n], rows)
        read_band(x[b, n], band, rows.start * self.block + self.first, self.first)
        return windows(band, self.win, self.block).movedim(-3, -1)

    def add_window(self, dx: Tensor, box: Box, parts: Tensor) -> None:
        """Add (blocks, win^2, channels or more) where the windows are."""
        b, n, rows = box
        dx = dx[b, n]
        band = self._band(dx, rows)
        parts = parts.view(*dx.shape[:2], -1, self.columns, self.win, self.win, parts.shape[-1])[..., : dx.shape[2]]
        add_windows(band, parts.movedim(-1, -3), self.block)
        add_band(dx, band, rows.start * self.block + self.first, self.first)

    def _band(self, x: Tensor, rows: slice) -> Tensor:
        """Zeros (B, N, channels, H, W), channels innermost, for the windows of these rows of blocks."""
        high, wide = ((count - 1) * self.block + self.win for count in (rows.stop - rows.start, self.columns))
        return x.new_zeros(*x.shape[:2], high, wide, x.shape[2], dtype=self.dtype).movedim(-1, -3)

    def weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        logits = torch.bmm(queries, keys.mT)
        return torch.softmax(logits, -1, out=logits)

    def write(self, out: Tensor, box: Box, y: Tensor) -> None:
        b, n, rows = box
        part = out[b, n]
        y = y.view(*part.shape[:2], -1, self.columns, self.side, self.side, y.shape[-1])[..., : part.shape[2]]
        write_blocks(part, rows, y.permute(0, 1, 6, 2, 4, 3, 5))

    def read(self, dout: Tensor, box: Box) -> Tensor:
        """(blocks, queries, dv), with zero columns if dv is small."""
        part = read_blocks(dout[box[0], box[1]], box[2], self.columns, self.side).permute(0, 1, 3, 5, 4, 6, 2).to(self.dtype)
        return _wide(part).reshape(-1, self.side**2, max(dout.shape[2], NARROW))


def _wide(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, NARROW - x.shape[-1])) if x.shape[-1] < NARROW else x
