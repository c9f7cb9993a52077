r"""HaloNet blocked local attention: the queries of a b x b block of the map share one window of b + 2h pixels a side.

    out_p = sum_j softmax_j(scale q_p . k_j + P_pj) v_j,   P_pj = q_p . R[i - y + win - 1] + q_p . C[j - x + win - 1],   win = b + 2h

Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens, "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
CVPR 2021. arXiv:2103.12731. No code was released; we follow timm: pixels outside the map take part as zero keys, there is no output projection,
and with stride 2 the relative places count the remaining queries. Not in timm: maps that are no multiple of the block, mask_border, out_proj.
(y, x) is the place of query p in its block, (i, j) that of the key in its window; B batch, H, W the map's sides.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise, rename
from ...ops._dispatch import on_cpu
from ...ops.local_window import Window, window_attention, window_attention_weights
from ...validate import check_divisible, check_map, check_option


def _round8(width: float) -> int:
    """The nearest multiple of 8, at least 8 and not below 0.9 width: the rounding of timm's widths."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


def _linear(theirs: str, ours: str) -> Rule:
    """A linear layer of theirs that is a 1x1 convolution of ours: `pointwise` the other way round."""
    back = pointwise(ours, theirs, 2)
    return Rule((theirs,), (ours,), back.write, back.read)


