r"""Channel attention of DANet: channels are mixed by how they correlate over the positions; no parameter but one gain.

    E = X X^T,   A = softmax(-E) over rows,   out = gamma A X + X,   X (C, N)

Fu, Liu, Tian, Li, Bao, Fang, Lu, "Dual Attention Network for Scene Segmentation", CVPR 2019. arXiv:1809.02983.
The paper has A = softmax(E): a channel attends to those most like it. The authors' code takes softmax(rowmax(E) - E), which is softmax(-E), the
channels least like it, and they kept it because it trained better: `invert=True`. E is a sum over positions without a mean, so results depend
on the resolution and the scale of x. B batch, C channels, N positions. The computation is in parts/dual_attention.py, which the dual head shares.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ...card import Card
from ...mechanism import Mechanism
from ...official import KeyMap
from ...parts.dual_attention import DANET, ChannelBlock
from ...validate import check_map


class ChannelAffinity(ChannelBlock, Mechanism):
    """Args:
    channels: of the input and the output, which has as many spatial axes as the input.
    invert: attend to the channels least alike (the authors' code) rather than most alike (the paper).
    gamma_init: the gain gamma at the start.
    init: "identity" starts gamma at zero whatever gamma_init says.
    """

    card: ClassVar = Card(
        id="channel_affinity",
        layout="map",
        paper=DANET,
        source="junfu1115/DANet@b0a0fa0 (MIT), encoding/nn/da_att.py::CAM_Module",
        summary="Mixes the channels of a map by their correlation over its positions.",
        when="Beside position attention, or alone where N x N is too much: its cost is linear in the positions.",
        flops="4*B*N*channels**2",
        grows={"N": 1.0},
        can=frozenset({"weights", "row_stochastic", "linear", "any_dims", "permutation_equivariant", "identity_start"}),
        example={"channels": 16},
        variants=({"channels": 10, "gamma_init": -0.5}, {"channels": 8, "gamma_init": 0.5, "init": "identity"}),
        place="A",
    )
    official: ClassVar = (KeyMap("DANet"),)

    def forward(
        self, x: Float[Tensor, "b channels *space"], return_weights: bool = False
    ) -> Float[Tensor, "b channels *space"] | tuple[Float[Tensor, "b channels *space"], Float[Tensor, "b channels channels"]]:
        """(B, C, *space) -> the same shape, or that and the weights A (B, C, C)."""
        check_map(x, self.channels, None)
        return super().forward(x, return_weights)
