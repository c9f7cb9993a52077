"""Cutting a sequence into chunks; shared by the implementations."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def split(t: Tensor, n: int, size: int, fill: float = 0.0) -> Tensor:
    """(B, H, n, w) -> (B, H, chunks, size, w), padded at the end."""
    # Compiled, two chunks at least are empty: a free length then never meets the special chunk counts 0 and 1.
    chunks = n // size + 3 if torch.compiler.is_compiling() else -(-n // size)
    pad = chunks * size - n
    return (F.pad(t, (0, 0, 0, pad), value=fill) if pad else t).unflatten(2, (chunks, size))


def chunk_size(features: int, values: int) -> int:
    """Positions in a causal chunk: the power of two from 64 to 256 at which the sums of the chunks are no larger than what they sum up."""
    wanted = features * values / (features + values)
    return next((size for size in (64, 128) if size >= wanted), 256)


def fitted(size: int, n: int) -> int:
    """A sequence shorter than a chunk is one chunk; compiled, its length may be free."""
    return size if torch.compiler.is_compiling() else min(size, n)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast switched off: sums over many positions and exponentials stay in the precision of their inputs."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
