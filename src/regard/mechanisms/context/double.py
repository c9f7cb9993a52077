r"""Double attention: gather the map into a few descriptors by attention, then let every position attend to the descriptors.

    b_kn = softmax_n(Wb x_n)_k,   v_kn = softmax_k(Wv x_n)_k,   g_k = sum_n b_kn Wa x_n,   out_n = x_n + Wz sum_k v_kn g_k

Chen, Kalantidis, Li, Yan, Feng, "A^2-Nets: Double Attention Networks", NeurIPS 2018. arXiv:1810.11579. The public code (`reconstruct=False,
residual=False`) stops before Wz and the sum; we follow the paper. B batch, C channels, N positions, c hidden_channels, n num_maps.
Wz acts on the n descriptors or on their mixtures, whichever is fewer products: the second softmax sums to one, so its bias goes with it.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise
from ...ops._precision import at_least_float32
from ...parts.gates import INITS
from ...parts.linear import Linear
from ...parts.norm import zero_init_
from ...parts.spatial import project_columns, project_distribute, project_gather
from ...validate import check_map, check_option

_BACK = (
    "min(channels*num_maps*(hidden_channels + N*frames), hidden_channels*N*frames*(channels + num_maps))"
    " if reconstruct else hidden_channels*num_maps*N*frames"
)


class DoubleAttention(Mechanism):
    """Args:
    channels: of the input, and of the output if `reconstruct`.
    hidden_channels: of a descriptor, and of the output if not `reconstruct`; channels // 4 but at least 1 if None.
    num_maps: how many descriptors are gathered; channels // 4 but at least 1 if None.
    frames: the batch holds clips of so many frames, one after another; descriptors are those of a clip.
    reconstruct: project back to `channels`.
    residual: add the input.
    zero_init: the last projection starts at zero.
    init: "identity" starts as the identity, whatever `zero_init` says.
    """

    card: ClassVar = Card(
        id="double",
        layout="map",
        paper=Paper(
            title="A^2-Nets: Double Attention Networks",
            authors="Yunpeng Chen, Yannis Kalantidis, Jianshu Li, Shuicheng Yan, Jiashi Feng",
            venue="NeurIPS",
            year=2018,
            arxiv="1810.11579",
        ),
        source="gjylt/DoubleAttentionNet@0408c3d (no licence file)",
        summary="Gathers a map into a few attended descriptors and gives every position its own mixture of them.",
        when="Global context at linear cost in early stages, on large maps or on video clips.",
        flops=f"2*B*N*(channels*(hidden_channels + 2*num_maps) + hidden_channels*num_maps) + 2*(B//frames)*({_BACK})",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "permutation_equivariant", "identity_start"}),
        unless={"identity_start": "not reconstruct or not residual"},
        checked_against="public",
        uncertain="No code of the authors was found; projection back and residual follow the paper.",
        example={"channels": 16},
        variants=(
            {"channels": 8, "hidden_channels": 2, "num_maps": 5, "zero_init": True},
            {"channels": 12, "hidden_channels": 6, "num_maps": 3, "reconstruct": False, "residual": False},
            {"channels": 8, "hidden_channels": 8, "num_maps": 2, "reconstruct": False},
        ),
        returns=("out", "weights_gather", "weights_distribute"),
        place="C",
    )
    official: ClassVar = (
        KeyMap(
            "gjylt/DoubleAttentionNet",
            tuple(
                pointwise(f"{theirs}.*", f"{ours}.*")
                for theirs, ours in (("convA", "feature"), ("convB", "gather"), ("convV", "distribute"), ("convZ", "out"))
            ),
        ),
    )

    def __init__(
        self,
        channels: int,
        *,
        hidden_channels: int | None = None,
        num_maps: int | None = None,
        frames: int = 1,
        reconstruct: bool = True,
        residual: bool = True,
        zero_init: bool = False,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(init, INITS, "init")
        require(channels > 0, "channels={} must be at least 1", channels)
        hidden, maps = (max(channels // 4, 1) if given is None else given for given in (hidden_channels, num_maps))
        require(min(hidden, maps, frames) > 0, "hidden_channels={}, num_maps={} and frames={} must be at least 1", hidden, maps, frames)
        fits = reconstruct or not residual or hidden == channels
        require(fits, "residual=True needs reconstruct=True, or hidden_channels={} equal to channels={}", hidden, channels)
        require(reconstruct or not zero_init, "zero_init=True needs reconstruct=True: it sets that projection to zero")
        require(init == "default" or (reconstruct and residual), "init='identity' needs reconstruct=True and residual=True")
        self.channels, self.hidden_channels, self.num_maps, self.frames = channels, hidden, maps, frames
        self.reconstruct, self.residual, self.zero_init, self.init = reconstruct, residual, zero_init, init
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.feature = Linear(channels, hidden, **dd)
        self.gather, self.distribute = (Linear(channels, maps, **dd) for _ in range(2))
        self.out = Linear(hidden, channels, **dd) if reconstruct else None
        if self.out is not None and (zero_init or init == "identity"):
            zero_init_(self.out)

    def forward(
        self, x: Float[Tensor, "b channels h w"], return_weights: bool = False
    ) -> Float[Tensor, "b out h w"] | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the map, or that and the weights (over positions, over descriptors), each (B, n, H, W)."""
        check_map(x, self.channels, 2)
        require(x.shape[0] % self.frames == 0, "a batch of {} is not a whole number of clips of frames={}", x.shape[0], self.frames)
        columns, size = x.flatten(2), x.shape[2:]
        if self.frames > 1:
            columns = x.unflatten(0, (-1, self.frames)).transpose(1, 2).flatten(2)
        layers, wide = (self.feature, self.gather, self.distribute), at_least_float32(x)
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        together = project_columns(columns, weight, bias)
        features, gather, distribute = together.split((self.hidden_channels, self.num_maps, self.num_maps), 1)
        gather, distribute = (logits.softmax(dim, wide).to(together.dtype) for logits, dim in ((gather, 2), (distribute, 1)))
        weight, bias = (None, None) if self.out is None else (self.out.weight, self.out.bias)
        out = project_distribute(project_gather(features, gather), distribute, weight, bias, onto=columns if self.residual else None)
        if not return_weights:
            return self._to_frames(out, size)
        return self._to_frames(out, size), (self._to_frames(gather, size), self._to_frames(distribute, size))

    def _to_frames(self, columns: Tensor, size: tuple[int, ...]) -> Tensor:
        """(clips, F, frames * N) -> (B, F, H, W)."""
        if self.frames == 1:
            return columns.unflatten(2, size)
        return columns.unflatten(2, (self.frames, *size)).transpose(1, 2).flatten(0, 1)
