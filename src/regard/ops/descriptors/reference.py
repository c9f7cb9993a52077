"""The definition. The softmax over positions in at least float32."""

import torch
from torch import Tensor

from .._precision import at_least_float32


def double_attention(
    x: Tensor, wb: Tensor, bb: Tensor, wv: Tensor, bv: Tensor, weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gather = (torch.matmul(wb, x) + bb[:, None]).softmax(2, dtype=at_least_float32(x)).to(x.dtype)
    distribute = (torch.matmul(wv, x) + bv[:, None]).softmax(1).to(x.dtype)
    descriptors = torch.matmul(weight, torch.matmul(x, gather.mT)) + bias[:, None]
    out = torch.matmul(descriptors, distribute)
    return (x + out if residual else out), gather, distribute
