r"""Bottleneck attention: every entry of the map is scaled by a gate made of a number for its channel and a number for its position.

    c = MLP(mean_n x_n),   p = conv1x1(dilated convs(conv1x1(x))),   g = sigmoid(c p),   out = x (1 + g)

Park, Woo, Lee, Kweon, "BAM: Bottleneck Attention Module", BMVC 2018. arXiv:1807.06514.
The paper adds c and p; we follow the authors' code and released weights, which multiply them (`combine`). Every layer but the two last is
followed by a norm and a ReLU.  B batch, C channels, H, W sides, N = H W positions, h hidden_channels.
"""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise, rename
from ...ops.outer_gate import apply_outer_gate, outer_gate
from ...ops.squeeze import position_mean
from ...parts.conv_norm import ConvNorm
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import Norm, check_batch_statistics, make_norm, zero_init_
from ...parts.spatial import project_columns
from ...parts.squeeze import hidden_width
from ...validate import check_map, check_option


class BottleneckAttention(Mechanism):
    """Args:
    channels: of the map.
    reduction, hidden_channels: the hidden width is channels // reduction, or hidden_channels.
    num_layers: hidden layers of the channel branch.
    num_dilated, dilation: 3x3 convolutions of the spatial branch, and their dilation.
    combine: "mul" (code) or "add" (paper) the two branches.
    norm: "batch", None, or a callable features -> module.
    init: "identity" starts as the identity: the channel branch's last layer (for "add" both last layers) at zero, 1 + g divided by 1.5.
    """

    card: ClassVar = Card(
        id="bam",
        layout="map",
        paper=Paper(
            title="BAM: Bottleneck Attention Module",
            authors="Jongchan Park, Sanghyun Woo, Joon-Young Lee, In So Kweon",
            venue="BMVC",
            year=2018,
            arxiv="1807.06514",
        ),
        source="Jongchan/attention-module@459efad (MIT)",
        summary="Scales every entry of a map by a gate from its channel and its position.",
        when="One module between two stages of a network, not one for each block.",
        flops="2*B*N*hidden_channels*(channels + 9*num_dilated*hidden_channels + 1)"
        " + 2*B*(hidden_channels*(2*channels + (num_layers - 1)*hidden_channels) if num_layers else channels**2)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "gate", "identity_start", "batch_statistics"}),
        uncertain="The authors' class as released cannot be built and fails on maps that are not square; both were patched to run it.",
        example={"channels": 16, "reduction": 4},
        variants=(
            {"channels": 12, "hidden_channels": 5, "num_layers": 2, "num_dilated": 1, "dilation": 2, "combine": "add"},
            {"channels": 8, "reduction": 2, "num_layers": 0, "num_dilated": 0, "norm": None},
        ),
        place="D",
    )

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        hidden_channels: int | None = None,
        num_layers: int = 1,
        num_dilated: int = 2,
        dilation: int = 4,
        combine: Literal["mul", "add"] = "mul",
        norm: Norm = "batch",
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(min(num_layers, num_dilated) >= 0, "num_layers={} and num_dilated={} must not be negative", num_layers, num_dilated)
        require(dilation > 0, "dilation={} must be at least 1", dilation)
        check_option(combine, ("mul", "add"), "combine")
        check_option(init, INITS, "init")
        self.channels, self.reduction, self.num_layers, self.num_dilated, self.dilation = channels, reduction, num_layers, num_dilated, dilation
        self.combine, self.norm, self.init = combine, norm, init
        self.hidden_channels = h = hidden_width(channels, reduction, hidden_channels)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = [channels, *[h] * num_layers]
        self.channel_layers = nn.ModuleList(Linear(a, h, **dd) for a in widths[:-1])
        self.channel_norms = nn.ModuleList(make_norm(norm, h, 0, **dd) for _ in range(num_layers))
        self.channel_out = Linear(widths[-1], channels, **dd)
        self.reduce, self.reduce_norm = Linear(channels, h, **dd), make_norm(norm, h, 2, **dd)
        self.spatial_layers = nn.ModuleList(ConvNorm(h, h, 3, dilation=dilation, bias=True, norm=norm, **dd) for _ in range(num_dilated))
        self.spatial_out = Linear(h, 1, **dd)
        if init == "identity":
            zero_init_(self.channel_out)  # not both factors of a product, or nothing would ever learn
            if combine == "add":
                zero_init_(self.spatial_out)

    def key_maps(self) -> tuple[KeyMap, ...]:
        channel, spatial = "channel_att.gate_c.gate_c_", "spatial_att.gate_s.gate_s_"
        rules: list[Rule] = [rename(f"{channel}fc_final.*", "channel_out.*"), pointwise(f"{spatial}conv_final.*", "spatial_out.*")]
        rules += [pointwise(f"{spatial}conv_reduce0.*", "reduce.*"), rename(f"{spatial}bn_reduce0.*", "reduce_norm.*")]
        for i in range(self.num_layers):
            rules += [rename(f"{channel}fc_{i}.*", f"channel_layers.{i}.*"), rename(f"{channel}bn_{i + 1}.*", f"channel_norms.{i}.*")]
        for i in range(self.num_dilated):
            rules += [rename(f"{spatial}{theirs}_di_{i}.*", f"spatial_layers.{i}.{ours}.*") for theirs, ours in (("conv", "conv"), ("bn", "norm"))]
        return (KeyMap("Jongchan/attention-module", tuple(rules)),)

    def forward(self, x: Float[Tensor, "b channels h w"], return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the same, or that and g, of the same shape."""
        channel, position = self._logits(x)
        out = apply_outer_gate(x, channel, position, self.combine, self._at_zero)
        return (out, outer_gate(channel, position, self.combine)) if return_weights else out

    def gate(self, x: Float[Tensor, "b channels h w"]) -> Tensor:
        """1 + g, what multiplies x; with init="identity" divided by 1.5."""
        return (1 + outer_gate(*self._logits(x), self.combine)) / self._at_zero

    @property
    def _at_zero(self) -> float:
        return 1.5 if self.init == "identity" else 1.0

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """c (B, C) and p (B, 1, H, W)."""
        check_map(x, self.channels)
        for norm in self.channel_norms:
            check_batch_statistics(norm, x.shape[0], "a batch of one pooled vector")
        check_batch_statistics(self.reduce_norm, x.shape[0] * x.shape[2] * x.shape[3], "one position of one sample")
        vector = position_mean(x)
        planes = F.relu(self.reduce_norm(self._project(x, self.reduce)))
        for layer, norm in zip(self.channel_layers, self.channel_norms, strict=True):
            vector = F.relu(norm(layer(vector)))
        for layer in self.spatial_layers:
            planes = layer(planes)
        return self.channel_out(vector), self._project(planes, self.spatial_out)

    @staticmethod
    def _project(x: Tensor, layer: nn.Linear) -> Tensor:
        return project_columns(x.flatten(2), layer.weight, layer.bias).unflatten(2, x.shape[2:])
