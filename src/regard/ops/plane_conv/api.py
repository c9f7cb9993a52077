"""Convolution to one plane: the form is chosen here."""

import torch
from torch import Tensor

from .. import _dispatch
from . import columns, reference

_dispatch.register("plane_conv", "columns")


def plane_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv2d of x (B, P, H, W) with weight (1, P, k, k), k odd, and bias (1,), padded to the same size: (B, 1, H, W)."""
    if torch.compiler.is_compiling() or not _dispatch.on_cpu(x):
        automatic, why = "reference", "the library's convolution"
    else:
        automatic, why = "columns", "the CPU convolution's backward is slow for so few planes"
    impl = _dispatch.choose("plane_conv", automatic, why)
    return (columns if impl == "columns" else reference).plane_conv(x, weight, bias)
