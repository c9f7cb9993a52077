"""The block forms as one operator with its own gradient."""

from typing import Any

from torch import Tensor

from .._operator import operator
from .._precision import full_precision
from . import linear, local
from .cuts import CPU_LIMIT
from .local import Inputs


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    hidden_keys: Tensor | None,
    hidden_pairs: Tensor | None,
    seed: Tensor | None,
    chunk: int,
    act: str,
    causal: bool,
    dropout: float,
) -> Inputs:
    number = 0 if seed is None else int(seed)
    return Inputs(q, k, v, bias, hidden_keys, hidden_pairs, number, chunk or max(v.shape[1], 1), act, causal, dropout)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    hidden_keys: Tensor | None,
    hidden_pairs: Tensor | None,
    lq: Tensor | None,
    lk: Tensor | None,
    seed: Tensor | None,
    chunk: int,
    reach: int,
    act: str,
    causal: bool,
    dropout: float,
) -> Tensor:
    given = _inputs(q, k, v, bias, hidden_keys, hidden_pairs, seed, chunk, act, causal, dropout)
    with full_precision(v):
        out = local.forward(given)
        if lq is not None and lk is not None:
            linear.forward(out, lq, lk, v, reach or max(v.shape[1], 1), causal)
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    hidden_keys: Tensor | None,
    hidden_pairs: Tensor | None,
    lq: Tensor | None,
    lk: Tensor | None,
    seed: Tensor | None,
    chunk: int,
    reach: int,
    act: str,
    causal: bool,
    dropout: float,
) -> list[Tensor]:
    given = _inputs(q, k, v, bias, hidden_keys, hidden_pairs, seed, chunk, act, causal, dropout)
    with full_precision(v):
        dq, dk, dv, dbias = local.backward(grad, given)
        dlq, dlk = grad.new_empty(0), grad.new_empty(0)
        if lq is not None and lk is not None:
            dlq, dlk = linear.backward(grad, lq, lk, v, dv, reach or max(v.shape[1], 1), causal)
    return [dq, dk, dv, dbias, dlq, dlk]


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


def _work(
    q: Any, k: Any, v: Any, bias: Any, keys: Any, pairs: Any, lq: Any, lk: Any, seed: Any, chunk: int, reach: int, act: str, causal: bool, *_: Any
):
    """Pairs that the CPU's blocks multiply, widths of q and v, and the multiplications of one product of the linear part."""
    (b, n, s), e = q, v[2]
    length, met = chunk or max(n, 1), 0
    for size, count in ((length, n // length), (n % length, 1)):
        met += count * sum((stop - first) * width for first, stop, width in local.spans(size, causal, CPU_LIMIT))
    return b * met, s, e, b * n * s * e if lq is not None else 0


def _flops(*given: Any) -> int:
    """Scores and values; sums, and what is read of them."""
    met, s, e, product = _work(*given)
    return 2 * (met * (s + e) + 2 * product)


def _backward_flops(grad: Any, *given: Any) -> int:
    """The scores again, and the gradients of both factors of each product; the sums again, and those of their two products."""
    met, s, e, product = _work(*given)
    return 2 * (met * (3 * s + 2 * e) + 5 * product)


# Masks are True where hidden; `seed` is there with dropout; `chunk` 0 is one chunk of all; `reach` is the chunk of the linear part, which reads the
# chunks before where `causal`, else its own.
gated_blocks = operator(
    "gated_attention", _forward, _backward, _fake, tensors=9, wanted=(0, 1, 2, 3, 6, 7), flops=_flops, backward_flops=_backward_flops
)
