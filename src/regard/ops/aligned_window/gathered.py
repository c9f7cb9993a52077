"""The rows gathered for some queries at a time, of all samples, and never kept; no size depends on the data, so nothing waits for the device."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import positions

FLOATS = 2**25  # gathered at a time


def _parts(start: Tensor, count: int, width: int, keys: int) -> Iterator[tuple[slice, Tensor]]:
    """Queries, samples one after the other, and the positions of their keys."""
    first = torch.arange(start.shape[0], device=start.device) * keys
    at = (positions(start, count, keys) + first[:, None, None]).flatten(0, 1)
    rows = max(1, FLOATS // (count * width))
    for low in range(0, at.shape[0], rows):
        yield slice(low, low + rows), at[low : low + rows]


def dots(q: Tensor, k: Tensor, start: Tensor, count: int) -> Tensor:
    out, queries, keys = q.new_empty(start.numel(), count), q.flatten(0, 1), k.flatten(0, 1)
    for some, at in _parts(start, count, k.shape[2], k.shape[1]):
        torch.bmm(F.embedding(at, keys), queries[some].unsqueeze(-1), out=out[some].unsqueeze(-1))
    return out.unflatten(0, start.shape)


def sums(w: Tensor, v: Tensor, start: Tensor) -> Tensor:
    out, weights, values = v.new_empty(start.numel(), v.shape[2]), w.flatten(0, 1), v.flatten(0, 1)
    for some, at in _parts(start, w.shape[2], v.shape[2], v.shape[1]):
        torch.bmm(weights[some].unsqueeze(1), F.embedding(at, values), out=out[some].unsqueeze(1))
    return out.unflatten(0, start.shape)


def spread(w: Tensor, q: Tensor, start: Tensor, keys: int) -> Tensor:
    out, weights, queries = q.new_zeros(q.shape[0] * keys, q.shape[2]), w.flatten(0, 1), q.flatten(0, 1)
    for some, at in _parts(start, w.shape[2], q.shape[2], keys):
        out.index_add_(0, at.flatten(), (weights[some].unsqueeze(-1) * queries[some].unsqueeze(1)).flatten(0, 1))
    return out.unflatten(0, (-1, keys))
