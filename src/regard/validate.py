"""Checks of what users pass, done before any work: each names the argument, what it is and what it must be."""

from collections.abc import Sequence
from numbers import Integral

from torch import Tensor
from torch import bool as torch_bool

from .errors import require, require_type


def check_floating(x: object, name: str = "x") -> None:
    require_type(isinstance(x, Tensor), "{} must be a tensor, got {}", name, type(x).__name__)
    assert isinstance(x, Tensor)
    require_type(x.dtype.is_floating_point, "{} must be a floating-point tensor, got {}; convert with {}.float()", name, x.dtype, name)


def check_tokens(x: Tensor, dim: int, name: str = "x", option: str = "dim") -> None:
    """`x` must be (batch, positions, dim)."""
    check_floating(x, name)
    require(x.ndim == 3, "{} must be (batch, positions, {}), got {} axes: {}", name, dim, x.ndim, tuple(x.shape))
    require(x.shape[-1] == dim, "{} has width {} but this module was made with {}={}; {} is {}", name, x.shape[-1], option, dim, name, tuple(x.shape))


def check_context(x: Tensor, context: Tensor, dim: int) -> None:
    """`context` must be (batch, keys, dim) with the batch of `x`."""
    check_tokens(context, dim, "context", "context_dim")
    require(context.shape[0] == x.shape[0], "context has batch {} but x has batch {}", context.shape[0], x.shape[0])


def check_map(x: Tensor, channels: int, dims: int | None = 2, name: str = "x") -> None:
    """`x` must be (batch, channels, *space) with `dims` non-empty spatial axes; any number from one up when `dims` is None."""
    check_floating(x, name)
    axes = {1: "length", 2: "height, width", 3: "depth, height, width"}
    space = axes[dims] if dims else "*space"
    ok = x.ndim == dims + 2 if dims else x.ndim >= 3
    require(ok, "{} must be (batch, {}, {}), got {} axes: {}", name, channels, space, x.ndim, tuple(x.shape))
    require(
        x.shape[1] == channels,
        "{} has {} channels but this module was made with channels={}; {} is {}",
        name,
        x.shape[1],
        channels,
        name,
        tuple(x.shape),
    )
    require(min(x.shape[2:]) > 0, "{} has an empty spatial axis: {}", name, tuple(x.shape))


def check_mask(mask: Tensor | None, *shape: int, name: str = "key_mask") -> None:
    """`mask` must be None, or boolean of exactly this shape."""
    if mask is None:
        return
    check_bool(mask, name)
    require(tuple(mask.shape) == shape, "{} must have shape {}, got {}", name, shape, tuple(mask.shape))


def check_bool(mask: Tensor, name: str) -> None:
    require_type(isinstance(mask, Tensor), "{} must be a boolean tensor, got {}", name, type(mask).__name__)
    require_type(
        mask.dtype == torch_bool,
        "{} must be boolean (True = may be attended), got {}; use mask.bool(), or pass scores to add as attn_bias where the mechanism has it",
        name,
        mask.dtype,
    )


def check_broadcastable(mask: Tensor, shape: tuple[int, ...], name: str) -> None:
    """`mask` must broadcast to `shape` without enlarging it."""
    fits = mask.ndim <= len(shape) and all(m in (1, s) for m, s in zip(reversed(mask.shape), reversed(shape), strict=False))
    require(fits, "{} must broadcast to {}, got {}", name, shape, tuple(mask.shape))


def check_divisible(value: int, by: int, name: str, by_name: str) -> None:
    require(by > 0, "{}={} must be at least 1", by_name, by)
    require(value % by == 0, "{}={} is not divisible by {}={}", name, value, by_name, by)


def whole_numbers(value: object, name: str) -> tuple[int, ...]:
    """A sequence of sizes as a tuple: at least one, each a whole number from 1 up."""
    whole = isinstance(value, Sequence) and all(isinstance(n, Integral) and not isinstance(n, bool) for n in value)
    require_type(whole, "{}={!r} must be a sequence of whole numbers, such as (1, 2, 3)", name, value)
    assert isinstance(value, Sequence)
    require(len(value) > 0 and min(value) > 0, "{}={} must name at least one number, each at least 1", name, value)
    return tuple(int(n) for n in value)


def check_option(value: object, choices: tuple[object, ...], name: str) -> None:
    require(value in choices, "{}={!r} is not one of {}", name, value, choices)
