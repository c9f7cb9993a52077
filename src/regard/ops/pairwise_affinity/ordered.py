"""Additive-relu affinity in O((N + M) log M): the keys that a query reaches are the first ones in descending order of b.

sum_j relu(a_i + b_j) v_j = a_i V[k_i] + U[k_i],   V, U prefix sums of v and b v in that order,   k_i = #{j: b_j > -a_i}
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 32 << 20


def pairwise_relu(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    size = v.shape[0] * v.shape[1] * v.shape[2] * 2 * v.element_size()
    if torch.compiler.is_compiling() or size <= CHUNK_BYTES:
        return _relu(a, b, v)
    rows = max(1, v.shape[0] * CHUNK_BYTES // size)
    return torch.cat([_relu(*part) for part in zip(a.split(rows), b.split(rows), v.split(rows), strict=True)])


def _relu(a: Tensor, b: Tensor, v: Tensor) -> Tensor:
    (batch, n), (m, width) = a.shape, v.shape[1:]
    center = b.detach().mean(1, keepdim=True)  # small numbers on both sides of the threshold: less cancellation between the two sums
    a, b = a + center, b - center
    negated, order = (-b).sort(1)
    first = torch.arange(batch, device=a.device)[:, None]
    v = v.flatten(0, 1).index_select(0, (order + first * m).flatten()).view(batch, m, width)
    sums = F.pad(torch.cat((v, -negated[:, :, None] * v), 2).cumsum(1), (0, 0, 1, 0))
    reached = torch.searchsorted(negated.detach(), a.detach().contiguous())
    sums = sums.flatten(0, 1).index_select(0, (reached + first * (m + 1)).flatten()).view(batch, n, 2 * width)
    return torch.addcmul(sums[..., width:], a[:, :, None], sums[..., :width]) / m
