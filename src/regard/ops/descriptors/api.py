"""Attention to descriptors and back: the form is chosen here."""

import torch
from torch import Tensor

from .. import _dispatch
from . import fused, reference

_dispatch.register("double_attention", "fused")


def double_attention(
    x: Tensor, to_gather: tuple[Tensor, Tensor], to_distribute: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight (x b') + bias) v [+ x], with b = softmax_n(Wb x), v = softmax_k(Wv x).

    Args:
        x: (B, C, N).
        to_gather, to_distribute: weight (S, C) and bias (S,) of the two projections.
        weight, bias: (F, C) and (F,), what the descriptors pass through.
        residual: add x; F is then C.

    Returns:
        (B, F, N), b and v, each (B, S, N).
    """
    kind = x.device.type
    inside = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    half = inside or x.dtype not in (torch.float32, torch.float64)
    if half or not _dispatch.on_cpu(x):
        automatic, why = "reference", "the fused form is arranged for CPU kernels in single precision"
    else:
        automatic, why = "fused", "on a CPU every pass over the map counts"
    impl = fused if _dispatch.choose("double_attention", automatic, why) == "fused" else reference
    return impl.double_attention(x, *to_gather, *to_distribute, weight, bias, residual)
