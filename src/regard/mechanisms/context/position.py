r"""Position attention: every pixel of a map gathers from all pixels with similar keys.

    q = Wq x + bq,   k = Wk x + bk,   v = Wv x + bv,   out_i = x_i + gamma sum_j softmax_j(s q_i . k_j) v_j

Fu, Liu, Tian, Li, Bao, Fang, Lu, "Dual Attention Network for Scene Segmentation", CVPR 2019. arXiv:1809.02983.
s = 1: the scores are not scaled. In half precision large scores saturate the softmax: lower `scale`; None gives d^-1/2 (not in the paper).
B batch, C channels, H x W the map, N positions, d hidden_channels. The computation is in parts/dual_attention.py, which the dual head shares.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ...card import Card
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise
from ...parts.dual_attention import DANET, PositionBlock
from ...validate import check_map


class PositionAttention(PositionBlock, Mechanism):
    """Args:
    channels: of the input and the output.
    reduction, hidden_channels: queries and keys have hidden_channels channels, or channels // reduction if that is None.
    scale: factor on the scores; None gives hidden_channels ** -0.5.
    gamma_init: the gain gamma at the start.
    init: "identity" starts gamma at zero whatever gamma_init says.
    """

    card: ClassVar = Card(
        id="position",
        layout="map",
        paper=DANET,
        source="junfu1115/DANet@b0a0fa0 (MIT), encoding/nn/da_att.py::PAM_Module",
        summary="Every pixel gathers from all pixels with similar keys, by an unscaled softmax, onto itself.",
        when="Segmentation heads on maps of some thousand pixels; on larger ones criss_cross or asymmetric_non_local.",
        flops="2*B*N*channels*(2*hidden_channels + channels)"
        " + 2*B*N**2*(hidden_channels + channels if channels >= 64 else 2*max(hidden_channels, channels))",
        grows={"N": 2.0},
        can=frozenset({"weights", "rows", "row_stochastic", "permutation_equivariant", "identity_start"}),
        example={"channels": 16},
        variants=(
            {"channels": 64, "scale": None, "gamma_init": 0.5},
            {"channels": 11, "reduction": 5},
            {"channels": 10, "hidden_channels": 10, "init": "identity"},
        ),
        place="C",
    )
    official: ClassVar = (KeyMap("DANet", tuple(pointwise(f"{name}.*", f"{name}.*") for name in ("query_conv", "key_conv", "value_conv"))),)

    def forward(
        self, x: Float[Tensor, "b channels h w"], return_weights: bool = False
    ) -> Float[Tensor, "b channels h w"] | tuple[Float[Tensor, "b channels h w"], Float[Tensor, "b n n"]]:
        """Returns the map, or that and the weights (B, N, N), a row for each query, positions in row-major order."""
        check_map(x, self.channels)
        return super().forward(x, return_weights)

    def weights(self, x: Float[Tensor, "b channels h w"], *, queries: Tensor | None = None) -> Float[Tensor, "b r n"]:
        """The weights of R chosen positions alone, (B, R, N); of all if None."""
        check_map(x, self.channels)
        return super().weights(x, queries=queries)
