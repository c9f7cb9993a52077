"""Norms by option, the check that a BatchNorm can work, and layers that start at zero."""

from collections.abc import Callable
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import require

# How mechanisms take a norm: BatchNorm, none, or any callable features -> module.
Norm = Literal["batch"] | Callable[[int], nn.Module] | None

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def make_norm(norm: Norm, features: int, dims: int = 2, *, eps: float = 1e-5, momentum: float = 0.1, device=None, dtype=None) -> nn.Module:
    """The norm over `features` channels of maps with `dims` spatial axes (0: of vectors)."""
    require(norm in ("batch", None) or callable(norm), "norm={!r} must be 'batch', None, or a callable features -> module", norm)
    if norm is None:
        return nn.Identity()
    if callable(norm):
        return norm(features).to(device=device, dtype=dtype)
    return _BATCH_NORMS[dims](features, eps=eps, momentum=momentum, device=device, dtype=dtype)


def check_batch_statistics(norm: nn.Module, values: int, what: str, option: str = "norm") -> None:
    """A BatchNorm in training needs more than one value per channel; `values` is how many it gets."""
    if isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None):
        require(
            values > 1,
            "BatchNorm in training cannot normalise {}; call module.eval(), use a larger batch, "
            "or make the module with {}=None or {}=lambda features: torch.nn.GroupNorm(1, features)",
            what,
            option,
            option,
        )


def zero_init_(layer: nn.Module) -> None:
    """Weight and bias of a layer (a convolution, a linear map, a norm) to zero, so that a residual branch starts as nothing."""
    for name in ("weight", "bias"):
        parameter = getattr(layer, name, None)
        if parameter is not None:
            nn.init.zeros_(parameter)
