r"""Compact generalized non-local: relations between all pairs of (position, channel), through a few inner products per group of channels.

    t, p, g = Wt x, Wp x, Wg x, each as one vector of length L per group:
    dot: y = t <p, g>     rbf: y = sum_o a_o t^o <p^o, g>,  a_o = exp(-2 gamma) (2 gamma)^o / o!     out = x + GroupNorm(Wz y)

Yue, Sun, Yuan, Zhou, Ding, Xu, "Compact Generalized Non-local Network", NeurIPS 2018. arXiv:1810.13125. The kernel of the paper has
exp(-gamma (t^2 + p^2)) in place of exp(-2 gamma): `exact_beta`; we follow the authors' code. B batch, C channels, N positions, G groups,
h hidden_channels, L = N h / G.
"""

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise, rename
from ...ops._precision import at_least_float32, full_precision
from ...ops.group_relations import relate_groups
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import zero_init_
from ...parts.spatial import project_columns
from ...validate import check_divisible, check_map, check_option

_LAYERS = (("t", "theta"), ("p", "phi"), ("g", "g"), ("z", "out"))


class CompactGeneralizedNonLocal(Mechanism):
    """Args:
    channels: of the input and the output.
    hidden_channels: of t, p and g; channels // 2 if None.
    groups: of channels, each with its own inner products, its part of Wz and its norm; None means 1.
    kernel: "dot", or "rbf" by its Taylor series.
    order, gamma: of the series, and the width of the kernel ("rbf").
    use_scale: divide every inner product by L ** 0.5.
    exact_beta: the kernel of the paper ("rbf").
    zero_init: start as the identity, as init="identity" does whatever `zero_init` says.
    """

    card: ClassVar = Card(
        id="cgnl",
        layout="map",
        paper=Paper(
            title="Compact Generalized Non-local Network",
            authors="Kaiyu Yue, Ming Sun, Yuchen Yuan, Feng Zhou, Errui Ding, Fuxin Xu",
            venue="NeurIPS",
            year=2018,
            arxiv="1810.13125",
        ),
        source="KaiyuYue/cgnl-network.pytorch@33e348b (MIT)",
        summary="Relates every position and channel with every other through a few inner products per group of channels.",
        when="One block late in a network for fine-grained recognition, where channels of different positions should interact.",
        flops="2*B*N*channels*(3*hidden_channels + hidden_channels//num_groups)",
        grows={"N": 1.0},
        can=frozenset({"linear", "any_dims", "permutation_equivariant", "identity_start"}),
        example={"channels": 16},
        variants=(
            {"channels": 12, "groups": 3, "hidden_channels": 3, "use_scale": True, "zero_init": False},
            {"channels": 16, "groups": 2, "kernel": "rbf", "gamma": 0.05, "zero_init": False},
            {"channels": 8, "groups": None, "kernel": "rbf", "order": 1, "gamma": 0.02, "exact_beta": True, "use_scale": True, "zero_init": False},
        ),
        place="C",
    )
    official: ClassVar = (KeyMap("KaiyuYue", (*(pointwise(f"{theirs}.*", f"{ours}.*", 2) for theirs, ours in _LAYERS), rename("gn.*", "norm.*"))),)

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int | None = None,
        groups: int | None = 8,
        kernel: Literal["dot", "rbf"] = "dot",
        order: int = 3,
        gamma: float = 1e-4,
        use_scale: bool = False,
        exact_beta: bool = False,
        zero_init: bool = True,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(kernel, ("dot", "rbf"), "kernel")
        check_option(init, INITS, "init")
        hidden = channels // 2 if hidden_channels is None else hidden_channels
        require(channels > 0 and hidden > 0, "channels={} and hidden_channels={} must be at least 1", channels, hidden)
        require(order >= 0, "order={} must not be negative", order)
        require(gamma > 0, "gamma={} must be positive", gamma)
        self.num_groups = 1 if groups is None else groups
        check_divisible(channels, self.num_groups, "channels", "groups")
        check_divisible(hidden, self.num_groups, "hidden_channels", "groups")
        self.channels, self.hidden_channels, self.groups, self.kernel, self.order, self.gamma = channels, hidden, groups, kernel, order, gamma
        self.use_scale, self.exact_beta, self.zero_init, self.init = use_scale, exact_beta, zero_init, init
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.theta, self.phi, self.g = (Linear(channels, hidden, bias=False, **dd) for _ in range(3))
        self.out = Linear(hidden // self.num_groups, channels, bias=False, **dd)
        self.norm = nn.GroupNorm(self.num_groups, channels, **dd)
        for linear in (self.theta, self.phi, self.g, self.out):
            nn.init.normal_(linear.weight, std=0.01)
        if zero_init or init == "identity":
            zero_init_(self.norm)

    def forward(self, x: Float[Tensor, "b channels *space"]) -> Float[Tensor, "b channels *space"]:
        check_map(x, self.channels, None)
        wide = at_least_float32(x)
        with full_precision(x):
            columns = x.flatten(2).to(wide)
            out, gain, shift = (parameter.to(wide) for parameter in (self.out.weight, self.norm.weight, self.norm.bias))
            tpg = project_columns(columns, torch.cat((self.theta.weight, self.phi.weight, self.g.weight)).to(wide))
            if self.kernel == "dot":
                z = relate_groups(tpg, out, gain, shift, self.num_groups, self._scale(tpg), self.norm.eps)
            else:
                y = self._series(*(part.unflatten(1, (self.num_groups, -1)) for part in tpg.chunk(3, 1)))
                z = torch.matmul(out.unflatten(0, (self.num_groups, -1)), y).flatten(1, 2)
                z = torch.group_norm(z, self.num_groups, gain, shift, self.norm.eps)
        return x + z.to(x.dtype).unflatten(2, x.shape[2:])

    def _series(self, t: Tensor, p: Tensor, g: Tensor) -> Tensor:
        """(B, G, h / G, N) each -> sum_o a_o t^o <p^o, g>, by Horner's rule."""
        beta = 1.0 if self.exact_beta else math.exp(-2 * self.gamma)
        weighted = g * torch.exp(-self.gamma * p * p) if self.exact_beta else g
        terms, alpha = [], beta
        for o in range(self.order + 1):
            if o > 0:
                weighted, alpha = weighted * p, alpha * 2 * self.gamma / o
            terms.append(weighted.sum((2, 3), keepdim=True) * (alpha * self._scale(p)))
        y = terms[-1].expand_as(t)
        for term in reversed(terms[:-1]):
            y = y * t + term
        return y * torch.exp(-self.gamma * t * t) if self.exact_beta else y

    def _scale(self, columns: Tensor) -> float:
        return (self.hidden_channels // self.num_groups * columns.shape[-1]) ** -0.5 if self.use_scale else 1.0
