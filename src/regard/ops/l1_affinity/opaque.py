"""The chunked way as an operator with its own backward: whole to torch.compile and torch.export, and counted."""

from typing import Any

from torch import Tensor

from .._operator import operator
from . import chunked


def _forward(
    q: Tensor,
    k: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    u: Tensor | None,
    beta: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    pairs: Tensor | None,
    causal: bool,
    factor: float,
    center: str,
) -> tuple[Tensor, Tensor]:
    return chunked.forward(chunked.Problem(q, k, a, b, v, u, beta, rows, keys, pairs, causal, factor, center))


def _backward(
    d_out: Tensor,
    d_back: Tensor,
    q: Tensor,
    k: Tensor,
    a: Tensor,
    b: Tensor,
    v: Tensor,
    u: Tensor | None,
    beta: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    pairs: Tensor | None,
    causal: bool,
    factor: float,
    center: str,
) -> list[Tensor]:
    return list(chunked.backward(d_out, d_back, chunked.Problem(q, k, a, b, v, u, beta, rows, keys, pairs, causal, factor, center)))


def _like(q: Tensor, k: Tensor, a: Tensor, b: Tensor, v: Tensor, u: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    out = v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    return out, v.new_empty(0) if u is None else u.new_empty(*v.shape[:3], u.shape[3])


def _flops(q: Any, k: Any, a: Any, b: Any, v: Any, u: Any, *options: Any) -> int:
    """The products alone; the distances, 3 N M d additions and absolute values, are element-wise work."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3] + (u[3] if u is not None else 0))


def _backward_flops(d_out: Any, d_back: Any, q: Any, k: Any, a: Any, b: Any, v: Any, u: Any, *options: Any) -> int:
    """The scores once more, and the gradients of both factors of every product."""
    return 2 * _flops(q, k, a, b, v, u) + 2 * q[0] * q[1] * q[2] * k[2] * q[3]


l1_attention = operator(
    "l1_attention", _forward, _backward, _like, tensors=10, wanted=range(7), outputs=2, flops=_flops, backward_flops=_backward_flops
)
