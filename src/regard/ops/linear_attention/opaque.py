"""Products of queries, keys, values and a fourth tensor that weighs their pairs, as operators: what the two structured products share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._operator import operator


def merged(v: Tensor, width: int) -> Tensor:
    """An empty (B, H, N, width) whose heads merge without a copy."""
    return v.new_empty(v.shape[0], v.shape[2], v.shape[1], width).transpose(1, 2)


def product(name: str, forward: Callable[..., Any], backward: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Tensor]:
    """The operator regard::name (q, k, v, fourth, *options) -> (B, H, N, e).

    Args:
        backward: (grad, *the same) -> the gradients of the four tensors.
        count: multiply-adds of a forward pass, from the four shapes and the options. A backward pass has twice as many, and the products of queries
            and keys once more.
    """

    def backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any) -> int:
        once = count(q, k, v, *rest)
        return 4 * once + 2 * once * q[3] // (q[3] + v[3])

    def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return merged(v, v.shape[3])

    return operator(name, forward, backward, fake, tensors=4, flops=lambda *shapes: 2 * count(*shapes), backward_flops=backward_flops)
