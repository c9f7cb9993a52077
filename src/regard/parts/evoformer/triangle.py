"""Updates of a pair from the two other sides of its triangles: a product of edges (algorithms 11 and 12) and attention (13 and 14)."""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...ops.shared_bias_attention import row_attention, row_weights
from ...ops.triangle_multiplication import triangle_product
from ...validate import check_option
from .checks import check_pair, check_widths
from .layers import GatedAttention, linear


class TriangleMultiplication(nn.Module):
    """z_ij gathers a_ik b_jk over all k ("outgoing" edges), or a_ki b_kj ("incoming")."""

    def __init__(self, pair_dim: int, hidden_dim: int = 128, mode: str = "outgoing", **dd: Any) -> None:
        super().__init__()
        check_widths(pair_dim=pair_dim, hidden_dim=hidden_dim)
        check_option(mode, ("outgoing", "incoming"), "mode")
        self.pair_dim, self.mode = pair_dim, mode
        self.linear_a_p, self.linear_b_p = linear(pair_dim, hidden_dim, **dd), linear(pair_dim, hidden_dim, **dd)
        self.linear_a_g, self.linear_b_g = linear(pair_dim, hidden_dim, "gate", **dd), linear(pair_dim, hidden_dim, "gate", **dd)
        self.linear_g, self.linear_z = linear(pair_dim, pair_dim, "gate", **dd), linear(hidden_dim, pair_dim, "final", **dd)
        self.layer_norm_in, self.layer_norm_out = nn.LayerNorm(pair_dim, **dd), nn.LayerNorm(hidden_dim, **dd)

    def forward(self, pair: Float[Tensor, "b n n z"], pair_mask: Bool[Tensor, "b n n"] | None = None) -> Float[Tensor, "b n n z"]:
        check_pair(pair, self.pair_dim, pair_mask)
        layers = self.linear_a_p, self.linear_b_p, self.linear_a_g, self.linear_b_g, self.layer_norm_out, self.linear_z, self.linear_g
        a, b, gate_a, gate_b, norm, out, gate = ((layer.weight, layer.bias) for layer in layers)
        outgoing = self.mode == "outgoing"
        return triangle_product(self.layer_norm_in(pair), pair_mask, (a, b), (gate_a, gate_b), norm, out, gate, outgoing=outgoing)


class TriangleAttention(nn.Module):
    """Edge ij attends over the edges ik that "start" at i, with a bias from jk; or over kj, with a bias from ki ("ending"): the same, transposed."""

    def __init__(self, pair_dim: int, head_dim: int = 32, num_heads: int = 4, mode: str = "starting", **dd: Any) -> None:
        super().__init__()
        check_widths(pair_dim=pair_dim, head_dim=head_dim, num_heads=num_heads)
        check_option(mode, ("starting", "ending"), "mode")
        self.pair_dim, self.num_heads, self.mode = pair_dim, num_heads, mode
        self.layer_norm = nn.LayerNorm(pair_dim, **dd)
        self.linear = linear(pair_dim, num_heads, "normal", False, **dd)
        self.mha = GatedAttention(pair_dim, head_dim, num_heads, **dd)

    def forward(self, pair: Float[Tensor, "b n n z"], pair_mask: Bool[Tensor, "b n n"] | None = None) -> Float[Tensor, "b n n z"]:
        z, bias, mask = self._scored(pair, pair_mask)
        return self._turned(row_attention(z, *self.mha.operands, self.num_heads, bias=bias, mask=mask))

    def weights(self, pair: Tensor, pair_mask: Tensor | None = None, *, queries: Tensor | None = None) -> Tensor:
        """(B, N, H, N, N): node i (or the ending node), head, queries, keys; for chosen queries, (B, N, H, chosen, N)."""
        z, bias, mask = self._scored(pair, pair_mask)
        return row_weights(z, *self.mha.operands[:2], self.num_heads, bias=bias, mask=mask, queries=queries)

    def _scored(self, pair: Tensor, pair_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        check_pair(pair, self.pair_dim, pair_mask)
        z = self.layer_norm(pair)
        return self._turned(z), self._turned(self.linear(z)).movedim(3, 1), None if pair_mask is None else self._turned(pair_mask)

    def _turned(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) if self.mode == "ending" else x
