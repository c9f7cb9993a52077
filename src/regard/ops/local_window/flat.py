"""Maps stored at the width of their padded rows, so that a shift to a neighbour is one offset in memory.

Then the k^2 neighbours of all pixels are one strided view, and a loop over channels (or over neighbours) is one long run of memory for each. The
columns past the end of a row hold zeros in queries and gradients: whatever is computed there counts for nothing.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .window import accumulator, add_band, chunks, read_band

Box = tuple[slice, slice, slice]


class Flat:
    """Queries (B, N, d, H', W') and keys (B, N, d, H, W), and the boxes (images, heads, rows) of them that are worked on at a time."""

    def __init__(self, q: Tensor, k: Tensor, kernel: int, stride: int, dilation: int, first: int) -> None:
        self.q, self.k, self.kernel, self.stride, self.dilation, self.first = q, k, kernel, stride, dilation, first
        self.width, self.reach = q.shape[-1], dilation * (kernel - 1)
        self.pitch = stride * (self.width - 1) + self.reach + 1
        self.columns = self.pitch if stride == 1 else self.width
        self.dtype = accumulator(q)

    def boxes(self, channels: int) -> Iterator[Box]:
        """`channels`: how many maps, beside the k^2 of the weights, a box holds."""
        unit = (self.kernel**2 + channels) * self.columns * self.dtype.itemsize
        return chunks((self.q.shape[0], self.q.shape[1], self.q.shape[-2]), unit, self.q.device)

    def read(self, x: Tensor, box: Box) -> Tensor:
        """(b, n, channels, rows, columns) of a map of the size of the queries."""
        part = x[box[0], box[1], ..., box[2], :]
        out = part.new_zeros(*part.shape[:-1], self.columns, dtype=self.dtype)
        out[..., : self.width] = part
        return out

    def write(self, out: Tensor, box: Box, y: Tensor) -> None:
        out[box[0], box[1], ..., box[2], :] = y[..., : self.width]

    def band(self, x: Tensor, box: Box) -> Tensor:
        """Zeros (b, n, channels, rows, pitch) for the neighbours of these rows in a map of the size of the keys."""
        part = x[box[0], box[1]]
        rows = self.stride * (box[2].stop - box[2].start - 1) + self.reach + 1
        return part.new_zeros(*part.shape[:3], rows + 1, self.pitch, dtype=self.dtype)  # the last shift of the last row runs past its end

    def neighbours(self, x: Tensor, box: Box) -> Tensor:
        """A view (b, n, channels, k, k, rows, columns) of a copy of the rows that are seen, zero outside the map."""
        band = self.band(x, box)
        read_band(x[box[0], box[1]], band[..., :-1, :], box[2].start * self.stride + self.first, self.first)
        return self.view(band, box)

    def view(self, band: Tensor, box: Box) -> Tensor:
        shape = (*band.shape[:3], self.kernel, self.kernel, box[2].stop - box[2].start, self.columns)
        step = self.dilation, self.stride
        return band.as_strided(shape, (*band.stride()[:3], step[0] * self.pitch, step[0], step[1] * self.pitch, step[1]))

    def add(self, dx: Tensor, box: Box, band: Tensor) -> None:
        """The transpose of `neighbours`: add the band's part that is on the map."""
        add_band(dx[box[0], box[1]], band[..., :-1, :], box[2].start * self.stride + self.first, self.first)

    def outside(self, box: Box) -> tuple[Tensor, Tensor]:
        """(k, rows), (k, columns): True where that row (column) of the window is not on the map."""
        seen = torch.arange(self.kernel, device=self.q.device)[:, None] * self.dilation + self.first
        rows = torch.arange(box[2].start, box[2].stop, device=self.q.device) * self.stride + seen
        columns = torch.arange(self.columns, device=self.q.device) * self.stride + seen
        return (rows < 0) | (rows >= self.k.shape[-2]), (columns < 0) | (columns >= self.k.shape[-1])

    def shifts(self) -> Iterator[tuple[int, int]]:
        for i in range(self.kernel):
            for j in range(self.kernel):
                yield i, j
