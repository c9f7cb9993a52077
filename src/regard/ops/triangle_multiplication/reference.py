"""The definition, written out."""

import torch.nn.functional as F
from torch import Tensor


def project(z: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """a and b, channels first: (B, c, N, N). `weight` holds the rows of the values of a and b, then those of their gates."""
    p, g = F.linear(z, weight, bias).chunk(2, -1)
    out = p * g.sigmoid()
    a, b = (out if mask is None else out * mask.unsqueeze(-1)).movedim(-1, 1).chunk(2, 1)
    return a, b


def emit(
    x: Tensor, z: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, gate_weight: Tensor, gate_bias: Tensor, eps: float
) -> Tensor:
    """sigmoid(z Wg + bg) (LN(x) W + b), from x with its channels first."""
    y = F.layer_norm(x.movedim(1, -1), norm_weight.shape, norm_weight, norm_bias, eps)
    return F.linear(z, gate_weight, gate_bias).sigmoid() * F.linear(y, weight, bias)
