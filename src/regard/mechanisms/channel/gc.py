r"""Global context: one attention pooling for all positions, whose result is added to, or gates, every position.

    a = softmax_n(w x_n + b),   c = sum_n a_n x_n,   T(c) = W2 relu(LN(W1 c + b1)) + b2,   out = x sigmoid(T_mul(c)) + T_add(c)

Cao, Xu, Lin, Wei, Hu, "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCV Workshops 2019. arXiv:1904.11492.
Either term can be left out, multiplication always comes first, and c is taken from the input in both. b has no effect, since a softmax
ignores shifts, and is kept for loading.  B batch, C channels, N positions, h hidden_channels.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, pointwise, rename
from ...ops.squeeze import attention_pool, position_mean
from ...parts.gates import gate_function
from ...parts.linear import Linear
from ...parts.norm import zero_init_
from ...parts.squeeze import BottleneckMLP, hidden_width, unsqueeze_like
from ...validate import check_map, check_option


def _transform(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The authors' transform: 1x1 convolutions, and a LayerNorm of shape (h, 1, 1)."""
    norm = Rule((f"{theirs}.1.*",), (f"{ours}.norm.*",), lambda t, module: [t[0].flatten()], lambda t, module: [t[0].reshape(-1, 1, 1)])
    return pointwise(f"{theirs}.0.*", f"{ours}.fc1.*"), norm, pointwise(f"{theirs}.3.*", f"{ours}.fc2.*")


class GlobalContext(Mechanism):
    """Args:
    channels: of the map.
    reduction, hidden_channels: the hidden width is channels // reduction, or hidden_channels; at least 2, or its norm leaves nothing.
    pool: "att" (softmax over positions) or "avg".
    fusion: any of "mul" and "add"; one name alone may be given as a string.
    zero_init: the last layers start at zero: "add" changes nothing, "mul" halves the map.
    init: "identity" starts as the identity: the last layers at zero, the gate of "mul" doubled so that it is exactly one there.
    """

    card: ClassVar = Card(
        id="gc",
        layout="map",
        paper=Paper(
            title="GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond",
            authors="Yue Cao, Jiarui Xu, Stephen Lin, Fangyun Wei, Han Hu",
            venue="ICCV Workshops",
            year=2019,
            arxiv="1904.11492",
        ),
        source="xvjiarui/GCNet@029db54 (Apache-2.0)",
        summary="Pools the whole map by one attention and adds the transformed result to every position.",
        when="The effect of a non-local block at the price of squeeze-and-excitation; insertion that starts as the identity.",
        flops="(4*B*channels*N if pool == 'att' else 0) + 4*B*channels*hidden_channels*num_terms",
        grows={"N": 1.0},
        can=frozenset({"weights", "linear", "any_dims", "permutation_equivariant", "identity_start", "gate"}),
        unless={"weights": "pool == 'avg'", "gate": "fusion != ('mul',)"},
        example={"channels": 16, "reduction": 4},
        variants=(
            {"channels": 12, "hidden_channels": 5, "fusion": ("mul", "add"), "zero_init": False},
            {"channels": 8, "reduction": 2, "fusion": "mul"},
        ),
        place="A",
    )
    official: ClassVar = (
        KeyMap(
            "xvjiarui/GCNet",
            (
                pointwise("conv_mask.*", "mask.*"),
                *_transform("channel_mul_conv", "mlp_mul"),
                *_transform("channel_add_conv", "mlp_add"),
            ),
        ),
        KeyMap(
            "timm",
            (
                pointwise("conv_attn.*", "mask.*"),
                *(pointwise(f"mlp_scale.{layer}.*", f"mlp_mul.{layer}.*") for layer in ("fc1", "fc2")),
                *(pointwise(f"mlp_add.{layer}.*", f"mlp_add.{layer}.*") for layer in ("fc1", "fc2")),
                rename("mlp_scale.norm.*", "mlp_mul.norm.*"),
            ),
        ),
    )

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        hidden_channels: int | None = None,
        pool: Literal["att", "avg"] = "att",
        fusion: Sequence[str] = ("add",),
        zero_init: bool = True,
        init: Literal["default", "identity"] = "default",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        fusion = (fusion,) if isinstance(fusion, str) else tuple(fusion)
        check_option(pool, ("att", "avg"), "pool")
        require(len(fusion) > 0, "fusion={} must name at least one of mul, add", fusion)
        for term in fusion:
            check_option(term, ("mul", "add"), "fusion")
        self.channels, self.reduction, self.pool, self.fusion, self.zero_init, self.init = channels, reduction, pool, fusion, zero_init, init
        self._gate = gate_function("sigmoid", init=init)
        self.hidden_channels = hidden_width(channels, reduction, hidden_channels, least=2)
        self.num_terms = len(set(fusion))
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if pool == "att":
            self.mask = Linear(channels, 1, **dd)
            nn.init.kaiming_normal_(self.mask.weight, mode="fan_in")
            nn.init.zeros_(self.mask.bias)
        self.mlp_mul = BottleneckMLP(channels, self.hidden_channels, norm=nn.LayerNorm, **dd) if "mul" in fusion else None
        self.mlp_add = BottleneckMLP(channels, self.hidden_channels, norm=nn.LayerNorm, **dd) if "add" in fusion else None
        for mlp in (self.mlp_mul, self.mlp_add):
            if mlp is not None and (zero_init or init == "identity"):
                zero_init_(mlp.fc2)

    def forward(self, x: Float[Tensor, "b channels *space"], return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """(B, C, *space) -> the same shape, or that and a (B, 1, *space), None for pool="avg"."""
        context, attention = self._context(x)
        out = x
        if self.mlp_mul is not None:
            out = out * unsqueeze_like(self._gate(self.mlp_mul(context)), x)
        if self.mlp_add is not None:
            out = out + unsqueeze_like(self.mlp_add(context), x)
        return (out, attention) if return_weights else out

    def gate(self, x: Float[Tensor, "b channels *space"]) -> Tensor:
        """The gate alone, (B, C, 1, ...), where fusion is "mul" alone."""
        require(self.fusion == ("mul",), "fusion={} is more than a gate; gate(x) needs fusion=('mul',)", self.fusion)
        assert self.mlp_mul is not None
        return unsqueeze_like(self._gate(self.mlp_mul(self._context(x)[0])), x)

    def _context(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        check_map(x, self.channels, None)
        if self.pool == "att":
            return attention_pool(x, self.mask.weight.squeeze(0), self.mask.bias)
        return position_mean(x), None
