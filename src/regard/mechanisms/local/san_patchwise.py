r"""Patchwise self-attention: the weights of a pixel's neighbours are predicted together, from the whole patch, by a small network.

    y_i[c] = sum_j w_i[c mod G, j] beta_j[c],   w_i = W_2 relu(BN(W_1 relu(BN(delta_i)))) + b

    delta_i = [phi_i, psi_j for all j] ("concatenation"),  phi_i . psi_j for all j ("star"),  phi_j . psi_l for all j, l ("clique")

Zhao, Jia, Koltun, "Exploring Self-attention for Image Recognition", CVPR 2020. arXiv:2004.13621.
There is no softmax: weights are free, and outputs grow with the window. The authors' code has only the concatenation, without stride or dilation; the
other relations are the paper's. Not in the paper: padding_mode, where "mask" is "zero" with weights of zero outside the map.
phi, psi, beta are 1x1 convolutions. B batch, C channels, R rel_channels, O out_channels, G = O / share weights, K = kernel_size^2 neighbours j, l.
"""

import warnings
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...mechanism import Mechanism
from ...official import KeyMap
from ...ops._precision import at_least_float32
from ...ops.local_window import Patches, Window, check_reach, inside_map, pad, pair_differences, window_apply, window_dots
from ...parts.affine_norm import affine_norm, check_statistics
from ...parts.linear import Linear
from ...parts.spatial import project_columns
from ...parts.vector_attention import SAN_RULES, checked_sizes, features
from ...validate import check_map, check_option


