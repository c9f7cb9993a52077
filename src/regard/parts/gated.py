"""What the gated attention unit and its chunked form share: norm, scores by relative position, the gate, value and query-key projections."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from ..ops._linear import linear
from ..ops.gated_attention import ACTIVATIONS
from ..validate import check_option
from .positions import RelativeBias, rotary

NormKind = Literal["layernorm", "scalenorm"] | None
Activation = Literal["relu2", "laplace", "softmax"]


class ScaleNorm(nn.Module):
    """x / max(|x| D^-1/2, 1e-5) g with one learned g. Nguyen and Salazar, arXiv 1910.05895."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.dim = dim
        self.g = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * self.dim**-0.5
        return (wide / size.clamp_min(1e-5)).to(x.dtype) * self.g


class RopeScores(nn.Module):
    """R_ij = rope(a, i) . rope(b, j) with learned a and b; it depends on i - j alone."""

    def __init__(self, width: int, device=None, dtype=None) -> None:
        super().__init__()
        require(width % 2 == 0, "rel_pos='rope' turns pairs of channels: qk_dim={} must be even", width)
        self.a, self.b = (nn.Parameter(torch.empty(width, device=device, dtype=dtype)) for _ in range(2))
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)

    def forward(self, n: int) -> Tensor:
        back, width = torch.arange(n - 1, -n, -1, device=self.a.device), self.a.shape[0]
        return (rotary(self.a.expand(1, 1, 2 * n - 1, width), back, width, 10000.0, False)[0, 0] * self.b).sum(-1)


class ToeplitzScores(nn.Module):
    """R_ij = table[max_len - 1 + j - i]."""

    def __init__(self, max_len: int | None, device=None, dtype=None) -> None:
        super().__init__()
        require(max_len is not None and max_len > 0, "rel_pos='toeplitz' needs max_len, the longest sequence; got max_len={}", max_len)
        assert max_len is not None
        self.max_len = max_len
        self.rel_pos_bias = nn.Parameter(torch.empty(2 * max_len - 1, device=device, dtype=dtype))
        nn.init.normal_(self.rel_pos_bias, std=0.02)

    def forward(self, n: int) -> Tensor:
        require(n <= self.max_len, "a sequence of {} is longer than max_len={} of rel_pos='toeplitz'", n, self.max_len)
        # A copy: a view of a parameter says that it needs a gradient even where none are recorded.
        return self.rel_pos_bias[self.max_len - n : self.max_len - 1 + n].clone()


class T5Scores(RelativeBias):
    """R_ij = sqrt(width) E[bucket(j - i)], 32 buckets up to a distance of 128; keys before the query only where causal."""

    def __init__(self, width: int, causal: bool, device=None, dtype=None) -> None:
        super().__init__("t5", 1, not causal, None, 32, 128, device=device, dtype=dtype)
        self.scale = width**0.5

    def forward(self, n: int) -> Tensor:
        middle = torch.arange(n - 1, n, device=self.weight.device)
        return self.scale * super().forward(2 * n - 1, 2 * n - 1, middle)[0, 0]


def relative_scores(kind: str | None, width: int, causal: bool, max_len: int | None = None, device=None, dtype=None) -> nn.Module | None:
    """A module n -> (2 n - 1): the score that is added for each j - i, from 1 - n to n - 1."""
    dd = {"device": device, "dtype": dtype}
    if kind == "rope":
        return RopeScores(width, **dd)
    if kind == "toeplitz":
        return ToeplitzScores(max_len, **dd)
    return T5Scores(width, causal, **dd) if kind == "t5" else None


def input_norm(kind: NormKind, dim: int, device=None, dtype=None) -> nn.Module:
    check_option(kind, ("layernorm", "scalenorm", None), "norm")
    if kind is None:
        return nn.Identity()
    return (nn.LayerNorm if kind == "layernorm" else ScaleNorm)(dim, device=device, dtype=dtype)


def check_gated(dim: int, qk_dim: int, hidden_dim: int, activation: str, **dropouts: float) -> None:
    for name, value in (("dim", dim), ("qk_dim", qk_dim), ("hidden_dim", hidden_dim)):
        require(value > 0, "{}={} must be at least 1", name, value)
    check_option(activation, ACTIVATIONS, "activation")
    for name, value in dropouts.items():
        require(0.0 <= value < 1.0, "{}={} must be in [0, 1)", name, value)


def init_gated_(proj: nn.Linear, out_proj: nn.Linear, gamma: Tensor, beta: Tensor) -> None:
    for weight in (proj.weight, out_proj.weight, gamma):
        nn.init.normal_(weight, std=0.02)
    for bias in (proj.bias, out_proj.bias, beta):
        nn.init.zeros_(bias)


def split_projection(proj: nn.Linear, widths: list[int]) -> list[Callable[[Tensor], Tensor]]:
    """SiLU(h W + b) as functions of h, one for each part of these widths: no buffer then holds all parts, and each is made when it is needed."""
    parts = zip(proj.weight.split(widths), proj.bias.split(widths), strict=True)
    return [lambda h, weight=weight, bias=bias: F.silu(linear(h, weight, bias)) for weight, bias in parts]
