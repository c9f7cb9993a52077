"""Attention that can be looked at: the weights of chosen positions, while the module keeps its fast path."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import require, require_type
from .mechanism import Mechanism


def attend_rows(module: Mechanism, x: Tensor, *, queries: Sequence[int] | Sequence[tuple[int, ...]] | Tensor, **inputs: Any) -> Tensor:
    """The weights of chosen positions of `x` alone, at a cost linear in the number of keys: nothing N x M is formed.

    >>> import regard, torch
    >>> block, x = regard.create("multi_head", dim=64, num_heads=4), torch.randn(1, 10_000, 64)
    >>> regard.attend_rows(block, x, queries=[17, -1]).shape
    torch.Size([1, 4, 2, 10000])

    Args:
        module: a mechanism with the capability "rows" (`regard.ids(can="rows")`).
        x: its input: tokens (batch, positions, dim), or a map (batch, channels, *space).
        queries: positions along the sequence, negative ones from the end; for a map row-major numbers, or one (row, column) pair for each.
        **inputs: the masks, context and other arguments that its forward takes.

    Returns:
        What `return_weights=True` gives, for these queries: (batch, heads, queries, keys), without heads where the mechanism has none.

    Raises:
        RegardError: the mechanism has no such weights, or a query lies outside `x`.
    """
    require_type(isinstance(module, Mechanism), "attend_rows looks at a mechanism of regard, got {}", type(module).__name__)
    id, can = module.card.id, module.card.capabilities(module)
    require("rows" in can, "{} gives no rows of weights with these options; those that do: regard.ids(can='rows')", id)
    require_type(isinstance(x, Tensor), "x must be a tensor, got {}", type(x).__name__)
    known = [name for name in inspect.signature(module.forward).parameters if name != "x" and not name.startswith("return_")]
    unknown = sorted(set(inputs) - set(known))
    require_type(not unknown, "the forward of {} takes no {}; beside x it takes {}", id, ", ".join(unknown), ", ".join(known) or "nothing")
    inputs = {name: value for name, value in inputs.items() if value is not None}
    able = inspect.signature(module.weights).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in able.values()):
        refused = sorted(set(inputs) - set(able))
        require(not refused, "the weights of {} do not take {}; leave it out", id, ", ".join(refused))
    space = x.shape[2:] if getattr(module, "layout", module.card.layout) == "map" else x.shape[1:2]
    return module.weights(x, queries=_positions(queries, tuple(space)).to(x.device), **inputs)


def _positions(queries: Sequence[int] | Sequence[tuple[int, ...]] | Tensor, space: tuple[int, ...]) -> Tensor:
    """Row-major positions in `space`, all of them checked."""
    index = torch.as_tensor(queries)
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    require_type(whole, "queries must be whole numbers, got {}", index.dtype)
    index = index.cpu()
    if index.ndim == 2 and index.shape[1] == len(space) > 1:
        sizes = torch.tensor(space)
        require(bool(((index >= -sizes) & (index < sizes)).all()), "queries={} lie outside a map of {}", index.tolist(), space)
        index = index % sizes
        flat = index[:, 0]
        for axis, size in enumerate(space[1:], 1):
            flat = flat * size + index[:, axis]
        return flat
    count = torch.Size(space).numel()
    require(index.ndim == 1, "queries must be a list of positions, got shape {}", tuple(index.shape))
    require(bool(((index >= -count) & (index < count)).all()), "queries={} lie outside the {} positions of x", index.tolist(), count)
    return index % count
