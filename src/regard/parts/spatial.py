"""Maps as rows of positions, and 1x1 convolutions on them without a copy of either layout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._dispatch import on_cpu


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
    if _convolves(rows.mT, weight):
        return project_columns(rows.mT, weight, bias).mT.contiguous()
    matrix = weight.mT.expand(rows.shape[0], -1, -1)
    return torch.bmm(rows, matrix) if bias is None else torch.baddbmm(bias, rows, matrix)


def project_to_map(rows: Tensor, linear: nn.Linear, size: tuple[int, ...]) -> Tensor:
    """The 1x1 convolution `linear` of rows (B, N, C), written as a contiguous map (B, F, *size)."""
    return project_columns(rows.mT, linear.weight, linear.bias).unflatten(2, size)


def project_columns(columns: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 1x1 convolution `weight` (F, C), `bias` (F) of columns (B, C, N): contiguous (B, F, N), whatever the strides of `columns`."""
    if _convolves(columns, weight):
        return F.conv1d(columns, weight[:, :, None], bias)
    matrix = weight.expand(columns.shape[0], -1, -1)
    return torch.bmm(matrix, columns) if bias is None else torch.baddbmm(bias[:, None], matrix, columns)


def _convolves(columns: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's convolution takes `columns` as they lie and is faster than the matrix product: 1.3 to 1.6 times for so many channels."""
    outer, inner = weight.shape
    return on_cpu(columns) and columns.dtype == torch.float32 and columns.stride(2) == 1 and inner >= 256 and outer >= 64


def project_gather(columns: Tensor, maps: Tensor, weight: Tensor | None = None) -> Tensor:
    """Descriptors of a map: its columns (B, C, N), projected by `weight` (F, C), summed with each of `maps` (B, S, N): (B, F, S).

    The projection comes first or last, whichever is fewer products: it commutes with the sum.
    """
    if weight is None:
        return torch.bmm(columns, maps.mT)
    if _projects_descriptors(weight.shape[1], weight.shape[0], maps.shape[1]):
        return project_columns(torch.bmm(columns, maps.mT), weight)
    return torch.bmm(project_columns(columns, weight), maps.mT)


def project_distribute(descriptors: Tensor, maps: Tensor, weight: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """The way back: every position's mixture (B, F, N), by `maps` (B, S, N), of descriptors (B, C, S), projected by `weight` (F, C).

    `onto` (B, F, N) is added. The projection comes first or last, whichever is fewer products.
    """
    if weight is not None and not _projects_descriptors(weight.shape[0], weight.shape[1], maps.shape[1]):
        mixed = project_columns(torch.bmm(descriptors, maps), weight)
        return mixed if onto is None else onto + mixed
    if weight is not None:
        descriptors = project_columns(descriptors, weight)
    return torch.bmm(descriptors, maps) if onto is None else torch.baddbmm(onto, descriptors, maps)


def _projects_descriptors(outer: int, inner: int, count: int) -> bool:
    """Whether the map of `outer` channels meets `count` descriptors at once, without passing `inner` channels on the way."""
    return outer * count <= inner * (outer + count)


def project_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear on contiguous (R, S, C). On CPU through oneDNN's convolution: 1.3 to 2 times as fast as the matrix product."""
    if not on_cpu(x):
        return F.linear(x, weight, bias)
    image = x.view(1, *x.shape).permute(0, 3, 1, 2)  # not x.permute(2, 0, 1)[None]: its strides are not those of channels_last
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[0]
