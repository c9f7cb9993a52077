r"""Dual attention head: a branch that attends over positions and one that mixes channels, each between two convolutions, added.

    p = CBR(position(CBR(x))),   c = CBR(channel_affinity(CBR(x))),   f = p + c,   CBR = relu(BN(3x3 convolution))

Fu, Liu, Tian, Li, Bao, Fang, Lu, "Dual Attention Network for Scene Segmentation", CVPR 2019. arXiv:1809.02983.
With out_channels, f, p and c each go through dropout of whole channels and a 1x1 convolution to class scores; the paper's loss adds the three
cross-entropies. Both gains start at zero. B batch, C channels, H x W the map, h hidden_channels.
"""

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise, rename
from ...parts.conv_norm import ConvNorm
from ...parts.dual_attention import DANET, ChannelBlock, PositionBlock
from ...parts.gates import INITS
from ...parts.norm import Norm
from ...parts.squeeze import hidden_width
from ...validate import check_map, check_option

_CONVOLUTIONS = {"conv5a": "position_in", "conv51": "position_out", "conv5c": "channel_in", "conv52": "channel_out"}
_PROJECTIONS = {f"sa.{name}": f"position.{name}" for name in ("query_conv", "key_conv", "value_conv")}
_CLASSIFIERS = {"conv8.1": "main_classifier", "conv6.1": "position_classifier", "conv7.1": "channel_classifier"}


class DualAttention(Mechanism):
    """Args:
    channels: of the input.
    hidden_channels: of both branches and of f; channels // 4 if None.
    out_channels: classes; None returns f.
    dropout: probability of dropping a channel before a classifier.
    aux: return the scores of both branches as well.
    norm: "batch", None, or a callable channels -> module.
    invert: see `channel_affinity`.
    init: "identity" or "default": either starts with the attention of both branches off, as their convolutions alone.
    """

    card: ClassVar = Card(
        id="dual",
        layout="map",
        paper=DANET,
        source="junfu1115/DANet@b0a0fa0 (MIT), encoding/models/sseg/danet.py::DANetHead",
        summary="Segmentation head that adds a branch with position attention and a branch with channel attention.",
        when="The last layers of a segmentation network with stride 8.",
        flops="36*B*N*hidden_channels*(channels + hidden_channels) + 2*B*N*hidden_channels*(2*query_channels + hidden_channels)"
        " + 2*B*N**2*(query_channels + hidden_channels if hidden_channels >= 64 else 2*hidden_channels) + 4*B*N*hidden_channels**2"
        " + (2*B*N*hidden_channels*out_channels*(3 if aux else 1) if out_channels else 0)",
        grows={"N": 2.0},
        can=frozenset({"batch_statistics"}),
        returns=("main", "position", "channel"),
        example={"channels": 32},
        variants=(
            {"channels": 16, "hidden_channels": 8, "out_channels": 5, "aux": True, "dropout": 0.0},
            {"channels": 8, "hidden_channels": 16, "norm": None, "invert": False},
        ),
        place="E",
    )
    official: ClassVar = (
        KeyMap(
            "DANet",
            (
                *(rename(f"{theirs}.0.*", f"{ours}.conv.*") for theirs, ours in _CONVOLUTIONS.items()),
                *(rename(f"{theirs}.1.*", f"{ours}.norm.*") for theirs, ours in _CONVOLUTIONS.items()),
                *(pointwise(f"{theirs}.*", f"{ours}.*") for theirs, ours in _PROJECTIONS.items()),
                *(rename(f"{theirs}.*", f"{ours}.*") for theirs, ours in _CLASSIFIERS.items()),
                rename("sa.gamma", "position.gamma"),
                rename("sc.gamma", "channel.gamma"),
            ),
        ),
    )

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int | None = None,
        out_channels: int | None = None,
        dropout: float = 0.1,
        aux: bool = False,
        norm: Norm = "batch",
        invert: bool = True,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(init, INITS, "init")
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        require(out_channels is None or out_channels > 0, "out_channels={} must be at least 1, or None", out_channels)
        require(not aux or out_channels is not None, "aux={} returns class scores and needs out_channels", aux)
        h = hidden_width(channels, 4, hidden_channels)
        require(h >= 8, "hidden_channels={} must be at least 8 (it is channels // 4 if None): queries and keys have an eighth of them", h)
        self.channels, self.hidden_channels, self.out_channels, self.dropout = channels, h, out_channels, dropout
        self.aux, self.norm, self.invert, self.init = aux, norm, invert, init
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position_in, self.channel_in = (ConvNorm(channels, h, 3, norm=norm, **dd) for _ in range(2))
        self.position, self.channel = PositionBlock(h, **dd), ChannelBlock(h, invert=invert, **dd)
        self.position_out, self.channel_out = (ConvNorm(h, h, 3, norm=norm, **dd) for _ in range(2))
        self.query_channels = self.position.hidden_channels
        if out_channels is not None:  # all three whether aux or not, so that one checkpoint fits both
            self.main_classifier, self.position_classifier, self.channel_classifier = (nn.Conv2d(h, out_channels, 1, **dd) for _ in range(3))

    def forward(self, x: Float[Tensor, "b channels h w"]) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> f (B, h, H, W), or class scores (B, out_channels, H, W), or those of f, p and c."""
        check_map(x, self.channels)
        p = self.position_out(self.position(self.position_in(x)))
        c = self.channel_out(self.channel(self.channel_in(x)))
        f = p + c
        if self.out_channels is None:
            return f
        main = self._classify(f, self.main_classifier)
        if not self.aux:
            return main
        return main, self._classify(p, self.position_classifier), self._classify(c, self.channel_classifier)

    def _classify(self, x: Tensor, classifier: nn.Module) -> Tensor:
        return classifier(F.dropout2d(x, self.dropout, self.training))
