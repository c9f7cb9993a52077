"""Distance pooling: precision settled, the implementation chosen."""

import torch
from torch import Tensor

from ...errors import require
from .. import _dispatch
from .._precision import at_least_float32, full_precision
from . import reference, tiles

_dispatch.register("distance_pool", "tiles")

SMALL = 2**18  # weights, B N^2, that are simply stored


def distance_pool(
    x: Tensor, log_w: Tensor, sharpness: Tensor, grid: tuple[int, int] | None = None, *, window: int | None = None, causal: bool = False
) -> Tensor:
    """y_i = sum_j p_ij x_j, p_i = softmax_j(log_w_j - sharpness_i d_ij^2), d the distance on a grid.

    Args:
        x: (B, N, C).
        log_w: log-weights of the keys, at most 0, (B, N); `LOWEST` for a key that is not there.
        sharpness: 1 / (2 sigma^2) of the queries, above 0, (B, N).
        grid: (height, width) of the row-major positions; None means (1, N), a sequence.
        window: largest distance along each axis; None for all pairs.
        causal: only keys j <= i; sequences alone.

    Returns:
        (B, N, C) in the dtype of `x`; the weights are computed in float32 at least. Without a window, keys whose weights together stay below the
        rounding error may be left out. What a query gets whose own key is not there is finite and means nothing.
    """
    grid = (1, x.shape[1]) if grid is None else grid
    require(not causal or grid[0] == 1, "causal=True is for sequences, got a grid of {}", grid)
    with full_precision(x):
        log_w, sharpness = (t.to(at_least_float32(log_w)) for t in (log_w, sharpness))
        if _dispatch.choose("distance_pool", *_automatic(x)) == "reference":
            return reference.pool(x, log_w, sharpness, grid, window, causal)
        return tiles.distance_pool(x, log_w, sharpness, grid[0], -1 if window is None else window, causal)


def distance_weights(
    log_w: Tensor,
    sharpness: Tensor,
    grid: tuple[int, int] | None = None,
    *,
    window: int | None = None,
    causal: bool = False,
    queries: Tensor | None = None,
) -> Tensor:
    """The weights p of `distance_pool`, (B, N, N); with `queries` (R) those rows alone, (B, R, N), from the sharpness (B, R) of these queries."""
    log_w, sharpness = (t.to(at_least_float32(log_w)) for t in (log_w, sharpness))
    return reference.weights(log_w, sharpness, (1, log_w.shape[1]) if grid is None else grid, window, causal, queries)


def _automatic(x: Tensor) -> tuple[str, str]:
    if isinstance(x.numel(), torch.SymInt):
        return "tiles", "a graph with a free size must not depend on it"
    if x.shape[0] * x.shape[1] ** 2 <= SMALL:
        return "reference", "so few weights are simply stored"
    return "tiles", "the N x N weights are never stored"
