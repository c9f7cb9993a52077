"""What callers give, checked before any work."""

from torch import Tensor

from ...errors import require
from ...validate import check_broadcastable, check_floating
from .mixture import Mixture, per_key


def check_heads(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, N, d), k (B, H, M, d), v (B, H, M, dv)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(x, name)
        assert x is not None
        require(x.ndim == 4, "{} must be (batch, heads, positions, width), got {} axes: {}", name, x.ndim, tuple(x.shape))
    assert q is not None and k is not None and v is not None
    fit = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3] and k.shape[2] == v.shape[2]
    require(fit, "q {}, k {}, v {} must be (B, H, N, d), (B, H, M, d), (B, H, M, dv)", tuple(q.shape), tuple(k.shape), tuple(v.shape))
    return q, k, v


def check_mixture(q: Tensor, k: Tensor, v: Tensor, mixture: Mixture, *, uniform: tuple[bool, bool]) -> None:
    """The parts of a mixture fit q, k and v; `uniform`: alpha, beta must not differ from key to key."""
    (b, h, n, d), m, dv = q.shape, k.shape[2], v.shape[3]
    options = ("uniform_query_precision", "uniform_value_precision")
    for name, precision, same, option in zip(("alpha", "beta"), (mixture.alpha, mixture.beta), uniform, options, strict=True):
        require(not (same and per_key(precision)), "{} differs from key to key: make the module with {}=False", name, option)
        check_precision(precision, name, (b, h, m))
    if mixture.prior is not None:
        check_floating(mixture.prior, "prior")
        check_broadcastable(mixture.prior, (b, h, n, m), "prior")
    for name, shape in (("v_init", (b, h, n, dv)), ("q_pos", (n, m, d)), ("k_pos", (n, m, d)), ("v_pos", (n, m, dv))):
        if (t := getattr(mixture, name)) is not None:
            check_floating(t, name)
            require(t.shape == shape, "{} must have shape {}, got {}", name, shape, tuple(t.shape))


def check_precision(precision: float | Tensor | None, name: str, shape: tuple[int, ...] | None = None) -> None:
    """None, a number that is not negative, or a tensor that broadcasts to `shape`."""
    if isinstance(precision, Tensor):
        check_floating(precision, name)
        if shape is not None:
            check_broadcastable(precision, shape, name)
    elif precision is not None:
        require(precision >= 0, "{}={} is a precision: it must not be negative", name, precision)
