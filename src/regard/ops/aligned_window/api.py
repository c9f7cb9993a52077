"""Runs of keys: precision settled, the implementation chosen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import opaque, reference

_dispatch.register("aligned_window", "bands", "gathered")
SMALL = 2**18  # floats, 1 MB


def run_dots(q: Tensor, k: Tensor, start: Tensor, count: int) -> Tensor:
    """s_nj = q_n . k_(start_n + j), j < count.

    Args:
        q, k: (B, N, d), (B, M, d).
        start: whole numbers (B, N). A position outside k is read as the nearest inside; hide what comes of it.

    Returns:
        (B, N, count), in float32 at least.
    """
    with full_precision(q):
        q, k = (t.to(at_least_float32(q, k)) for t in (q, k))
        impl = _choose(q, count, k.shape[2])
        return reference.dots(q, k, start, count) if impl == "reference" else opaque.dots(q, k, start, count, impl == "bands")


def run_sums(w: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """y_n = sum_j w_nj v_(start_n + j), (B, N, e) in float32 at least; w (B, N, count), v (B, M, e), start as in `run_dots`."""
    with full_precision(w):
        w, v = (t.to(at_least_float32(w, v)) for t in (w, v))
        impl = _choose(w, w.shape[2], v.shape[2])
        return reference.sums(w, v, start) if impl == "reference" else opaque.sums(w, v, start, impl == "bands")


def gather_runs(x: Tensor, start: Tensor, count: int) -> Tensor:
    """The rows themselves: x (B, M, e) -> (B, N, count, e)."""
    at = reference.positions(start, count, x.shape[1])
    first = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    return F.embedding(at + first[:, None, None], x.flatten(0, 1))


def _choose(x: Tensor, count: int, width: int) -> str:
    if torch._C._are_functorch_transforms_active():
        return _dispatch.choose("aligned_window", "reference", "function transforms take plain operations alone")
    if not _dispatch.on_cpu(x):
        return _dispatch.choose("aligned_window", "gathered", "the sizes of bands would have to be read from the device")
    floats = x.shape[0] * x.shape[1] * count * width
    if isinstance(floats, int) and floats <= SMALL:
        return _dispatch.choose("aligned_window", "gathered", "the windows are small enough to be gathered at once")
    return _dispatch.choose("aligned_window", "bands", "dense products with stretches of keys that neighbouring queries share")