class PatchwiseSelfAttention(Mechanism):
    """Args:
    channels, out_channels, rel_channels: of the input, the output (None: channels // 4) and the features related (None: channels // 16, at least 1).
    share: how many channels have the same weight.
    kernel_size, stride, dilation: of the window (an odd side); the output has ceil(H / stride) x ceil(W / stride) pixels.
    relation: "concatenation", "star" or "clique".
    padding_mode: outside the map lies its mirror image ("reflect"), lie zeros ("zero"), or zeros with a weight of zero ("mask").
    """

    card: ClassVar = Card(
        id="san_patchwise",
        layout="map",
        paper=Paper(
            title="Exploring Self-attention for Image Recognition",
            authors="Hengshuang Zhao, Jiaya Jia, Vladlen Koltun",
            venue="CVPR",
            year=2020,
            arxiv="2004.13621",
        ),
        source="hszhao/SAN@d88b022 model/san.py (MIT)",
        summary="Predicts the kernel of every pixel from its whole patch: more than a convolution can do, and than weights of pairs can.",
        when="Instead of a convolution where the kernel should depend on content; the most accurate form of its paper.",
        flops="2*B*N*channels*(2*rel_channels + out_channels)"
        " + (2*B*(H + padding)*(W + padding)*(2*kernel_size - 1)**2*rel_channels if relation == 'clique' else 0)"
        " + 2*B*ceil(H/stride)*ceil(W/stride)*(relation_channels*out_channels//share + kernel_size**2*((out_channels//share)**2 + out_channels)"
        " + (kernel_size**2*rel_channels if relation == 'star' else 0))",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "batch_statistics"}),
        uncertain="Relations other than the concatenation are in no public code.",
        example={"channels": 16, "out_channels": 16, "rel_channels": 4, "share": 4, "kernel_size": 3, "padding_mode": "zero"},
        variants=(
            {"channels": 32, "kernel_size": 3, "relation": "star"},
            {"channels": 8, "out_channels": 8, "rel_channels": 3, "share": 4, "kernel_size": 3, "relation": "clique", "padding_mode": "mask"},
            {"channels": 16, "out_channels": 8, "share": 2, "kernel_size": 5, "stride": 2},
            {"channels": 8, "out_channels": 4, "rel_channels": 2, "share": 2, "kernel_size": 3, "dilation": 2, "stride": 2, "relation": "clique"},
        ),
        place="B",
    )
    official: ClassVar = (KeyMap("hszhao/SAN", SAN_RULES),)

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
        relation: Literal["concatenation", "star", "clique"] = "concatenation",
        padding_mode: Literal["reflect", "zero", "mask"] = "reflect",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        sizes = checked_sizes(channels, out_channels, rel_channels, share, kernel_size, stride, dilation, padding_mode)
        out_channels, rel_channels, self.window = sizes
        check_option(relation, ("concatenation", "star", "clique"), "relation")
        if relation == "clique" and kernel_size >= 7:
            warnings.warn(f"relation='clique' with kernel_size={kernel_size} relates {kernel_size**4} pairs at every pixel", stacklevel=2)
        self.padding = dilation * (kernel_size - 1)
        self.channels, self.out_channels, self.rel_channels, self.share = channels, out_channels, rel_channels, share
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.relation, self.padding_mode = relation, padding_mode
        count, groups = kernel_size**2, out_channels // share
        self.relation_channels = {"concatenation": rel_channels * (count + 1), "star": count, "clique": count**2}[relation]
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.phi, self.psi, self.beta = (Linear(channels, width, **dd) for width in (rel_channels, rel_channels, out_channels))
        self.norm1, self.fc1 = nn.BatchNorm2d(self.relation_channels, **dd), Linear(self.relation_channels, groups, bias=False, **dd)
        self.norm2, self.fc2 = nn.BatchNorm2d(groups, **dd), Linear(groups, count * groups, **dd)

    def forward(
        self, x: Float[Tensor, "b channels h w"], *, return_weights: bool = False
    ) -> Float[Tensor, "b out_channels h_out w_out"] | tuple[Tensor, Tensor]:
        """Returns (B, O, H', W'), or that and the weights (B, G, K, H', W')."""
        check_map(x, self.channels)
        check_reach(self.window, *x.shape[-2:])
        check_statistics(self.norm1, x.shape[0] * -(-x.shape[2] // self.stride) * -(-x.shape[3] // self.stride), "a single patch")
        phi, psi, beta = features(x, self.phi, self.psi, self.beta)
        hidden = self.norm2(self._joint(phi, psi).to(phi.dtype)).relu()
        weights = project_columns(hidden.flatten(2), self.fc2.weight, self.fc2.bias)
        weights = weights.unflatten(2, hidden.shape[2:]).unflatten(1, (hidden.shape[1], -1))
        if self.padding_mode == "mask":
            weights = weights * inside_map(x, self.window)
        out = window_apply(weights, beta, self.window, groups="interleaved")
        return (out, weights) if return_weights else out

    def _joint(self, phi: Tensor, psi: Tensor) -> Tensor:
        """W_1 relu(BN(delta)), (B, G, H', W')."""
        dtype = phi.dtype
        phi, psi = phi.to(at_least_float32(phi)), psi.to(at_least_float32(psi))
        here = phi[..., :: self.stride, :: self.stride]
        if self.relation == "star":
            delta = self.norm1(window_dots(here, psi, self.window).to(dtype)).relu()
            return project_columns(delta.flatten(2), self.fc1.weight).unflatten(2, delta.shape[2:])
        if self.relation == "clique":
            parts = [pair_differences(phi, psi, self.window)]
        else:
            parts = [Patches(here.transpose(0, 1), Window(1)), Patches(pad(psi.transpose(0, 1), self.window), self.window)]

        def statistics() -> tuple[Tensor, Tensor, Tensor]:
            means, variances, counts = zip(*(part.statistics() for part in parts), strict=True)
            return torch.cat(means), torch.cat(variances), counts[0]

        scale, shift = affine_norm(self.norm1, statistics)
        shares = (t.split([part.numbers for part in parts], -1) for t in (scale, shift, self.fc1.weight))
        joint = [part.accumulate(*share) for part, *share in zip(parts, *shares, strict=True)]
        return (joint[0] if len(joint) == 1 else joint[0] + joint[1]).transpose(0, 1)
