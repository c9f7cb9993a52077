r"""Adaptive context module: every position decides how much of each region of the map it needs.

    P = CBR_pool(mean_{s x s}(x)),   u = CBR_in(x),   g = CBR_glob(mean_n u),   a_n = sigmoid(W_a (u_n + g) + b_a)
    z_n = sum_k a_nk P_k,   r = CBR_fus(relu(CBR_res(z) + u));   several scales: out = CBR_3x3([x ; r_1 ; r_2 ; ...])

He, Deng, Zhou, Wang, Qiao, "Adaptive Pyramid Context Network for Semantic Segmentation", CVPR 2019. CBR is a 1x1 convolution, BatchNorm and ReLU.
The sigmoid is in the authors' code, not in the paper's figure; nothing is normalised. The head's dropout and classifier are not part of this.
W_a (u + g) = W_a u + W_a g and W_res (P a) = (W_res P) a: neither u + g nor z is formed.
B batch, C channels, N positions, h hidden_channels, s a scale.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise, rename
from ...ops.region_pool import pool_regions
from ...ops.squeeze import position_mean
from ...parts.conv_norm import ConvNorm
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import Norm, check_batch_statistics
from ...parts.spatial import project_columns
from ...validate import check_map, check_option, whole_numbers

_LAYERS = (
    ("pooled_redu_conv", "pooled"),
    ("input_redu_conv", "input"),
    ("global_info", "glob"),
    ("residual_conv", "residual"),
    ("fusion_conv", "fuse"),
)


class AdaptiveContext(Mechanism):
    """Args:
    channels: of the input.
    hidden_channels: of the output and of everything inside; channels // 4 if None.
    scales: regions a side: one number for one module alone, several for the pyramid and its 3x3 convolution.
    fusion: end every scale with a convolution of its own.
    norm: "batch", None, or a callable features -> module.
    init: "identity" starts without the context, by a gain of zero on it.
    """

    card: ClassVar = Card(
        id="adaptive_context",
        layout="map",
        paper=Paper(
            title="Adaptive Pyramid Context Network for Semantic Segmentation",
            authors="Junjun He, Zhongying Deng, Lei Zhou, Yali Wang, Yu Qiao",
            venue="CVPR",
            year=2019,
        ),
        source="Junjun2016/APCNet@f45cda5 (Apache-2.0)",
        summary="Every position mixes the means of regions of several sizes by gates of its own.",
        when="A segmentation head on a dilated backbone, where plain pyramid pooling is too coarse.",
        flops="2*B*channels*W*(H*sides + regions) + 2*B*regions*hidden_channels*(channels + 1 + hidden_channels)"
        " + 4*B*N*hidden_channels*regions + num_scales*(2*B*N*hidden_channels*(channels + fusion*hidden_channels) + 2*B*hidden_channels**2)"
        " + (18*B*N*hidden_channels*(channels + num_scales*hidden_channels) if pyramid else 0)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "batch_statistics"}),
        example={"channels": 16},
        variants=(
            {"channels": 8, "hidden_channels": 6, "scales": 3, "fusion": False},
            {"channels": 8, "hidden_channels": 6, "scales": (2, 1), "norm": None, "init": "identity"},
        ),
        place="E",
    )

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int | None = None,
        scales: int | Sequence[int] = (1, 2, 3, 6),
        fusion: bool = True,
        norm: Norm = "batch",
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.pyramid, self.sizes = not isinstance(scales, int), whole_numbers((scales,) if isinstance(scales, int) else scales, "scales")
        self.scales = self.sizes if self.pyramid else scales
        h = channels // 4 if hidden_channels is None else hidden_channels
        hint = "the hidden width is {}, at least 1 is needed; see channels={}, hidden_channels={}"
        require(min(channels, h) > 0, hint, h, channels, hidden_channels)
        check_option(init, INITS, "init")
        self.channels, self.hidden_channels, self.fusion, self.norm, self.init = channels, h, fusion, norm, init
        self.num_scales, self.sides, self.regions = len(self.sizes), sum(self.sizes), sum(s * s for s in self.sizes)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def layers(width: int) -> nn.ModuleList:
            return nn.ModuleList(ConvNorm(width, h, norm=norm, **dd) for _ in self.sizes)

        self.pooled, self.input, self.glob, self.residual = layers(channels), layers(channels), layers(h), layers(h)
        self.affinity = nn.ModuleList(Linear(h, s * s, **dd) for s in self.sizes)
        self.fuse = layers(h) if fusion else None
        self.bottleneck = ConvNorm(channels + len(self.sizes) * h, h, 3, norm=norm, **dd) if self.pyramid else None
        self.gain = nn.Parameter(torch.zeros(1, **dd)) if init == "identity" else None

    def key_maps(self) -> tuple[KeyMap, ...]:
        rules = [rename("bottleneck.bn.*", "bottleneck.norm.*")]
        for i in range(self.num_scales):
            prefix = f"acm_modules.{i}." if self.pyramid else ""
            pairs = [(f"{prefix}{theirs}.{a}.*", f"{ours}.{i}.{b}.*") for theirs, ours in _LAYERS for a, b in (("conv", "conv"), ("bn", "norm"))]
            rules += [*(rename(*pair) for pair in pairs), pointwise(f"{prefix}gla.*", f"affinity.{i}.*")]
        return (KeyMap("Junjun2016/APCNet", tuple(rules), optional=("gain",)),)

    def forward(self, x: Float[Tensor, "b channels h w"], return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """(B, C, H, W) -> (B, h, H, W), or that and the gates (B, s^2, H, W), of every scale in a pyramid."""
        check_map(x, self.channels)
        glob: Any = self.glob[0]
        check_batch_statistics(glob.norm, x.shape[0], "a batch of one pooled vector")
        pooled = pool_regions(x, self.sizes).split([s * s for s in self.sizes], 2)
        maps, weights = [], []
        for i, (one, s) in enumerate(zip(pooled, self.sizes, strict=True)):
            found, gates = self._scale(x, one.unflatten(2, (s, s)), i)
            maps.append(found)
            if return_weights:
                weights.append(gates.unflatten(2, x.shape[2:]))
            del found, gates  # without gradients, the gates of one scale at a time
        out = maps[0] if self.bottleneck is None else self.bottleneck(torch.cat((x, *maps), 1))
        return (out, tuple(weights) if self.pyramid else weights[0]) if return_weights else out

    def _scale(self, x: Tensor, pooled: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """The map of one scale (B, h, H, W), and its gates (B, s^2, N)."""
        affinity: Any = self.affinity[i]
        residual: Any = self.residual[i]
        regions, u = self.pooled[i](pooled), self.input[i](x)
        shared = affinity(self.glob[i](position_mean(u)[:, :, None, None]).flatten(1))
        gates = torch.baddbmm(shared[:, :, None], affinity.weight.expand(x.shape[0], -1, -1), u.flatten(2)).sigmoid()
        # The convolution acts on the regions, of which there are fewer than positions; its bias is added to every position.
        context = torch.bmm(project_columns(regions.flatten(2), residual.conv.weight.flatten(1)), gates)
        if residual.conv.bias is not None:
            context = context + residual.conv.bias[:, None]
        context = residual.finish(context.unflatten(2, x.shape[2:]))
        out = F.relu(u + (context if self.gain is None else self.gain * context), inplace=True)
        return (out if self.fuse is None else self.fuse[i](out)), gates
