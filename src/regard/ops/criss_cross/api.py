"""Criss-cross attention: the way of computing chosen. q, k (B, *space, d), v (B, *space, C) of two or three axes, which the caller has checked."""

import torch
from torch import Tensor

from .. import _dispatch
from . import lines, reference

_dispatch.register("criss_cross", "lines")


def criss_cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax over the cross of q . k, times v: (B, *space, C). Scores and softmax in float32 at least; no scaling."""
    impl = _dispatch.choose("criss_cross", *_choose(q))
    if impl == "lines":
        return lines.criss_cross(q, k, v)
    return reference.gather(criss_cross_weights(q, k).to(v.dtype), v)


def criss_cross_weights(q: Tensor, k: Tensor) -> Tensor:
    """(B, *space, sum of the sides): along each axis in turn, zero for the pixel itself on all axes but the last."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return reference.weights(q.to(wide), k.to(wide)).to(q.dtype)


def _choose(q: Tensor) -> tuple[str, str]:
    if q.ndim != 4:
        return "reference", "three axes"
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "reference", "plain operations are what compilers and transforms need"
    if not _dispatch.on_cpu(q) or q.dtype not in (torch.float32, torch.float64):
        return "reference", f"{q.dtype} on {q.device.type}"
    return "lines", "on CPU rows and columns are views of (H, B, W, C) storage, and the two branches share one buffer"
