"""The definition, written out."""

import torch
from torch import Tensor


def outer_product(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    return (torch.einsum("bsic,bsjd->bijcd", a, b).flatten(3) @ weight.mT + bias) * factor.unsqueeze(-1)
