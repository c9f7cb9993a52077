"""The definitions, written out."""

import torch
from torch import Tensor


def amax(x: Tensor, dim: int) -> Tensor:
    return x.amax(dim)


def attention_pool(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (B, C, N), weight (C,), bias (1,) or None -> (B, C), (B, N). Softmax in at least float32."""
    logits = torch.matmul(weight, x)
    if bias is not None:
        logits = logits + bias
    attention = logits.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype)
    return torch.matmul(x, attention.unsqueeze(-1)).squeeze(-1), attention
