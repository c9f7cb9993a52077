"""Where samples lie, and sums over the four pixels around each.

Interpolation is a product with a sparse matrix: a sample is the sum of a bag of four rows of the table of pixels, each row one run of channels; a
weighted sum of samples is one larger bag. A zero pixel on every side of the map stands for all that is outside.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BUDGET = 8 * 2**20


class Samples:
    """The samples of some images (b) and outputs (q), for each offset group (o) and tap (t).

    Attributes:
        pixel: (b, q, o, t, 4), the rows of a table of those images, with its border.
        share: (b, q, o, t, 4), what each contributes.
    """

    def __init__(
        self,
        offset: Tensor,
        size: list[int],
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        box: tuple[slice, slice],
        dtype: torch.dtype,
    ) -> None:
        images, outputs = box
        device, taps, wide = offset.device, kernel[0] * kernel[1], size[1] + 2
        moved = offset.flatten(2)[images, :, outputs].to(dtype).unflatten(1, (groups, taps, 2)).permute(3, 0, 4, 1, 2).contiguous()
        place = torch.arange(outputs.start, outputs.stop, device=device)[:, None, None]
        tap = torch.arange(taps, device=device)
        starts = (place // offset.shape[3], tap // kernel[1]), (place % offset.shape[3], tap % kernel[1])
        low, self.inside, self.along = [], [], []
        for axis, (at, step) in enumerate(starts):
            position = moved[axis] + (at * stride[axis] - padding[axis] + step * dilation[axis])
            inside = (position > -1) & (position < size[axis])
            position = torch.where(inside, position, -1.0)  # the border; also where it is not a number
            floor = position.floor()
            low.append(floor.int() + 1)
            self.inside.append(inside)
            self.along.append((floor + 1 - position, position - floor))
        image = torch.arange(moved.shape[1], device=device, dtype=torch.int32)[:, None, None, None] * ((size[0] + 2) * wide)
        first = low[0] * wide + low[1] + image
        self.pixel, self.share = first.new_empty(*first.shape, 4), moved.new_empty(*first.shape, 4)
        for corner in range(4):  # one whole table each: four neighbours at a time are slow
            down, right = divmod(corner, 2)
            torch.add(first, down * wide + right, out=self.pixel[..., corner])
            torch.mul(self.along[0][down], self.along[1][right], out=self.share[..., corner])

    def weighted(self, weights: Tensor) -> Tensor:
        """`share` times (b, q, o, t)."""
        out = torch.empty_like(self.share)
        for corner in range(4):
            torch.mul(self.share[..., corner], weights, out=out[..., corner])
        return out

    def rows(self, slots: int) -> Tensor:
        """`pixel` in a table that has `slots` rows for each pixel, one for each offset group."""
        if slots == 1:
            return self.pixel
        return self.pixel * slots + torch.arange(slots, device=self.pixel.device, dtype=torch.int32)[:, None, None]

    def backward(self, dshare: Tensor) -> Tensor:
        """The gradient of these offsets, (b, 2 o t, q). Not even a sample exactly on the border moves; on a pixel it sees what lies after it."""
        d = dshare.unbind(-1)
        down = (d[2] - d[0]) * self.along[1][0] + (d[3] - d[1]) * self.along[1][1]
        right = (d[1] - d[0]) * self.along[0][0] + (d[3] - d[2]) * self.along[0][1]
        out = dshare.new_empty(*dshare.shape[:-1], 2)
        torch.mul(down, self.inside[0], out=out[..., 0])
        torch.mul(right, self.inside[1], out=out[..., 1])
        return out.flatten(2).mT


def bordered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, C, H, W) -> (B, H + 2, W + 2, C), zeros around."""
    batch, channels, height, width = x.shape
    table = torch.zeros(batch, height + 2, width + 2, channels, dtype=dtype, device=x.device)
    table[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    return table


def unbordered(table: Tensor, like: Tensor) -> Tensor:
    """The transpose of `bordered`, channels last."""
    return table[:, 1:-1, 1:-1].permute(0, 3, 1, 2).to(like.dtype).contiguous(memory_format=torch.channels_last)


def gather(table: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
    """table (rows, width), rows and shares (bags, n) -> (bags, width): the weighted sum of each bag."""
    return F.embedding_bag(rows, table, mode="sum", per_sample_weights=shares)


def gather_backward(dy: Tensor, table: Tensor, dtable: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
    """Add the gradient of the table to `dtable` and return that of the shares."""
    bags, n = rows.shape
    flat, device = rows.flatten(), rows.device
    bag = torch.arange(bags, device=device, dtype=torch.int32)[:, None].repeat(1, n).view(-1)
    starts = torch.arange(0, bags * n, n, device=device, dtype=torch.int32)
    dshares = torch.ops.aten._embedding_bag_per_sample_weights_backward(dy, table, flat, starts, bag, 0)
    # The transposed product is a sum over bags too, one for each row of the table: nothing is added twice to the same place.
    sorted_rows, order = flat.sort(stable=True)
    first, last = (int(sorted_rows[0]), int(sorted_rows[-1]) + 1) if device.type == "cpu" else (0, table.shape[0])
    starts = torch.searchsorted(sorted_rows, torch.arange(first, last, device=device, dtype=torch.int32), out_int32=True)
    dtable[first:last] += F.embedding_bag(
        bag.index_select(0, order), dy, starts, mode="sum", per_sample_weights=shares.flatten().index_select(0, order)
    )
    return dshares.view(bags, n)


def boxes(images: int, outputs: int, unit_bytes: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut images and their outputs into boxes of about 8 MB, many images or a part of one."""
    left = max(1, (BUDGET if device.type == "cpu" else 256 * 2**20) // max(unit_bytes, 1))
    many, step = max(1, left // outputs), min(outputs, left)
    for i in range(0, images, many):
        for j in range(0, outputs, step):
            yield slice(i, min(i + many, images)), slice(j, min(j + step, outputs))
