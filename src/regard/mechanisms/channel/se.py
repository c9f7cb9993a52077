r"""Squeeze-and-Excitation: every channel is scaled by a gate computed from the means of all channels.

    s = mean_n x_n,   g = sigmoid(W2 relu(W1 s + b1) + b2),   out = g x

Hu, Shen, Albanie, Sun, Wu, "Squeeze-and-Excitation Networks", CVPR 2018. arXiv:1709.01507.
The paper's equations have no biases, the authors' released networks have them: `bias` is True by default.
Not in the paper: pool="max" and "avg_max", other activations and gates.  B batch, C channels, N positions, h hidden_channels.
"""

from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from ...card import Card, Paper
from ...mechanism import Mechanism
from ...official import KeyMap, pointwise, rename
from ...parts.gates import gate_function, options_repr
from ...parts.norm import zero_init_
from ...parts.squeeze import BottleneckMLP, hidden_width, pool_global, unsqueeze_like
from ...validate import check_map, check_option


class SqueezeExcitation(Mechanism):
    """Args:
    channels: of the map.
    reduction, hidden_channels: the hidden width is channels // reduction, or hidden_channels (timm rounds it up to a multiple of 8).
    bias: biases in both layers.
    pool: "avg", "max" or "avg_max" (half of each).
    act: activation of the hidden layer.
    gate: "sigmoid" or "hard_sigmoid".
    init: "identity" starts as the identity: the last layer at zero, the gate doubled so that it is exactly one there.
    """

    card: ClassVar = Card(
        id="se",
        layout="map",
        paper=Paper(
            title="Squeeze-and-Excitation Networks",
            authors="Jie Hu, Li Shen, Samuel Albanie, Gang Sun, Enhua Wu",
            venue="CVPR",
            year=2018,
            arxiv="1709.01507",
        ),
        source="hujie-frank/SENet@0262d43 (Apache-2.0), run as moskomule/senet.pytorch@8cb2669 (MIT)",
        summary="Scales every channel by a gate computed from the means of all channels.",
        when="The default cheap addition to any convolutional network.",
        flops="4*B*channels*hidden_channels",
        grows={"N": 0.0},
        can=frozenset({"weights", "linear", "any_dims", "permutation_equivariant", "gate", "identity_start"}),
        checked_against="public",
        uncertain="The authors' Caffe networks were not run; their biases are the default, the paper's equations have none.",
        example={"channels": 16, "reduction": 4},
        variants=(
            {"channels": 12, "hidden_channels": 5, "bias": False, "pool": "avg_max"},
            {"channels": 8, "reduction": 2, "pool": "max", "gate": "hard_sigmoid", "act": "silu"},
        ),
        place="A",
    )
    official: ClassVar = (
        KeyMap("moskomule/senet.pytorch", (rename("fc.0.*", "mlp.fc1.*"), rename("fc.2.*", "mlp.fc2.*"))),
        KeyMap("timm", (pointwise("fc1.*", "mlp.fc1.*"), pointwise("fc2.*", "mlp.fc2.*"))),
        KeyMap("hujie-frank/SENet (Caffe)", (pointwise("1x1_down.*", "mlp.fc1.*"), pointwise("1x1_up.*", "mlp.fc2.*"))),
    )

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        hidden_channels: int | None = None,
        bias: bool = True,
        pool: Literal["avg", "max", "avg_max"] = "avg",
        act: str = "relu",
        gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid",
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(pool, ("avg", "max", "avg_max"), "pool")
        self.channels, self.reduction, self.bias, self.pool, self.act, self.init = channels, reduction, bias, pool, act, init
        self.hidden_channels = hidden_width(channels, reduction, hidden_channels)
        self.gate_kind, self._gate = gate, gate_function(gate, init=init)
        self.mlp = BottleneckMLP(channels, self.hidden_channels, bias=bias, act=act, device=device, dtype=dtype)
        if init == "identity":
            zero_init_(self.mlp.fc2)

    def forward(self, x: Float[Tensor, "b channels *space"], return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, *space) -> the same shape, or that and the gate (B, C, 1, ...)."""
        gate = self.gate(x)
        out = x * gate
        return (out, gate) if return_weights else out

    def gate(self, x: Float[Tensor, "b channels *space"]) -> Tensor:
        """The gate alone, (B, C, 1, ...): a block can fuse it with its addition, `shortcut + x * module.gate(x)`."""
        check_map(x, self.channels, None)
        return unsqueeze_like(self._gate(self.mlp(pool_global(x, self.pool))), x)

    def extra_repr(self) -> str:
        return options_repr(self, "channels", "reduction", "hidden_channels", "bias", "pool", "act", "init")
