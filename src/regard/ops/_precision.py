"""Leaving autocast for arithmetic that half precision would spoil: long sums, exponentials of matrices."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A `with` block in which operations on `x` run in the precision of their arguments."""
    kind = x.device.type
    inside = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if inside else nullcontext()


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: that of the tensors together, but no half precision."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
