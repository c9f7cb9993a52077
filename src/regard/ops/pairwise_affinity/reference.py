"""The definitions: the (B, N, M) weights, written out."""

from typing import Literal

from torch import Tensor

Kind = Literal["softmax", "dot", "relu"]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax_j(scale q_i . k_j) v_j: (B, N, dv), a transposed view, since the positions of a map lie side by side."""
    return (v.mT @ (k @ (scale * q).mT).softmax(1)).mT


def weights(a: Tensor, b: Tensor, kind: Kind, scale: float = 1.0) -> Tensor:
    """(B, N, M). "softmax": softmax_j(scale a_i . b_j); "dot": a_i . b_j / M; "relu": relu(a_i + b_j) / M of numbers a (B, N), b (B, M)."""
    if kind == "softmax":
        return (scale * a @ b.mT).softmax(-1)
    if kind == "dot":
        return a @ b.mT / b.shape[1]
    return (a[:, :, None] + b[:, None, :]).relu() / b.shape[1]
