"""Spectral normalisation by one power iteration for each call, as SAGAN's and BigGAN's code has it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._linear import linear
from ..ops._precision import at_least_float32, full_precision


class SpectralLinear(nn.Linear):
    """A linear layer whose weight is divided by an estimate of its largest singular value.

    `u0` (1, out) is the vector of the power iteration, `sv0` (1,) the last estimate in training. Evaluation iterates from `u0` as training
    does and keeps neither, where torch's own spectral norm takes what it stored.
    """

    u0: Tensor
    sv0: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.register_buffer("u0", torch.randn(1, out_features, device=device, dtype=dtype))
        self.register_buffer("sv0", torch.ones(1, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.normalised(self.training), self.bias)

    def normalised(self, update: bool) -> Tensor:
        """The weight over the estimate; `update` keeps the vector the iteration came to."""
        with full_precision(self.weight):
            sigma, u = spectral_norm(self.weight, self.u0)
            weight = self.weight / sigma.to(self.weight.dtype)
        if update:
            with torch.no_grad():
                self.u0.copy_(u)
                self.sv0.copy_(sigma)
        return weight


def spectral_norm(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(estimate of the largest singular value, next u) of a weight (out, ...) from u (1, out), in float32 at least.

    Gradients flow through the weight; both vectors are constants.
    """
    wide = at_least_float32(weight)
    matrix, u = weight.flatten(1).to(wide), u.to(wide)
    v = F.normalize(u @ matrix.detach(), dim=1)
    image = v @ matrix.mT
    u = F.normalize(image.detach(), dim=1)
    return (image * u).sum(), u
