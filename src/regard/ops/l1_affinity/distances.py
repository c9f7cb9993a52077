"""The gradient of L1 distances, twice as fast as that of torch.cdist on CPU; and their mean and its gradient without any pair, by sorting."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch


def _parts(pairs: int, rows: int, floats: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of (pairs, rows) with at most 2 MB of differences on CPU, `floats` of them a row."""
    limit = (1 << 19 if _dispatch.on_cpu(like) else 1 << 26) // max(floats, 1)
    p, r = max(1, limit // max(rows, 1)), min(max(1, limit), max(rows, 1))
    for i in range(0, pairs, p):
        for j in range(0, rows, r):
            yield slice(i, i + p), slice(j, j + r)


def _channels_first(x: Tensor) -> Tensor:
    """(B, H, N, d) -> (B H, d, N) in memory order."""
    return x.flatten(0, 1).mT.contiguous()


def distance_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a and b (B, H, N or M, d) from that of their distances (B, H, N, M); sign(0) = 0.

    Channel by channel, so that every operation runs along the keys.
    """
    shape, flat, a, b = a.shape, grad.flatten(0, 1), _channels_first(a), _channels_first(b)
    da, db = torch.empty_like(a), torch.zeros_like(b)
    for pairs, rows in _parts(len(a), a.shape[2], b.shape[1] * b.shape[2], a):
        part = (a[pairs, :, rows, None] - b[pairs, :, None]).sign_().mul_(flat[pairs, None, rows])
        da[pairs, :, rows] = part.sum(3)
        db[pairs] -= part.sum(2)
    return da.mT.unflatten(0, shape[:2]), db.mT.unflatten(0, shape[:2])


def mean_distance(a: Tensor, b: Tensor, rows: Tensor | None, keys: Tensor | None) -> Tensor:
    """The mean distance (B, H, 1, 1) of the a where `rows` (B, N) from the b where `keys` (B, M), without any pair: each channel is sorted.

    Between two neighbours in the common order lie (a to the left) (b to the right) + (b to the left) (a to the right) of the pairs.
    """
    n, m = a.shape[2], b.shape[2]
    values, order = torch.cat((a, b), 2).mT.contiguous().sort(-1)

    def left(mask: Tensor | None, size: int, before: int, after: int) -> Tensor:
        """How many of them are at or left of each place of the order."""
        ones = a.new_ones(1, size) if mask is None else mask.to(a.dtype)
        return F.pad(ones, (before, after))[:, None, None].expand(order.shape).gather(3, order).cumsum(3, dtype=torch.float64)

    of_a, of_b = left(rows, n, 0, m), left(keys, m, n, 0)
    across = of_a * (of_b[..., -1:] - of_b) + of_b * (of_a[..., -1:] - of_a)
    total = (values.diff(dim=-1) * across[..., :-1]).sum((2, 3), keepdim=True)
    count = of_a[:, :1, :1, -1:] * of_b[:, :1, :1, -1:]
    return (total / count.clamp_min(1)).to(a.dtype)


def mean_distance_backward(grad: Tensor, a: Tensor, b: Tensor, rows: Tensor | None, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of a and b from that of their mean distance (B, H, 1, 1), also by sorting; sign(0) = 0."""
    real_a, real_b = (x.new_ones(1, x.shape[2]) if mask is None else mask.to(x.dtype) for x, mask in ((a, rows), (b, keys)))
    grad = grad / (real_a.sum(1) * real_b.sum(1)).clamp_min(1)[:, None, None, None]
    return (grad * real_a[:, None, :, None] * _signs(a, b, real_b), grad * real_b[:, None, :, None] * _signs(b, a, real_a))


def _signs(x: Tensor, y: Tensor, real: Tensor) -> Tensor:
    """The sum over the real y of sign(x_i - y_j), channel by channel: as many as are smaller, less as many as are larger."""
    x, (values, order) = x.mT.contiguous(), y.mT.contiguous().sort(-1)
    left = F.pad(real[:, None, None].expand(order.shape).gather(3, order).cumsum(3), (1, 0))
    smaller, not_larger = (left.gather(3, torch.searchsorted(values, x, right=right)) for right in (False, True))
    return (smaller + not_larger - left[..., -1:]).mT
