"""The sum of branches: the form is chosen here."""

import torch
from torch import Tensor

from .. import _dispatch
from . import chunked, reference

_dispatch.register("branch_sum", "chunked")


def branch_sum(u: Tensor, weights: Tensor) -> Tensor:
    """(B, R C, H, W), the branches one after the other, and weights (B, R, C) -> (B, C, H, W)."""
    if torch.compiler.is_compiling():
        name, why = "reference", "the compiler fuses the passes itself"
    elif _dispatch.on_cpu(u) and u.dtype == weights.dtype and u.dtype in (torch.float32, torch.float64):
        name, why = "chunked", "the products stay in the cache of a CPU"
    else:
        name, why = "reference", "the chunked form is arranged for CPU kernels of one full precision"
    return chunked.branch_sum(u, weights) if _dispatch.choose("branch_sum", name, why) == "chunked" else reference.branch_sum(u, weights)