def _pair_heads(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    """A linear layer, all keys, then all values -> a convolution, the keys and values of each head in turn."""
    heads, k, v = (int(getattr(module, name)) for name in ("num_heads", "qk_head_dim", "v_head_dim"))
    keys, values = tensors[0].split([heads * k, heads * v])
    w = torch.cat([keys.unflatten(0, (heads, k)), values.unflatten(0, (heads, v))], 1).flatten(0, 1)
    return [w[..., None, None] if w.ndim == 2 else w]


def _part_heads(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    heads, k, v = (int(getattr(module, name)) for name in ("num_heads", "qk_head_dim", "v_head_dim"))
    w = tensors[0].flatten(1) if tensors[0].ndim == 4 else tensors[0]
    keys, values = w.unflatten(0, (heads, k + v)).split([k, v], 1)
    return [torch.cat([keys.flatten(0, 1), values.flatten(0, 1)])]


class HaloAttention(Mechanism):
    """Args:
    channels, out_channels: channels of the input and the output; out_channels=None means `channels`.
    num_heads: number of heads.
    block_size, halo_size: side of a block; how far its window reaches beyond it. block_size=1 gives every pixel its own window.
    stride: 1, or 2 to halve the map: queries at every second pixel, or a 2 x 2 mean of all outputs if `avg_down` or the block is odd.
    qk_head_dim, v_head_dim: widths of a head; None means out_channels qk_ratio, rounded to a multiple of 8, // num_heads; out_channels // num_heads.
    qkv_bias: biases of the projections.
    scale_pos_embed: scale the relative term as well.
    mask_border: leave pixels outside the map out of the softmax.
    out_proj: a linear layer on the output, with bias.
    """

    card: ClassVar = Card(
        id="halo",
        layout="map",
        paper=Paper(
            title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
            authors="Ashish Vaswani, Prajit Ramachandran, Aravind Srinivas, Niki Parmar, Blake Hechtman, Jonathon Shlens",
            venue="CVPR",
            year=2021,
            arxiv="2103.12731",
        ),
        source="huggingface/pytorch-image-models timm/layers/halo_attn.py (Apache-2.0), lucidrains/halonet-pytorch (MIT)",
        summary="Local softmax attention in which a block of pixels shares one window, so that all work is dense matrix products.",
        when="In place of the 3x3 convolutions of the later stages of a residual network; maps too large for global attention.",
        flops="2*B*H*W*channels*(num_heads*qk_head_dim*(1 + 1/query_stride**2) + num_heads*v_head_dim)"
        " + 2*B*num_heads*ceil(H/block_size)*ceil(W/block_size)*(block_size//query_stride)**2"
        "*(window**2*(qk_head_dim + v_head_dim) + 2*(window + block_size//query_stride - 1)*qk_head_dim)"
        " + (2*B*(H//stride)*(W//stride)*num_heads*v_head_dim*out_channels if out_proj else 0)",
        grows={"N": 1.0},
        can=frozenset({"weights", "row_stochastic", "linear"}),
        checked_against="public",
        uncertain="The authors released no code; that padding takes part in the softmax follows timm, the paper is silent.",
        example={"channels": 16, "num_heads": 2, "block_size": 4, "halo_size": 1},
        variants=(
            {"channels": 8, "num_heads": 2, "block_size": 3, "halo_size": 2, "mask_border": True, "scale_pos_embed": True, "out_proj": True},
            {"channels": 16, "out_channels": 24, "num_heads": 3, "block_size": 1, "halo_size": 1, "qk_ratio": 0.5, "qkv_bias": True},
        ),
        place="B",
    )
    official: ClassVar = (
        KeyMap("timm", tuple(rename(f"pos_embed.{side}_rel", f"{side}_rel") for side in ("height", "width"))),
        KeyMap(
            "lucidrains/halonet-pytorch",
            (
                _linear("to_q.*", "q.*"),
                Rule(("to_kv.*",), ("kv.*",), _pair_heads, _part_heads),
                _linear("to_out.*", "out.*"),
                *(rename(f"rel_pos_emb.rel_{side}", f"{side}_rel") for side in ("height", "width")),
            ),
        ),
    )

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        qk_head_dim: int | None = None,
        v_head_dim: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        mask_border: bool = False,
        out_proj: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        require(min(channels, out_channels) > 0, "channels={} and out_channels={} must be at least 1", channels, out_channels)
        if v_head_dim is None:
            check_divisible(out_channels, num_heads, "out_channels", "num_heads")
        require(num_heads > 0, "num_heads={} must be at least 1", num_heads)
        require(block_size > 0 and halo_size >= 0, "block_size={} must be positive, halo_size={} not negative", block_size, halo_size)
        check_option(stride, (1, 2), "stride")
        self.channels, self.out_channels, self.num_heads = channels, out_channels, num_heads
        self.block_size, self.halo_size = block_size, halo_size
        self.stride, self.qk_ratio, self.qkv_bias, self.avg_down = stride, qk_ratio, qkv_bias, avg_down
        self.scale_pos_embed, self.mask_border, self.out_proj = scale_pos_embed, mask_border, out_proj
        self.qk_head_dim = _round8(out_channels * qk_ratio) // num_heads if qk_head_dim is None else qk_head_dim
        self.v_head_dim = out_channels // num_heads if v_head_dim is None else v_head_dim
        smallest = min(self.qk_head_dim, self.v_head_dim)
        require(smallest > 0, "qk_head_dim={} and v_head_dim={} must be at least 1; give them", self.qk_head_dim, self.v_head_dim)
        self.query_stride = 1 if avg_down or block_size % stride else stride
        self.window, self.scale = block_size + 2 * halo_size, self.qk_head_dim**-0.5
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        width, value_width = num_heads * self.qk_head_dim, num_heads * self.v_head_dim
        self.q = nn.Conv2d(channels, width, 1, stride=self.query_stride, bias=qkv_bias, **dd)
        self.kv = nn.Conv2d(channels, width + value_width, 1, bias=qkv_bias, **dd)
        self.height_rel = nn.Parameter(torch.empty(2 * self.window - 1, self.qk_head_dim, **dd))
        self.width_rel = nn.Parameter(torch.empty(2 * self.window - 1, self.qk_head_dim, **dd))
        self.out = nn.Conv2d(value_width, out_channels, 1, **dd) if out_proj else None
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=channels**-0.5)
        for rel in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(rel, std=self.scale)

    def forward(
        self, x: Float[Tensor, "b channels h w"], *, return_weights: bool = False
    ) -> Float[Tensor, "b out_channels h_out w_out"] | tuple[Tensor, Tensor]:
        """Returns (B, num_heads v_head_dim or out_channels, H, W), halved with stride 2; or that and the weights.

        The weights are (B, num_heads, block rows, block columns, queries of a block, window ** 2).
        """
        check_map(x, self.channels)
        if self.stride == 2:
            for name, size in zip(("height", "width"), x.shape[2:], strict=True):
                require(size % self.block_size == 0, "{}={} must be a multiple of block_size={} with stride=2", name, size, self.block_size)
        rows_first = not x.is_contiguous(memory_format=torch.channels_last)
        if on_cpu(x):  # faster 1x1 convolutions, and the windows of a channels-last map are runs of memory
            x = x.contiguous(memory_format=torch.channels_last)
        q = self.q(x).unflatten(1, (self.num_heads, -1))
        k, v = self.kv(x).unflatten(1, (self.num_heads, -1)).split([self.qk_head_dim, self.v_head_dim], 2)
        window = Window(self.window, self.query_stride, padding="mask" if self.mask_border else "zero", offset_first=-self.halo_size)
        rel, rel_scale = (self.height_rel, self.width_rel), self.scale if self.scale_pos_embed else 1.0
        way: dict[str, Any] = {"block": self.block_size, "rel": rel, "scale": self.scale, "rel_scale": rel_scale}
        out = window_attention(q, k, v, window, **way).flatten(1, 2)
        out = F.avg_pool2d(out, 2) if self.query_stride < self.stride else out
        out = out if self.out is None else self.out(out)
        out = out.contiguous() if rows_first else out
        return (out, window_attention_weights(q, k, window, **way)) if return_weights else out
