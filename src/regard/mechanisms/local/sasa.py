r"""Stand-alone self-attention: every pixel attends to the k x k window around it, in place of a convolution.

    y_p = sum_ab softmax_ab(q_p . k_{p+ab} + q_p . r_ab) v_{p+ab},   r_ab = [column part of b; row part of a],   a, b = -(k // 2) .. k - 1 - k // 2
    stem: v_{p+ab} = sum_m softmax_m((e_row(a) + e_col(b)) . nu_m) W_m x_{p+ab}

Ramachandran, Parmar, Vaswani, Bello, Levskaya, Shlens, "Stand-Alone Self-Attention in Vision Models", NeurIPS 2019. arXiv:1906.05909.
No code was released; we follow the equations. Pixels outside the map take part as zero keys and values. Not in the paper: mask_border, bias, and two
`logit_reduce` that public codes compute. B batch, C channels, O out_channels, N heads of width d = O / N, H, W the map's sides, k kernel_size.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, rename
from ...ops.local_window import Window, window_attention, window_attention_weights
from ...validate import check_divisible, check_map, check_option


def _read_positions(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    size = int(module.kernel_size)  # type: ignore[arg-type]
    why = "the mixture class of MerHS/SASA-pytorch has an embedding for every place of one padded image, not for the {} of a window"
    require(tensors[0].shape[-1] == size, why + ": its files fit no module that takes maps of any size", size)
    return tensors


def _table(theirs: str, ours: str, axis: int) -> Rule:
    """A table (channels, 1, 1, k, 1) or (channels, 1, 1, 1, k) of theirs that is (channels, k) of ours."""
    shape = [1, 1, 1]
    shape.insert(axis - 1, -1)
    return Rule((theirs,), (ours,), lambda t, module: [t[0].flatten(1)], lambda t, module: [t[0].reshape(len(t[0]), *shape)])


class StandAloneSelfAttention(Mechanism):
    """Args:
    channels, out_channels: channels of the input and the output; out_channels=None means `channels`.
    kernel_size, num_heads: side of the window, even ones begin one further up and left; number of heads.
    stride, downsample: 1, or s for windows at every s-th pixel ("stride"), or for means of s x s outputs ("avgpool", the paper's).
    grouped: each head is projected from its own group of channels, else from all.
    bias: a bias on the output.
    relative, rel_shared: the term q . r; one table for all heads, else one for each.
    value_mixtures: M value projections mixed by the place in the window: the attention stem. None for one projection.
    mask_border: leave pixels outside the map out of the softmax.
    logit_reduce: products are summed over a head ("head"), over all heads ("all", MerHS), or not at all, so that every channel has weights of its own
        ("channel", leaderj1001; there tables of its own are rows for the first half of the channels, columns for the second).
    """

    card: ClassVar = Card(
        id="sasa",
        layout="map",
        paper=Paper(
            title="Stand-Alone Self-Attention in Vision Models",
            authors="Prajit Ramachandran, Niki Parmar, Ashish Vaswani, Irwan Bello, Anselm Levskaya, Jonathon Shlens",
            venue="NeurIPS",
            year=2019,
            arxiv="1906.05909",
        ),
        source="MerHS/SASA-pytorch@7d11385 (MIT), leaderj1001/Stand-Alone-Self-Attention@a983f0f (MIT)",
        summary="Softmax attention of every pixel to the window around it, with relative positions.",
        when="In place of the 3x3 convolutions of the later stages: a large window whose number of parameters does not grow with it.",
        flops="2*B*H*W*channels*out_channels/(num_heads if grouped else 1)*(1 + (value_mixtures if value_mixtures else 1))"
        " + 2*B*ceil(H/query_stride)*ceil(W/query_stride)*out_channels*(channels/(num_heads if grouped else 1)"
        " + kernel_size**2*(1 + (value_mixtures if value_mixtures else 1)) + (2*kernel_size if relative else 0))"
        " + (4*value_mixtures*head_dim*kernel_size if value_mixtures else 0)",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear"}),
        checked_against="equations",
        uncertain="The authors released no code, and no public code equals the paper for several heads; one head equals MerHS.",
        example={"channels": 16, "kernel_size": 3, "num_heads": 4},
        variants=(
            {"channels": 6, "out_channels": 16, "kernel_size": 4, "num_heads": 2, "grouped": False, "value_mixtures": 3, "relative": False},
            {"channels": 8, "kernel_size": 5, "num_heads": 2, "logit_reduce": "all", "rel_shared": False, "mask_border": True},
            {"channels": 8, "kernel_size": 3, "num_heads": 2, "logit_reduce": "channel", "rel_shared": False, "bias": True},
            {"channels": 52, "kernel_size": 7, "num_heads": 1, "relative": False},
        ),
        place="B",
    )
    official: ClassVar = (
        KeyMap("MerHS/SASA-pytorch", tuple(Rule((name,), (name,), _read_positions) for name in ("emb_x", "emb_y"))),
        KeyMap(
            "leaderj1001/Stand-Alone-Self-Attention",
            (
                *(rename(f"{name}_conv.*", f"weight_{name}.*") for name in ("query", "key", "value")),
                rename("value_conv.*", "weight_values.*"),
                _table("rel_h", "relative_y", 3),
                _table("rel_w", "relative_x", 4),
                rename("emb_b", "emb_x"),
                rename("emb_a", "emb_y"),
                rename("emb_mix", "emb_m"),
            ),
        ),
    )

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int = 7,
        num_heads: int = 8,
        *,
        stride: int = 1,
        downsample: Literal["stride", "avgpool"] = "stride",
        grouped: bool = True,
        bias: bool = False,
        relative: bool = True,
        rel_shared: bool = True,
        value_mixtures: int | None = None,
        mask_border: bool = False,
        logit_reduce: Literal["head", "all", "channel"] = "head",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        require(min(channels, out_channels) > 0, "channels={} and out_channels={} must be at least 1", channels, out_channels)
        require(kernel_size > 0, "kernel_size={} must be at least 1", kernel_size)
        require(stride > 0, "stride={} must be at least 1", stride)
        check_divisible(out_channels, num_heads, "out_channels", "num_heads")
        if grouped:
            require(channels % num_heads == 0, "channels={} is not divisible by num_heads={}; or give grouped=False", channels, num_heads)
        check_option(downsample, ("stride", "avgpool"), "downsample")
        check_option(logit_reduce, ("head", "all", "channel"), "logit_reduce")
        require(value_mixtures is None or value_mixtures > 0, "value_mixtures={} must be None or at least 1", value_mixtures)
        self.channels, self.out_channels, self.kernel_size, self.num_heads = channels, out_channels, kernel_size, num_heads
        self.stride, self.downsample, self.grouped = stride, downsample, grouped
        self.relative, self.rel_shared, self.value_mixtures = relative, rel_shared, value_mixtures
        self.mask_border, self.logit_reduce = mask_border, logit_reduce
        self.head_dim, self.query_stride = out_channels // num_heads, stride if downsample == "stride" else 1
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def projection() -> nn.Conv2d:
            conv = nn.Conv2d(channels, out_channels, 1, groups=num_heads if grouped else 1, bias=False, **dd)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            return conv

        self.weight_query, self.weight_key = projection(), projection()
        if value_mixtures is None:
            self.weight_value = projection()
        else:
            self.weight_values = nn.ModuleList(projection() for _ in range(value_mixtures))
            self.emb_x, self.emb_y = (nn.Parameter(torch.randn(self.head_dim, kernel_size, **dd)) for _ in range(2))
            self.emb_m = nn.Parameter(torch.randn(value_mixtures, self.head_dim, **dd))
        if relative:
            # Columns take the first half of a head; with weights for each channel and tables of their own, the second half of all channels.
            self.halves = not rel_shared and logit_reduce == "channel"
            width = out_channels if self.halves else self.head_dim
            first, second = width // 2, width - width // 2
            heads = () if rel_shared or self.halves else (num_heads,)
            self.relative_x = nn.Parameter(torch.randn(*heads, second if self.halves else first, kernel_size, **dd))
            self.relative_y = nn.Parameter(torch.randn(*heads, first if self.halves else second, kernel_size, **dd))
        self.bias = nn.Parameter(torch.zeros(1, out_channels, 1, 1, **dd)) if bias else None

    def key_maps(self) -> tuple[KeyMap, ...]:
        """leaderj1001's tables belong to channels: the first half of all has rows, the second columns."""
        merhs, leaderj = self.official
        per_channel = self.logit_reduce == "channel" and not self.rel_shared
        return (merhs, leaderj) if per_channel or not self.relative else (merhs,)

    def forward(
        self, x: Float[Tensor, "b channels h w"], *, return_weights: bool = False
    ) -> Float[Tensor, "b out_channels h_out w_out"] | tuple[Tensor, Tensor]:
        """Returns (B, O, ceil(H / stride), ceil(W / stride)), or that and the weights.

        The weights are (B, N, k ** 2, H', W'), or (B, O, k ** 2, H', W') with logit_reduce="channel"; those before the means of "avgpool".
        """
        check_map(x, self.channels)
        mean = self.stride if self.downsample == "avgpool" else 1
        require(min(x.shape[2:]) >= mean, "x must be a map of at least {} pixels a side for its means, got {}", mean, tuple(x.shape))
        heads = {"head": self.num_heads, "all": 1, "channel": self.out_channels}[self.logit_reduce]
        s = self.query_stride
        q = self.weight_query(x[..., ::s, ::s] if s > 1 else x).unflatten(1, (heads, -1))
        k = self.weight_key(x).unflatten(1, (heads, -1))
        v, mix = self.values(x, heads)
        window = Window(self.kernel_size, s, padding="mask" if self.mask_border else "zero")
        rel = self.tables(heads) if self.relative else None
        out = window_attention(q, k, v, window, rel=rel, mix=mix).flatten(1, 2)
        out = F.avg_pool2d(out, mean) if mean > 1 else out
        out = out if self.bias is None else out + self.bias
        if not return_weights:
            return out
        weights = window_attention_weights(q, k, window, rel=rel)
        return out, weights.expand(-1, self.num_heads, -1, -1, -1) if self.logit_reduce == "all" else weights

    def values(self, x: Tensor, heads: int) -> tuple[Tensor, Tensor | None]:
        """(B, heads, M channels, H, W), and how they mix at each place of the window, (M, k ** 2)."""
        if self.value_mixtures is None:
            return self.weight_value(x).unflatten(1, (heads, -1)), None
        v = torch.stack([value(x).unflatten(1, (heads, -1)) for value in self.weight_values], 2).flatten(2, 3)
        place = (self.emb_m @ self.emb_y)[:, :, None] + (self.emb_m @ self.emb_x)[:, None]
        return v, place.softmax(0).flatten(1)

    def tables(self, heads: int) -> tuple[Tensor, Tensor]:
        """The vectors r of the rows and of the columns of the window, (k, d) or (heads, k, d): zero in the half of the other."""
        rows, columns = self.relative_y.mT, self.relative_x.mT
        before, after = rows.shape[-1], columns.shape[-1]
        if self.halves:
            rows, columns = F.pad(rows, (0, after)), F.pad(columns, (before, 0))
        else:
            rows, columns = F.pad(rows, (after, 0)), F.pad(columns, (0, before))
        if heads == self.num_heads and self.logit_reduce == "head":
            return rows, columns
        if not self.halves:  # the tables of all heads side by side, (k, O)
            copies = self.num_heads if self.rel_shared else 1
            rows, columns = (t.movedim(-2, 0).flatten(1).repeat(1, copies) for t in (rows, columns))
        return (rows, columns) if heads == 1 else (rows.mT[..., None], columns.mT[..., None])
