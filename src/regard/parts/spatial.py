"""Maps as rows of positions, and 1x1 convolutions on them without a copy of either layout."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._dispatch import on_cpu
from ..ops._linear import SMALLEST


def flatten_space(x: Tensor) -> Tensor:
    """(B, C, *space) -> (B, N, C), row-major: a view of a contiguous or a channels-last map."""
    return x.flatten(2).mT


def unflatten_space(rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, N, C) -> (B, C, *size), a view."""
    return rows.mT.unflatten(2, size)


def halve(x: Tensor) -> Tensor:
    """Max pooling by 2 of a map (B, C, *space): of one axis, or of the last two."""
    if x.ndim == 3:
        return F.max_pool1d(x, 2)
    return F.max_pool2d(x, 2) if x.ndim == 4 else F.max_pool3d(x, (1, 2, 2))


def halve_rows(rows: Tensor, size: tuple[int, ...]) -> Tensor:
    """`halve` of the rows (B, N, C) of a map of `size`: (B, M, C)."""
    return flatten_space(halve(unflatten_space(rows, size)))


def project_rows(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution `weight` (F, C), `bias` (F) of rows (B, N, C): contiguous (B, N, F), whatever the strides of `rows`."""
    if weight.shape[1] >= 256 and _convolves(rows.mT, weight):  # fewer channels are not worth the copy
        return project_columns(rows.mT, weight, bias).mT.contiguous()
    matrix = weight.mT.expand(rows.shape[0], -1, -1)
    return torch.bmm(rows, matrix) if bias is None else torch.baddbmm(bias, rows, matrix)


def project_to_map(rows: Tensor, weight: Tensor, bias: Tensor | None, size: tuple[int, ...]) -> Tensor:
    """The 1x1 convolution `weight` (F, C), `bias` (F) of rows (B, N, C), written as a contiguous map (B, F, *size)."""
    return project_columns(rows.mT, weight, bias).unflatten(2, size)


def project_columns(columns: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution `weight` (F, C), `bias` (F) of columns (B, C, N): contiguous (B, F, N), whatever the strides of `columns`."""
    if _convolves(columns, weight):
        return F.conv1d(columns, weight[:, :, None], bias)
    matrix = weight.expand(columns.shape[0], -1, -1)
    return torch.bmm(matrix, columns) if bias is None else torch.baddbmm(bias[:, None], matrix, columns)


def _convolves(columns: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's convolution takes `columns` as they lie and is faster than the matrix product: 1.4 to 1.9 times for so many channels.

    Not for large maps: it copies what it reads and writes into an order of its own. Traced programs keep the product.
    """
    if torch.compiler.is_compiling() or not on_cpu(columns) or columns.dtype != torch.float32 or columns.stride(2) != 1:
        return False
    fewer, more = sorted(weight.shape)
    positions = columns.shape[0] * columns.shape[2]
    return fewer >= 64 and more >= 256 and fewer * more * positions >= SMALLEST and more * positions <= 2**22


def project_gather(columns: Tensor, maps: Tensor, weight: Tensor | None = None) -> Tensor:
    """Descriptors of a map: its columns (B, C, N), projected by `weight` (F, C), summed with each of `maps` (B, S, N): (B, F, S).

    The projection comes first or last, whichever is fewer products: it commutes with the sum.
    """
    if weight is None:
        return torch.bmm(columns, maps.mT)
    if _projects_descriptors(weight.shape[1], weight.shape[0], maps):
        return project_columns(torch.bmm(columns, maps.mT), weight)
    return torch.bmm(project_columns(columns, weight), maps.mT)


def project_distribute(
    descriptors: Tensor, maps: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, onto: Tensor | None = None
) -> Tensor:
    """The way back: every position's mixture (B, F, N), by `maps` (B, S, N), of descriptors (B, C, S), projected by `weight` (F, C).

    `onto` (B, F, N) is added. The projection comes first or last, whichever is fewer products; `bias` (F,) goes with it, which is the same
    either way where the maps sum to one over S.
    """
    if weight is not None and not _projects_descriptors(weight.shape[0], weight.shape[1], maps):
        mixed = project_columns(torch.bmm(descriptors, maps), weight, bias)
        return mixed if onto is None else onto + mixed
    if weight is not None:
        descriptors = project_columns(descriptors, weight, bias)
    if onto is None or onto.dtype != descriptors.dtype:  # under autocast the sum keeps the precision of `onto`
        return torch.bmm(descriptors, maps) if onto is None else onto + torch.bmm(descriptors, maps)
    return torch.baddbmm(onto, descriptors, maps)


def _projects_descriptors(outer: int, inner: int, maps: Tensor) -> bool:
    """Whether the map of `outer` channels meets the descriptors at once, without passing `inner` channels on the way."""
    count, n = maps.shape[1:]
    if torch.compiler.is_compiling():  # one program for all sizes: that of many positions
        return outer * count <= inner * (outer + count)
    return outer * count * (inner + n) <= inner * n * (outer + count)
