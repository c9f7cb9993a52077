"""The description of a neighbourhood, and the copies between maps and their windows that the fast ways share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import require
from ...validate import check_option


@dataclass(frozen=True)
class Window:
    """Which pixels an output pixel sees: rows and columns stride p + offset_first + dilation j, j = 0 .. kernel_size - 1.

    Args:
        kernel_size: pixels along a side. A window of them is flattened row by row.
        stride: distance of the sources of neighbouring output pixels; an axis of n pixels gives ceil(n / stride).
        dilation: distance of neighbouring pixels of a window.
        padding: outside the map lie zeros ("zero"), nothing ("mask": left out of a softmax) or the mirrored map ("reflect").
        offset_first: where the window begins, in pixels; -dilation (kernel_size // 2) if None.
    """

    kernel_size: int
    stride: int = 1
    dilation: int = 1
    padding: Literal["zero", "mask", "reflect"] = "zero"
    offset_first: int | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation"):
            require(getattr(self, name) > 0, "{}={} of a window must be at least 1", name, getattr(self, name))
        check_option(self.padding, ("zero", "mask", "reflect"), "padding")

    @property
    def first(self) -> int:
        return -self.dilation * (self.kernel_size // 2) if self.offset_first is None else self.offset_first


BUDGET = 8 * 2**20


def accumulator(x: Tensor) -> torch.dtype:
    """Sums over a window are kept in at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def chunks(sizes: tuple[int, int, int], unit_bytes: int, device: torch.device) -> Iterator[tuple[slice, slice, slice]]:
    """Cut three axes into boxes of about 8 MB (so that a box stays in the cache), the last axis first; one unit at least."""
    left = max(1, (BUDGET if device.type == "cpu" else 256 * 2**20) // max(unit_bytes, 1))
    steps = []
    for size in reversed(sizes):
        steps.append(max(1, min(size, left)))
        left = left // size if size and left >= size else 1
    c, b, a = steps
    for i in range(0, sizes[0], a):
        for j in range(0, sizes[1], b):
            for k in range(0, sizes[2], c):
                yield slice(i, min(i + a, sizes[0])), slice(j, min(j + b, sizes[1])), slice(k, min(k + c, sizes[2]))


def read_band(x: Tensor, band: Tensor, top: int, left: int) -> None:
    """Fill a band of zeros (..., h, w) with the part of a map (..., H, W) that begins at (top, left), as far as that is inside."""
    rows, columns = _inside(x, top, left, *band.shape[-2:])
    band[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = x[..., rows, columns]


def add_band(x: Tensor, band: Tensor, top: int, left: int) -> None:
    """The transpose of `read_band`: add the band's part that is inside the map."""
    rows, columns = _inside(x, top, left, *band.shape[-2:])
    x[..., rows, columns] += band[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


def _inside(x: Tensor, top: int, left: int, height: int, width: int) -> tuple[slice, slice]:
    def clip(first: int, size: int, limit: int) -> slice:
        start = min(max(first, 0), limit)
        return slice(start, min(max(first + size, start), limit))

    return clip(top, height, x.shape[-2]), clip(left, width, x.shape[-1])


def windows(band: Tensor, size: int, step: int) -> Tensor:
    """A view (..., C, H, W) -> (..., rows, columns, C, size, size) of the windows that begin at every `step`-th pixel."""
    return band.unfold(-2, size, step).unfold(-2, size, step).movedim(-5, -3)


def add_windows(band: Tensor, parts: Tensor, step: int) -> None:
    """The transpose of `windows`: add all windows into the band, in pieces that do not overlap."""
    size, rows, columns = parts.shape[-1], parts.shape[-5], parts.shape[-4]
    for y in range(0, size, step):
        for x in range(0, size, step):
            h, w = min(step, size - y), min(step, size - x)
            piece = band[..., y : y + (rows - 1) * step + h, x : x + (columns - 1) * step + w]
            piece = piece.unfold(-2, h, step).unfold(-2, w, step).movedim(-5, -3)
            piece += parts[..., y : y + h, x : x + w]


def read_blocks(x: Tensor, rows: slice, columns: int, side: int) -> Tensor:
    """The block rows `rows` of a map (..., H, W) as (..., rows, side, columns, side), zero where the last blocks stick out."""
    part = x[..., rows.start * side : rows.stop * side, :]
    high, wide = (rows.stop - rows.start) * side - part.shape[-2], columns * side - part.shape[-1]
    if high or wide:
        part = F.pad(part, (0, wide, 0, high))
    return part.unflatten(-1, (columns, side)).unflatten(-3, (-1, side))


def write_blocks(x: Tensor, rows: slice, blocks: Tensor) -> None:
    """The transpose of `read_blocks`: write blocks into the map, less what sticks out."""
    side, columns = blocks.shape[-1], blocks.shape[-2]
    part = x[..., rows.start * side : rows.stop * side, :]
    if part.shape[-2] == (rows.stop - rows.start) * side and part.shape[-1] == columns * side:
        part.unflatten(-1, (columns, side)).unflatten(-3, (-1, side)).copy_(blocks)
    else:
        part.copy_(blocks.flatten(-4, -3).flatten(-2)[..., : part.shape[-2], : part.shape[-1]])


def split(x: Tensor, size: int, step: int, first: int, rows: int, columns: int) -> Tensor:
    """(B, N, d, H, W) -> (B, N, rows, columns, d, size, size): windows at first, first + step, ...; zero outside. Differentiable."""
    high, wide = (step * (n - 1) + size + first - length for n, length in ((rows, x.shape[-2]), (columns, x.shape[-1])))
    return windows(F.pad(x, (-first, wide, -first, high)), size, step)


def join(blocks: Tensor, height: int, width: int) -> Tensor:
    """(B, N, rows, columns, d, side, side) -> (B, N, d, height, width), less what sticks out. Differentiable."""
    return blocks.permute(0, 1, 4, 2, 5, 3, 6).flatten(-2).flatten(-3, -2)[..., :height, :width]
