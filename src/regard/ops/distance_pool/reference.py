"""The definition, written out."""

import torch
from torch import Tensor

LOWEST = -1e30  # log-weight of a key that is not there: finite, so that a row without any key is not NaN


def weights(log_w: Tensor, sharpness: Tensor, grid: tuple[int, int], window: int | None, causal: bool, queries: Tensor | None = None) -> Tensor:
    """softmax_j(log_w_j - sharpness_i d_ij^2) over the keys within the window, (B, R, N); `sharpness` is that of the R queries."""
    at = torch.arange(grid[0] * grid[1], device=log_w.device)
    asking = at if queries is None else queries
    across = (asking % grid[1])[:, None] - at % grid[1]
    down = torch.zeros_like(across) if grid[0] == 1 else (asking // grid[1])[:, None] - at // grid[1]
    scores = log_w[:, None] - sharpness[:, :, None] * (down.square() + across.square()).to(log_w.dtype)
    if window is not None:
        scores = scores.masked_fill((down.abs() > window) | (across.abs() > window), float("-inf"))
    if causal:
        scores = scores.masked_fill(across < 0, float("-inf"))
    return scores.softmax(-1)


def pool(x: Tensor, log_w: Tensor, sharpness: Tensor, grid: tuple[int, int], window: int | None, causal: bool) -> Tensor:
    return weights(log_w, sharpness, grid, window, causal).to(x.dtype) @ x
