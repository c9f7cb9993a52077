"""Losses on the attention weights of a whole caption, (B, T, L): T steps, L locations. Xu et al., "Show, Attend and Tell", arXiv:1502.03044."""

from typing import Literal

import torch
from torch import Tensor

from ...errors import require, require_type
from ...validate import check_floating, check_mask, check_option
from .._precision import at_least_float32, full_precision
from ..location_draw import check_locations

REDUCTIONS = ("paper", "official", "mean")


def doubly_stochastic_loss(
    weights: Tensor, weight: float = 1.0, time_mask: Tensor | None = None, reduction: Literal["paper", "official", "mean"] = "paper"
) -> Tensor:
    """`weight` times (1 - sum over steps of the weights)^2: every location of a picture is to be looked at once in a caption.

    Args:
        weights: (B, T, L), as attention returns them.
        weight: factor of the loss.
        time_mask: (B, T), False for steps after a caption's end, which then count as zero weights. The authors' code counts them as they are.
        reduction: "paper", mean over captions of the sum over locations; "official", sum over captions of the mean over locations, what the
            authors' code computes, so that the loss grows with the batch; "mean", over both.
    """
    _check_weights(weights, "weights")
    check_mask(time_mask, *weights.shape[:2], name="time_mask")
    check_option(reduction, REDUCTIONS, "reduction")
    with full_precision(weights):
        weights = weights.to(at_least_float32(weights))
        weights = weights if time_mask is None else weights.masked_fill(~time_mask[..., None], 0.0)
        missing = (1 - weights.sum(1)).square()
        match reduction:
            case "paper":
                return weight * missing.sum(1).mean()
            case "official":
                return weight * missing.mean(1).sum()
        return weight * missing.mean()


def hard_attention_loss(
    weights: Tensor | None,
    indices: Tensor | None,
    cost: Tensor,
    baseline: Tensor | float,
    *,
    time_mask: Tensor | None = None,
    reward_scale: float = 0.1,
    entropy_weight: float = 0.002,
    mask_steps: bool = False,
    sum_cost: bool = True,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The REINFORCE surrogate of hard attention, whose gradient trains what scores the locations, and the new baseline.

        reward_scale sum_nt (C_n - b) log a_nt[i_nt] + entropy_weight sum_nti a_nti log a_nti,   C_n = mean_t c_nt,   b' = 0.9 b + 0.1 mean c

    To be added to the loss that the costs themselves make; costs and baseline are constants here. Sums over captions and steps, not means.

    Args:
        weights: (B, T, L), the probabilities of the locations; None with `log_weights`.
        indices: (B, T), the locations drawn, -1 where there was none; None after an expected context, which leaves the entropy alone.
        cost: (B, T), -log p of each word.
        baseline: what a caption's cost is expected to be, one number.
        time_mask: (B, T), False for steps after a caption's end: they cost nothing.
        reward_scale, entropy_weight: factors of the two terms.
        mask_steps: leave those steps out of everything, and take means over real steps. The authors' code takes them over all T.
        sum_cost: False rewards each step by its own cost, without baseline.
        log_weights: (B, T, L), from `HardAttention.log_weights`, in place of `weights`: weights too small for their precision still learn.
    """
    require((weights is None) != (log_weights is None), "give either weights or log_weights, got {}", "neither" if weights is None else "both")
    given, name = (weights, "weights") if log_weights is None else (log_weights, "log_weights")
    assert given is not None
    _check_weights(given, name)
    b, t, locations = given.shape
    check_floating(cost, "cost")
    require(tuple(cost.shape) == (b, t), "cost must have shape {}, one number for each step of {}, got {}", (b, t), name, tuple(cost.shape))
    check_mask(time_mask, b, t, name="time_mask")
    require_type(isinstance(baseline, Tensor | int | float), "baseline must be a number or a tensor of one, got {}", type(baseline).__name__)
    if isinstance(baseline, Tensor):
        require(baseline.numel() == 1, "baseline must be one number, got a tensor of {}", tuple(baseline.shape))
    if indices is not None:
        check_locations(indices, locations, (b, t))

    with full_precision(given), torch.no_grad():
        dtype = at_least_float32(given, cost)
        cost = cost.to(dtype) if time_mask is None else cost.to(dtype).masked_fill(~time_mask, 0.0)
        baseline = torch.as_tensor(baseline, dtype=dtype, device=cost.device)
        real = time_mask.to(dtype) if mask_steps and time_mask is not None else torch.ones_like(cost)
        new_baseline = 0.9 * baseline + 0.1 * cost.sum() / real.sum().clamp_min(1)
        reward = cost.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1) - baseline if sum_cost else cost
        reward = reward_scale * reward * real
    with full_precision(given):
        given = given.to(dtype)
        if log_weights is None:
            logs = torch.where(given > 0, given, 1.0).log()  # a weight of zero passes no gradient, and no NaN
            probabilities = given
        else:
            logs, probabilities = torch.where(given.isneginf(), 0.0, given), given.exp()
        loss = entropy_weight * ((probabilities * logs).sum(2) * real).sum()
        if indices is not None:
            drawn = logs.gather(2, indices.clamp_min(0)[..., None])[..., 0]
            loss = loss + (reward * drawn.masked_fill(indices < 0, 0.0)).sum()
    return loss, new_baseline


def _check_weights(weights: Tensor, name: str) -> None:
    check_floating(weights, name)
    require(weights.ndim == 3, "{} must be (batch, steps, locations), got {} axes: {}", name, weights.ndim, tuple(weights.shape))
