"""What callers give for a graph, checked before any work."""

import torch
from torch import Tensor

from ...errors import require, require_type
from ...validate import check_floating


def knowable(x: Tensor) -> bool:
    """Whether a decision may depend on the values of `x`: not while traced, batched by vmap, or without any values."""
    return not (torch.compiler.is_compiling() or x.is_meta or torch._C._are_functorch_transforms_active())


def check_matrix(given: Tensor, name: str, x: Tensor | None = None, *, heads: int | None = None, signed: bool = False) -> None:
    """`given` must be (N, N), (B, N, N), or with `heads` also (B, heads, N, N), for the nodes `x` (B, N, D); dense or sparse."""
    require_type(isinstance(given, Tensor), "{} must be a tensor, got {}", name, type(given).__name__)
    if name != "adjacency" or given.dtype != torch.bool:
        check_floating(given, name)
    shape, most = tuple(given.shape), 3 if heads is None else 4
    require(2 <= given.ndim <= most, "{} must have 2 to {} axes, got {}", name, most, shape)
    require(shape[-1] == shape[-2], "{} must be square in its last two axes, got {}", name, shape)
    require(x is None or shape[-1] == x.shape[1], "{} is for {} nodes but x has {}", name, shape[-1], x.shape[1] if x is not None else 0)
    _check_batch(given, name, x)
    require(given.ndim < 4 or shape[1] in (1, heads), "{} has {} heads but num_heads={}", name, shape[1:2], heads)
    if not signed:
        _check_signs(given, name)


def check_frequency(given: Tensor, x: Tensor) -> None:
    """`given` must be (N, r) or (B, N, r), not negative, for the nodes `x` (B, N, D)."""
    check_floating(given, "frequency")
    require(given.ndim in (2, 3), "frequency must be (nodes, rank) or (batch, nodes, rank), got {}", tuple(given.shape))
    require(given.shape[-2] == x.shape[1], "frequency is for {} nodes but x has {}", given.shape[-2], x.shape[1])
    _check_batch(given, "frequency", x)
    _check_signs(given, "frequency")


def _check_batch(given: Tensor, name: str, x: Tensor | None) -> None:
    if x is not None:
        fits = given.ndim == 2 or given.shape[0] in (1, x.shape[0])
        require(fits, "{} has batch {} but x has batch {}", name, given.shape[0], x.shape[0])


def _check_signs(given: Tensor, name: str) -> None:
    if given.layout != torch.strided:
        given = given.to_sparse_coo().coalesce().values()
    if knowable(given) and given.dtype != torch.bool and given.numel():
        require(not bool((given < 0).any()), "{} must not be negative, its smallest entry is {}", name, given.min())
