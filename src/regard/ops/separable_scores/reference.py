"""The definition, written out."""

import torch
from torch import Tensor


def weights(q: Tensor, k: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """softmax over the keys (a, b) of q_p . k_ab + row_pa + column_pb: (B, H, N, A C)."""
    return torch.softmax(q @ k.mT + (row[..., :, None] + column[..., None, :]).flatten(-2), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return weights(q, k, row, column) @ v
