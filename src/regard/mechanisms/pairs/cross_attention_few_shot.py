r"""Cross attention for few-shot learning: what a class map and a query map share is made to stand out in both.

    R[x,y] = cos(P_x, Q_y);   a[y] = mean_x R[x,y],   w = W2 relu(BN(W1 a)),   s[x] = mean_y R[x,y] w[y]
    att = softmax_x(s / temperature),   P_hat = P (1 + att);   Q_hat likewise, from R^T and the same W1, W2

Hou, Chang, Ma, Shan, Chen, "Cross Attention Network for Few-shot Classification", NeurIPS 2019. arXiv:1910.07677. We follow the code: s is a mean
(the paper's softmax does not say), and in training BN sees R, then R^T, and moves its statistics twice.
Both means are rank-one contractions of unit vectors, a[y] = <mean_x P_x, Q_y> and s[x] = <P_x, mean_y Q_y w[y]>: R (m x m for each pair) never
exists.
B episodes, n1 classes, n2 queries, C channels, m = H W positions.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require, require_type
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise, rename
from ...ops._precision import at_least_float32, full_precision
from ...parts.linear import Linear
from ...validate import check_floating

Pair = tuple[Tensor, Tensor]


class CrossAttentionFewShot(Mechanism):
    """Args:
    spatial_size: (height, width) of the maps; the fusion layer is tied to it.
    reduction: the fusion layer's hidden width is height * width // reduction.
    temperature: of the softmax over positions.
    """

    card: ClassVar = Card(
        id="cross_attention_few_shot",
        layout="pair",
        paper=Paper(
            title="Cross Attention Network for Few-shot Classification",
            authors="Ruibing Hou, Hong Chang, Bingpeng Ma, Shiguang Shan, Xilin Chen",
            venue="NeurIPS",
            year=2019,
            arxiv="1910.07677",
        ),
        source="blue-blue272/fewshot-CAN@6055985e (no licence)",
        summary="Every class map and query map are reweighted by position, for each other.",
        when="Few-shot classification by maps: what decides is a small part of the picture.",
        # N classes and M queries in an episode; C channels.
        flops="4*B*N*M*positions*(3*C + 2*hidden_channels)",
        grows={},
        can=frozenset({"weights", "row_stochastic", "batch_statistics"}),
        example={"spatial_size": (5, 4), "reduction": 4},
        variants=({"spatial_size": (3, 7), "reduction": 6, "temperature": 0.1}, {"spatial_size": (2, 2), "reduction": 1}),
        returns=("support", "query", "weights_support", "weights_query"),
    )

    def __init__(self, spatial_size: tuple[int, int] = (6, 6), reduction: int = 6, temperature: float = 0.025, *, device=None, dtype=None) -> None:
        super().__init__()
        fits = isinstance(spatial_size, tuple | list) and len(spatial_size) == 2 and min(spatial_size) > 0
        require(fits, "spatial_size={!r} must be (height, width), both at least 1", spatial_size)
        require(reduction > 0, "reduction={} must be at least 1", reduction)
        require(temperature > 0, "temperature={} must be positive", temperature)
        positions = spatial_size[0] * spatial_size[1]
        hidden = positions // reduction
        require(hidden > 0, "reduction={} leaves no hidden unit: spatial_size={} has {} positions", reduction, spatial_size, positions)
        self.spatial_size, self.reduction, self.temperature = tuple(spatial_size), reduction, temperature
        self.positions, self.hidden_channels = positions, hidden
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.squeeze, self.norm, self.expand = Linear(positions, hidden, **dd), nn.BatchNorm1d(hidden, **dd), Linear(hidden, positions, **dd)
        for layer in (self.squeeze, self.expand):
            nn.init.normal_(layer.weight, std=(2 / layer.out_features) ** 0.5)

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: Any, generator: torch.Generator) -> dict[str, Tensor]:
        space = options.get("spatial_size", (6, 6))
        return {name: torch.randn(batch, n, 8, *space, generator=generator) for name, n in (("support", 2), ("query", 3))}

    def key_maps(self) -> tuple[KeyMap, ...]:
        def rules(prefix: str) -> tuple:
            squeeze, expand = pointwise(f"{prefix}conv1.conv.*", "squeeze.*"), pointwise(f"{prefix}conv2.*", "expand.*")
            return squeeze, rename(f"{prefix}conv1.bn.*", "norm.*"), expand

        return KeyMap("fewshot-CAN", rules("")), KeyMap("fewshot-CAN whole model", rules("cam."), ignore=(r"(?!cam\.).*",))

    def forward(
        self,
        support: Float[Tensor, "b n1 c h w"],
        query: Float[Tensor, "b n2 c h w"],
        *,
        pooled: bool = False,
        return_weights: bool = False,
    ) -> Pair | tuple[Pair, Pair]:
        """The maps (B, n2, n1, C, H, W) of the classes and of the queries, or those and the weights, each (B, n1, n2, m), positions row by row.

        Args:
            support: one map a class.
            query: the maps to classify.
            pooled: return the means over positions alone, (B, n2, n1, C); the maps are then never made.
        """
        self._check(support, query)
        p, q = support.flatten(3), query.flatten(3)
        wide = at_least_float32(p)
        with full_precision(p):
            unit_p, unit_q = (F.normalize(x.to(wide), dim=2) for x in (p, q))
            att_p, att_q = self._attend(unit_p, unit_q), self._attend(unit_q, unit_p)
        weights = att_p, att_q.transpose(1, 2)
        gains = (1 + att_p).to(p.dtype), (1 + att_q).to(q.dtype)
        if pooled:
            means = torch.matmul(gains[0] / self.positions, p.mT).transpose(1, 2), torch.matmul(gains[1] / self.positions, q.mT)
            return (means, weights) if return_weights else means
        maps = p[:, None] * gains[0].transpose(1, 2)[:, :, :, None], q[:, :, None] * gains[1][:, :, :, None]
        out = maps[0].unflatten(-1, self.spatial_size), maps[1].unflatten(-1, self.spatial_size)
        return (out, weights) if return_weights else out

    def _attend(self, own: Tensor, other: Tensor) -> Tensor:
        """Unit vectors (B, n, C, m) and (B, k, C, m) of the positions -> weights (B, n, k, m) over the positions of `own`."""
        mean = torch.matmul(own.mean(-1)[:, None], other).to(self.squeeze.weight.dtype)
        hidden = self.norm(self.squeeze(mean).flatten(0, 2))
        kernel = self.expand(F.relu(hidden)).view(mean.shape).to(own.dtype)
        asked = torch.matmul(kernel, other.mT).transpose(1, 2)
        # Half precision would be coarse where the temperature divides: own is in float32.
        return torch.softmax(torch.matmul(asked, own) / (self.positions * self.temperature), -1)

    def _check(self, support: Tensor, query: Tensor) -> None:
        for name, x in (("support", support), ("query", query)):
            check_floating(x, name)
            h, w = self.spatial_size
            require(x.ndim == 5, "{} must be (batch, maps, channels, {}, {}), got {} axes: {}", name, h, w, x.ndim, tuple(x.shape))
            tied = "{} has maps of {} but this module was made with spatial_size={}, to which its fusion layer is tied: make another, or resize"
            require(tuple(x.shape[3:]) == self.spatial_size, tied, name, tuple(x.shape[3:]), self.spatial_size)
            require(min(x.shape[1:3]) > 0, "{} has an empty axis: {}", name, tuple(x.shape))
        for axis, what in ((0, "batch"), (2, "channels")):
            require(support.shape[axis] == query.shape[axis], "support has {} {} but query has {}", what, support.shape[axis], query.shape[axis])
        require_type(support.dtype == query.dtype, "support is {} but query is {}; convert one", support.dtype, query.dtype)
        pairs = support.shape[0] * support.shape[1] * query.shape[1]
        alone = "BatchNorm in training cannot normalise a single pair of maps; call module.eval(), or use a larger batch"
        require(not self.training or pairs > 1, alone)
