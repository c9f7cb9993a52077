"""Layer norm inside the loops."""

import torch
from torch import Tensor

from .cells import EPS


class Normalised:
    """Layer norm of a whole sequence (T, B, D), and its derivative one step at a time."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.out, mean, self.rate = torch.native_layer_norm(x, x.shape[-1:], weight, bias, EPS)
        self.unit, self.weight = (x - mean) * self.rate, weight

    def back(self, grad: Tensor, t: int) -> Tensor:
        grad, unit = grad * self.weight, self.unit[t]
        return self.rate[t] * (grad - grad.mean(-1, keepdim=True) - unit * (grad * unit).mean(-1, keepdim=True))

    def parameters(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of weight and bias, for that of the whole output."""
        return (grad * self.unit).sum((0, 1)), grad.sum((0, 1))
