"""window_apply as a dense product for each tile of t x t pixels: (channels x keys of the tile) (keys x outputs of the tile).

The k^2 weights of each pixel are laid out in a banded matrix that is zero elsewhere. That multiplies ((t + k - 1) / k)^2 times more than
needed, at the full speed of matrix products: best for many channels a group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .window import accumulator, add_band, add_windows, chunks, read_band, read_blocks, windows, write_blocks

Box = tuple[slice, slice, slice]


def forward(w: Tensor, v: Tensor, kernel: int, first: int, scale: int) -> Tensor:
    """w (B, G, k^2, s^2, H, W), v (B, G, C, H, W) -> (B, G, C, s H, s W)."""
    out = v.new_empty(*v.shape[:3], w.shape[-2] * scale, w.shape[-1] * scale)
    tiles = _Tiles(w, v, kernel, first, scale)
    for box in tiles.boxes():
        y = torch.bmm(tiles.keys(box), tiles.matrix(box))
        tiles.write(out, box, y)
    return out


def backward(dy: Tensor, w: Tensor, v: Tensor, kernel: int, first: int, scale: int) -> tuple[Tensor, Tensor]:
    """The gradients of w and v."""
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(v, dtype=accumulator(v), memory_format=torch.contiguous_format)
    tiles = _Tiles(w, v, kernel, first, scale)
    for box in tiles.boxes():
        dout, matrix = tiles.read(dy, box), tiles.matrix(box)
        tiles.add_keys(dv, box, torch.bmm(dout, matrix.mT))
        tiles.write_weights(dw, box, torch.bmm(tiles.keys(box).mT, dout))
    return dw, dv.to(v.dtype)


class _Tiles:
    """A map cut into tiles, and the boxes (images, groups, rows of tiles) of them that are worked on at a time."""

    def __init__(self, w: Tensor, v: Tensor, kernel: int, first: int, scale: int) -> None:
        self.w, self.v, self.kernel, self.first, self.scale = w, v, kernel, first, scale
        self.t = max(2, 8 // scale)
        self.side = self.t + kernel - 1
        self.rows, self.columns = -(-w.shape[-2] // self.t), -(-w.shape[-1] // self.t)
        self.dtype = accumulator(v)
        self.dense = v.new_zeros(0)

    def boxes(self) -> Iterator[Box]:
        keys, outs = self.side**2, (self.t * self.scale) ** 2
        unit = self.columns * (keys * outs + self.v.shape[2] * (keys + outs)) * self.dtype.itemsize
        return chunks((self.v.shape[0], self.v.shape[1], self.rows), unit, self.v.device)

    def keys(self, box: Box) -> Tensor:
        """(tiles, C, side^2): the pixels that a tile sees."""
        b, g, rows = box
        band = self._band(self.v[b, g], rows)
        read_band(self.v[b, g], band, rows.start * self.t + self.first, self.first)
        return windows(band, self.side, self.t).reshape(-1, self.v.shape[2], self.side**2)

    def add_keys(self, dv: Tensor, box: Box, dkeys: Tensor) -> None:
        b, g, rows = box
        dv = dv[b, g]
        band = self._band(dv, rows)
        add_windows(band, dkeys.view(*dv.shape[:2], -1, self.columns, dv.shape[2], self.side, self.side), self.t)
        add_band(dv, band, rows.start * self.t + self.first, self.first)

    def _band(self, x: Tensor, rows: slice) -> Tensor:
        """Zeros for the pixels that these rows of tiles see."""
        high, wide = ((count - 1) * self.t + self.side for count in (rows.stop - rows.start, self.columns))
        return x.new_zeros(*x.shape[:3], high, wide, dtype=self.dtype)

    def matrix(self, box: Box) -> Tensor:
        """(tiles, side^2, (t s)^2): the weights, zero where an output does not see a key."""
        b, g, rows = box
        blocks = read_blocks(self.w[b, g], rows, self.columns, self.t)
        tiles = blocks.shape[0] * blocks.shape[1] * blocks.shape[4] * self.columns
        if self.dense.shape[0] != tiles:  # else the zeros of the last box still stand
            self.dense = self.v.new_zeros(tiles, self.side**2, (self.t * self.scale) ** 2, dtype=self.dtype)
        self._seen(self.dense, blocks).copy_(self._by_phase(blocks))
        return self.dense

    def write_weights(self, dw: Tensor, box: Box, dmatrix: Tensor) -> None:
        b, g, rows = box
        dw = dw[b, g]
        blocks = dw.new_empty(*dw.shape[:4], rows.stop - rows.start, self.t, self.columns, self.t)
        self._by_phase(blocks).copy_(self._seen(dmatrix, blocks))
        write_blocks(dw, rows, blocks)

    def _by_phase(self, blocks: Tensor) -> Tensor:
        """A view (B, G, k^2, s^2, rows, t, columns, t) -> (B, G, rows, columns, k, k, s, s, t, t)."""
        k, s = self.kernel, self.scale
        return blocks.unflatten(3, (s, s)).unflatten(2, (k, k)).permute(0, 1, 6, 8, 2, 3, 4, 5, 7, 9)

    def _seen(self, dense: Tensor, blocks: Tensor) -> Tensor:
        """A view (B, G, rows, columns, k, k, s, s, t, t) of the entries of the matrix where output (y, x) sees key (y + i, x + j)."""
        (b, g), (rows, columns), k, s, t = blocks.shape[:2], (blocks.shape[4], blocks.shape[6]), self.kernel, self.scale, self.t
        full = dense.view(b, g, rows, columns, self.side, self.side, t, s, t, s)
        *outer, key_y, key_x, y, phase_y, x, phase_x = full.stride()
        return full.as_strided((b, g, rows, columns, k, k, s, s, t, t), (*outer, key_y, key_x, phase_y, phase_x, key_y + y, key_x + x))

    def write(self, out: Tensor, box: Box, y: Tensor) -> None:
        b, g, rows = box
        part, side = out[b, g], self.t * self.scale
        y = y.view(*part.shape[:2], rows.stop - rows.start, self.columns, -1, side, side)
        write_blocks(part, rows, y.permute(0, 1, 4, 2, 5, 3, 6))

    def read(self, dy: Tensor, box: Box) -> Tensor:
        b, g, rows = box
        blocks = read_blocks(dy[b, g], rows, self.columns, self.t * self.scale)
        return blocks.permute(0, 1, 3, 5, 2, 4, 6).to(self.dtype).reshape(-1, self.v.shape[2], (self.t * self.scale) ** 2)
