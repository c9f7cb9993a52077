r"""Co-attention: each of two maps is described anew by what the other one holds.

    S = Vb^T W Va (Nb, Na);   Za = Vb softmax over columns of S,   Zb = Va softmax over rows of S;   Z <- sigmoid(w_f Z + b_f) Z
    vanilla: W free     symmetric: W = P^T diag(d) P     channel: W = diag(d_b) diag(d_a);   Y = ReLU(BN(conv3x3([Z, V])))

Lu, Wang, Ma, Shen, Shao, Porikli, "See More, Know More: Unsupervised Video Object Segmentation with Co-Attention Siamese Networks",
CVPR 2019. arXiv:2001.06810. The authors' code has the vanilla form only, and no b_f; the other forms follow the paper. No scaling of S anywhere.
B batch, C channels, Na and Nb positions of the maps a and b.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise
from ...ops.pairwise_affinity import affinity_weights, pairwise_attention
from ...parts.linear import Linear
from ...parts.norm import check_batch_statistics
from ...parts.spatial import flatten_space, unflatten_space
from ...validate import check_floating, check_map, check_option

MODES, FUSIONS = ("vanilla", "symmetric", "channel"), ("conv", "concat", "none")
Pair = tuple[Tensor, Tensor]


class CoAttention(Mechanism):
    """Args:
    channels: of both maps.
    mode: the form of W.
    gate: weigh each summary by a gate, one number a position, shared by both maps.
    gate_bias: give the gate the paper's bias.
    fuse: what becomes of summary and map: "conv" (a convolution back to `channels`), "concat" (all 2 `channels`), "none" (the summary alone).
    """

    card: ClassVar = Card(
        id="co_attention",
        layout="pair",
        paper=Paper(
            title="See More, Know More: Unsupervised Video Object Segmentation with Co-Attention Siamese Networks",
            authors="Xiankai Lu, Wenguan Wang, Chao Ma, Jianbing Shen, Ling Shao, Fatih Porikli",
            venue="CVPR",
            year=2019,
            arxiv="2001.06810",
        ),
        source="carrierlxk/COSNet@549109d (no licence; vanilla form), equations of the paper (the other forms)",
        summary="Two maps attend to each other through one affinity, each gathering the other's features.",
        when="Two frames, two views, or a support and a query picture that share something to be found.",
        flops="(2*B*N*channels**2 if mode == 'vanilla' else 2*B*(N + M)*channels**2 if mode == 'symmetric' else 0) + 8*B*N*M*channels"
        " + (2*B*(N + M)*channels if gate else 0) + (36*B*(N + M)*channels**2 if fuse == 'conv' else 0)",
        grows={"N": 2.0},
        can=frozenset({"weights", "row_stochastic"}),
        example={"channels": 8},
        variants=(
            {"channels": 8, "mode": "symmetric", "gate_bias": True, "fuse": "concat"},
            {"channels": 6, "mode": "channel", "gate": False, "fuse": "none"},
        ),
        returns=("a", "b", "weights_a", "weights_b"),
        uncertain="The symmetric and channel forms, and the gate's bias, are in the paper alone.",
    )
    official: ClassVar = (KeyMap("COSNet", (pointwise("gate.*", "gate_proj.*"),), ignore=(r"encoder\..*", r"main_classifier[12]\..*", r"softmax.*")),)

    def __init__(
        self,
        channels: int,
        mode: Literal["vanilla", "symmetric", "channel"] = "vanilla",
        gate: bool = True,
        gate_bias: bool = False,
        fuse: Literal["conv", "concat", "none"] = "conv",
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(channels > 0, "channels={} must be at least 1", channels)
        check_option(mode, MODES, "mode")
        check_option(fuse, FUSIONS, "fuse")
        self.channels, self.mode, self.gate, self.gate_bias, self.fuse = channels, mode, gate, gate_bias, fuse
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if mode == "vanilla":
            self.linear_e = Linear(channels, channels, bias=False, **dd)
        elif mode == "symmetric":
            self.proj = Linear(channels, channels, bias=False, **dd)
            self.diag = nn.Parameter(torch.ones(channels, **dd))
            nn.init.orthogonal_(self.proj.weight)
        else:
            self.diag_a, self.diag_b = (nn.Parameter(torch.ones(channels, **dd)) for _ in range(2))
        self.gate_proj = Linear(channels, 1, gate_bias, **dd) if gate else None
        if self.gate_proj is not None:
            nn.init.normal_(self.gate_proj.weight, std=0.01)
            if gate_bias:
                nn.init.zeros_(self.gate_proj.bias)
        if fuse == "conv":
            self.conv1, self.conv2 = (nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False, **dd) for _ in range(2))
            self.bn1, self.bn2 = (nn.BatchNorm2d(channels, **dd) for _ in range(2))
            nn.init.normal_(self.conv1.weight, std=0.01)
            nn.init.normal_(self.conv2.weight, std=0.01)

    def forward(self, a: Float[Tensor, "b c ha wa"], b: Float[Tensor, "b c hb wb"], *, return_weights: bool = False) -> Pair | tuple[Pair, Pair]:
        """Returns (y_a, y_b), or that and the weights ((B, Na, Nb), (B, Nb, Na)), positions in row-major order."""
        check_map(a, self.channels, name="a")
        check_map(b, self.channels, name="b")
        require(a.shape[0] == b.shape[0], "a has batch {} but b has batch {}", a.shape[0], b.shape[0])
        self._check_statistics(a, b)
        rows_a, rows_b = flatten_space(a).contiguous(), flatten_space(b).contiguous()
        score_a, score_b = self._embed(rows_a, rows_b)
        if return_weights:
            weights = affinity_weights(score_a, score_b, "softmax"), affinity_weights(score_b, score_a, "softmax")
            z_a, z_b = weights[0] @ rows_b, weights[1] @ rows_a
        else:
            weights = None
            z_a, z_b = pairwise_attention(score_a, score_b, rows_b), pairwise_attention(score_b, score_a, rows_a)
        out = self._fuse(self._gate(z_a), a, 1), self._fuse(self._gate(z_b), b, 2)
        return out if weights is None else (out, weights)

    def forward_group(self, a: Float[Tensor, "b c ha wa"], bs: Float[Tensor, "b m c hb wb"]) -> Float[Tensor, "b c ha wa"]:
        """One map against M others: y_a with the mean of its M gated summaries in the place of one."""
        check_map(a, self.channels, name="a")
        check_floating(bs, "bs")
        fits = bs.ndim == 5 and bs.shape[0] == a.shape[0] and bs.shape[2] == self.channels and min(bs.shape) > 0
        require(fits, "bs must be ({}, frames, {}, height, width), got {}", a.shape[0], self.channels, tuple(bs.shape))
        self._check_statistics(a)
        rows_a, rows_b = flatten_space(a).contiguous(), flatten_space(bs.flatten(0, 1)).contiguous()
        score_a, score_b = self._embed(rows_a, rows_b)
        z = self._gate(pairwise_attention(score_a.repeat_interleave(bs.shape[1], 0), score_b, rows_b))
        return self._fuse(z.unflatten(0, (-1, bs.shape[1])).mean(1), a, 1)

    def orthogonality_loss(self, weight: float = 1e-4) -> Tensor:
        """weight || P P^T - I ||_F, to be added to the training loss; of mode "symmetric" alone. The norm is not named in the paper."""
        require(self.mode == "symmetric", "orthogonality_loss() is of mode='symmetric'; this module has mode={!r}", self.mode)
        p = self.proj.weight
        return weight * torch.linalg.matrix_norm(p @ p.mT - torch.eye(self.channels, device=p.device, dtype=p.dtype))

    def _embed(self, a: Tensor, b: Tensor) -> Pair:
        """Rows (B, Na, C), (B, Nb, C) whose inner products are the affinity."""
        if self.mode == "vanilla":
            return self.linear_e(a), b
        if self.mode == "symmetric":
            return self.proj(a) * self.diag, self.proj(b)
        return a * self.diag_a, b * self.diag_b

    def _gate(self, z: Tensor) -> Tensor:
        return z if self.gate_proj is None else z * self.gate_proj(z).sigmoid()

    def _fuse(self, z: Tensor, x: Tensor, side: Literal[1, 2]) -> Tensor:
        """The summary `z` (B, N, C) and its map `x`; side 1 is a, side 2 is b."""
        z = unflatten_space(z, x.shape[2:])
        if self.fuse == "none":
            return z
        both = torch.cat([z, x], 1)
        if self.fuse == "concat":
            return both
        conv, norm = (self.conv1, self.bn1) if side == 1 else (self.conv2, self.bn2)
        return F.relu(norm(conv(both)))

    def _check_statistics(self, *maps: Tensor) -> None:
        for x in maps if self.fuse == "conv" else ():
            check_batch_statistics(self.bn1, x.numel() // self.channels, "a batch of one 1 x 1 map", "fuse")
