r"""Pairwise self-attention: every pixel weighs its neighbours by a small network of the relation of the two features, with a vector of weights.

    y_i[c] = sum_j w_ij[c mod G] beta_j[c],   w_ij = softmax_j(W_2 relu(BN(W_1 relu(BN([delta(phi_i, psi_j), p_i - p_j])))) + b)

Zhao, Jia, Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020. arXiv:2004.13621.
phi, psi, beta are 1x1 convolutions, p learned places; the batch statistics run over batch, pixels and neighbours. The authors' code has only the
subtraction; the other relations are the paper's. Not in the paper: padding_mode, stride. With padding_mode="mask" pixels outside the map are in
no softmax and in no statistics.
B batch, C channels, R rel_channels, O out_channels, G = O / share weights, K = kernel_size^2 neighbours j of pixel i.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise
from ...ops._precision import at_least_float32
from ...ops.local_window import RELATIONS, Relation, check_reach, inside_map, relate, window_apply
from ...parts.affine_norm import affine_norm, check_statistics
from ...parts.linear import Linear
from ...parts.vector_attention import SAN_RULES, checked_sizes, features
from ...validate import check_map, check_option


class PairwiseSelfAttention(Mechanism):
    """Args:
    channels, out_channels, rel_channels: of the input, the output (None: channels // 4) and the features related (None: channels // 16, at least 1).
    share: how many channels have the same weight.
    kernel_size, stride, dilation: of the window (an odd side); the output has ceil(H / stride) x ceil(W / stride) pixels.
    relation: "subtraction", "summation", "concatenation", "hadamard" or "dot".
    position: two channels with the difference of the pixels' places.
    padding_mode: outside the map lies its mirror image ("reflect"), lie zeros ("zero", which take part in the softmax), or nothing ("mask").
    """

    card: ClassVar = Card(
        id="san_pairwise",
        layout="map",
        paper=Paper(
            title="Exploring Self-attention for Image Recognition",
            authors="Hengshuang Zhao, Jiaya Jia, Vladlen Koltun",
            venue="CVPR",
            year=2020,
            arxiv="2004.13621",
        ),
        source="hszhao/SAN@d88b022 model/san.py (MIT)",
        summary="A softmax over the neighbours, of a small network of pairwise relations, with different weights for different channels.",
        when="Instead of a convolution where the weights should depend on content and not on the order of the neighbours.",
        flops="2*B*N*channels*(2*rel_channels + out_channels) + (8*N if position else 0) + 2*B*ceil(H/stride)*ceil(W/stride)*kernel_size**2"
        "*(relation_channels*rel_channels + rel_channels*out_channels//share + out_channels + (rel_channels if relation == 'dot' else 0))",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "batch_statistics"}),
        uncertain="Relations other than the subtraction are in no public code.",
        example={"channels": 16, "out_channels": 16, "rel_channels": 4, "share": 4, "kernel_size": 3, "padding_mode": "zero"},
        variants=(
            {"channels": 32, "kernel_size": 3, "relation": "hadamard"},
            {"channels": 8, "out_channels": 8, "rel_channels": 3, "share": 4, "kernel_size": 3, "relation": "concatenation", "padding_mode": "mask"},
            {"channels": 16, "out_channels": 8, "share": 2, "kernel_size": 5, "relation": "dot", "stride": 2, "padding_mode": "zero"},
            {"channels": 8, "out_channels": 4, "share": 2, "kernel_size": 3, "dilation": 2, "relation": "summation", "position": False},
        ),
        place="B",
    )
    official: ClassVar = (KeyMap("hszhao/SAN", (*SAN_RULES, pointwise("conv_p.*", "places.*"))),)

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        rel_channels: int | None = None,
        *,
        share: int = 8,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        relation: Relation = "subtraction",
        position: bool = True,
        padding_mode: Literal["reflect", "zero", "mask"] = "reflect",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        sizes = checked_sizes(channels, out_channels, rel_channels, share, kernel_size, stride, dilation, padding_mode)
        out_channels, rel_channels, self.window = sizes
        check_option(relation, RELATIONS, "relation")
        self.channels, self.out_channels, self.rel_channels, self.share = channels, out_channels, rel_channels, share
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.relation: Relation = relation
        self.position, self.padding_mode = position, padding_mode
        self.relation_channels = {"dot": 1, "concatenation": 2 * rel_channels}.get(relation, rel_channels) + 2 * position
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.phi, self.psi, self.beta = (Linear(channels, width, **dd) for width in (rel_channels, rel_channels, out_channels))
        self.places = Linear(2, 2, **dd) if position else None
        self.norm1, self.fc1 = nn.BatchNorm2d(self.relation_channels, **dd), Linear(self.relation_channels, rel_channels, bias=False, **dd)
        self.norm2, self.fc2 = nn.BatchNorm2d(rel_channels, **dd), Linear(rel_channels, out_channels // share, **dd)

    def forward(
        self, x: Float[Tensor, "b channels h w"], *, return_weights: bool = False
    ) -> Float[Tensor, "b out_channels h_out w_out"] | tuple[Tensor, Tensor]:
        """Returns (B, O, H', W'), or that and the weights (B, G, K, H', W')."""
        check_map(x, self.channels)
        check_reach(self.window, *x.shape[-2:])
        pixels = x.shape[0] * -(-x.shape[2] // self.stride) * -(-x.shape[3] // self.stride)
        check_statistics(self.norm1, pixels * (1 if self.padding_mode == "mask" else self.kernel_size), "the pairs of a single pixel")
        phi, psi, beta = features(x, self.phi, self.psi, self.beta)
        pairs = relate(phi, psi, self.relation, self.window, self._places(x))
        pairs = pairs.affine(*affine_norm(self.norm1, pairs.statistics))
        scale, shift = affine_norm(self.norm2, lambda: pairs.through(self.fc1.weight))
        logits = pairs.map(self.fc1.weight * scale[:, None], shift, self.fc2.weight, self.fc2.bias)
        if self.padding_mode == "mask":
            logits = logits.masked_fill(inside_map(x, self.window) == 0, float("-inf"))
        weights = logits.softmax(2).to(beta.dtype)
        out = window_apply(weights, beta, self.window, groups="interleaved")
        return (out, weights) if return_weights else out

    def _places(self, x: Tensor) -> Tensor | None:
        """(2, H, W): the column and the row of each pixel, from -1 to 1, through the learned map."""
        if self.places is None:
            return None
        steps = [torch.arange(n, device=x.device, dtype=at_least_float32(x)) for n in x.shape[2:]]
        rows, columns = (2 * at / at.amax().clamp(min=1) - 1 for at in steps)
        grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).to(x.dtype)
        return self.places(grid).movedim(2, 0)
