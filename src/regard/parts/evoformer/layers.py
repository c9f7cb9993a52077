"""Linear layers as AlphaFold 2 starts them, and its gated attention's parameters."""

from typing import Any, Literal

from torch import Tensor, nn

from ..linear import Linear

Start = Literal["default", "relu", "glorot", "gate", "final", "normal"]


def linear(into: int, out: int, start: Start = "default", bias: bool = True, **dd: Any) -> nn.Linear:
    """Weights: LeCun's truncated normal or, before a ReLU, He's; Glorot's uniform; zero for gates (bias 1) and ends; normal for biases of scores."""
    layer = Linear(into, out, bias, **dd)
    match start:
        case "glorot":
            nn.init.xavier_uniform_(layer.weight)
        case "gate" | "final":
            nn.init.zeros_(layer.weight)
        case "normal":
            nn.init.normal_(layer.weight, std=into**-0.5)
        case _:
            std = ((2.0 if start == "relu" else 1.0) / into) ** 0.5 / 0.87962566103423978  # the deviation that cutting at 2 leaves of 1
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if bias:
        nn.init.constant_(layer.bias, 1.0 if start == "gate" else 0.0)
    return layer


class GatedAttention(nn.Module):
    """The projections of gated attention: queries, keys and values without biases, gates and output with them."""

    def __init__(self, dim: int, head_dim: int, num_heads: int, shared_keys: bool = False, **dd: Any) -> None:
        super().__init__()
        width = head_dim * num_heads
        keys = head_dim if shared_keys else width
        self.linear_q = linear(dim, width, "glorot", False, **dd)
        self.linear_k = linear(dim, keys, "glorot", False, **dd)
        self.linear_v = linear(dim, keys, "glorot", False, **dd)
        self.linear_g = linear(dim, width, "gate", **dd)
        self.linear_o = linear(width, dim, "final", **dd)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weights of q, k, v, and the layers of gates and output, as `ops.shared_bias_attention` takes them."""
        q, k, v, g, o = self.linear_q, self.linear_k, self.linear_v, self.linear_g, self.linear_o
        return q.weight, k.weight, v.weight, (g.weight, g.bias), (o.weight, o.bias)
