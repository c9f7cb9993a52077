"""Two layers with a ReLU between: precision settled, the implementation chosen."""

import torch
from torch import Tensor

from .. import _dispatch
from .._linear import linear
from .._precision import full_precision
from . import chunked, reference

_dispatch.register("feed_forward", "chunked", "kept")
KEPT = 2**24  # numbers of the wide layer: beyond 64 MB storing it costs the CPU as much as computing it again


def feed_forward(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> Tensor:
    """W2 ReLU(W1 x + b1) + b2 of every element of x (..., C), (..., D)."""
    given = x.dtype
    with full_precision(x):
        dtype = torch.promote_types(x.dtype, weight_1.dtype)
        tensors = [t.to(dtype) for t in (x, weight_1, bias_1, weight_2, bias_2)]
        impl = _dispatch.choose("feed_forward", *_automatic(tensors))
        if impl == "kept":
            x, weight_1, bias_1, weight_2, bias_2 = tensors
            return linear(linear(x, weight_1, bias_1).relu(), weight_2, bias_2).to(given)
        return (reference if impl == "reference" else chunked).feed_forward(*tensors).to(given)


def _automatic(tensors: list[Tensor]) -> tuple[str, str]:
    x, wide = tensors[0], tensors[0].numel() * tensors[1].shape[0]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if _dispatch.on_cpu(x) and training and not isinstance(wide, torch.SymInt) and wide <= KEPT * x.shape[-1]:
        return "kept", "training, and the wide layer is small: computing it again would take a sixth of the time"
    return "chunked", "some elements at a time, computed again in the backward pass: the wide layer is never stored"
