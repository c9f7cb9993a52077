"""OpenFold's plain torch path of AlphaFold 2's pieces, re-expressed for timing: the same operations in the same order, on the same weights."""

from typing import Any

import torch
from torch import Tensor, nn

from regard.official import to_official


class _Tree(nn.Module):
    """Modules and parameters under OpenFold's names, taken from one of ours."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        for key, value in to_official(ours, "OpenFold").items():
            at: nn.Module = self
            *path, name = key.split(".")
            for step in path:
                if step not in at._modules:
                    at.add_module(step, nn.Module())
                at = at._modules[step]  # type: ignore[assignment]
            at.register_parameter(name, nn.Parameter(value.detach().clone()))


def linear(x: Tensor, layer: Any) -> Tensor:
    return nn.functional.linear(x, layer.weight, getattr(layer, "bias", None))


def normed(x: Tensor, layer: Any) -> Tensor:
    return nn.functional.layer_norm(x, (x.shape[-1],), layer.weight, layer.bias, 1e-5)


def attention(x: Tensor, layer: Any, heads: int, biases: list[Tensor]) -> Tensor:
    """Heads to the front as views, all logits at once, biases added in place, softmax, product, gate, output."""
    q, k, v = (linear(x, part).view(*x.shape[:-1], heads, -1).transpose(-2, -3) for part in (layer.linear_q, layer.linear_k, layer.linear_v))
    q = q / q.shape[-1] ** 0.5
    weights = torch.matmul(q, k.permute(0, 1, 2, 4, 3))
    for bias in biases:
        weights += bias
    o = torch.matmul(torch.softmax(weights, -1), v).transpose(-2, -3)
    gate = linear(x, layer.linear_g).sigmoid()
    return linear((o * gate.view(*gate.shape[:-1], heads, -1)).flatten(-2), layer.linear_o)


def triangle_attention(tree: Any, pair: Tensor, heads: int, ending: bool) -> Tensor:
    pair = pair.transpose(-2, -3) if ending else pair
    mask = pair.new_ones(pair.shape[:-1])
    x = normed(pair, tree.layer_norm)
    hidden = (1e9 * (mask - 1))[..., :, None, None, :]
    out = attention(x, tree.mha, heads, [hidden, linear(x, tree.linear).permute(0, 3, 1, 2).unsqueeze(-4)])
    return out.transpose(-2, -3) if ending else out


def triangle_multiplication(tree: Any, pair: Tensor, incoming: bool) -> Tensor:
    mask = pair.new_ones(pair.shape[:-1]).unsqueeze(-1)
    z = normed(pair, tree.layer_norm_in)
    a = mask * linear(z, tree.linear_a_g).sigmoid() * linear(z, tree.linear_a_p)
    b = mask * linear(z, tree.linear_b_g).sigmoid() * linear(z, tree.linear_b_p)
    if incoming:
        a, b = a.permute(0, 3, 2, 1), b.permute(0, 3, 1, 2)
    else:
        a, b = a.permute(0, 3, 1, 2), b.permute(0, 3, 2, 1)
    x = torch.matmul(a, b).permute(0, 2, 3, 1)
    return linear(normed(x, tree.layer_norm_out), tree.linear_z) * linear(z, tree.linear_g).sigmoid()


def outer_product_mean(tree: Any, msa: Tensor) -> Tensor:
    mask = msa.new_ones(msa.shape[:-1]).unsqueeze(-1)
    m = normed(msa, tree.layer_norm)
    a, b = ((linear(m, layer) * mask).transpose(-2, -3) for layer in (tree.linear_1, tree.linear_2))
    outer = linear(torch.einsum("...bac,...dae->...bdce", a, b).flatten(-2), tree.linear_out)
    return outer / (torch.einsum("...abc,...adc->...bdc", mask, mask) + 1e-3)


def transition(tree: Any, x: Tensor) -> Tensor:
    return linear(linear(normed(x, tree.layer_norm), tree.linear_1).relu(), tree.linear_2) * x.new_ones(x.shape[:-1]).unsqueeze(-1)


def msa_row(tree: Any, msa: Tensor, pair: Tensor, heads: int) -> Tensor:
    hidden = (1e9 * (msa.new_ones(msa.shape[:-1]) - 1))[..., :, None, None, :]
    bias = linear(normed(pair, tree.layer_norm_z), tree.linear_z).permute(0, 3, 1, 2).unsqueeze(-4)
    return attention(normed(msa, tree.layer_norm_m), tree.mha, heads, [hidden, bias])


def msa_column(tree: Any, msa: Tensor, heads: int) -> Tensor:
    turned, own = msa.transpose(-2, -3), tree._msa_att
    hidden = (1e9 * (turned.new_ones(turned.shape[:-1]) - 1))[..., :, None, None, :]
    return attention(normed(turned, own.layer_norm_m), own.mha, heads, [hidden]).transpose(-2, -3)


class OpenFold(_Tree):
    """Any part but ipa and global columns, without masks and without dropout."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__(ours)
        self.part, self.mode, self.heads = ours.part, ours.mode, ours.num_heads  # type: ignore[assignment]
        self.msa_heads, self.pair_heads = ours.msa_heads, ours.pair_heads  # type: ignore[assignment]

    def forward(self, *inputs: Tensor) -> Any:
        match self.part:
            case "triangle_attention":
                return triangle_attention(self, *inputs, self.heads, self.mode == "ending")
            case "triangle_multiplication":
                return triangle_multiplication(self, *inputs, self.mode == "incoming")
            case "outer_product_mean":
                return outer_product_mean(self, *inputs)
            case "msa_row":
                return msa_row(self, *inputs, self.heads)
            case "msa_column":
                return msa_column(self, *inputs, self.heads)
            case "pair_transition" | "msa_transition":
                return transition(self, *inputs)
        return self.block(*inputs)

    def block(self, msa: Tensor, pair: Tensor) -> tuple[Tensor, Tensor]:
        stack: Any = self.pair_stack
        msa = msa + msa_row(self.msa_att_row, msa, pair, self.msa_heads)
        msa = msa + msa_column(self.msa_att_col, msa, self.msa_heads)
        msa = msa + transition(self.msa_transition, msa)
        pair = pair + outer_product_mean(self.outer_product_mean, msa)
        pair = pair + triangle_multiplication(stack.tri_mul_out, pair, False)
        pair = pair + triangle_multiplication(stack.tri_mul_in, pair, True)
        pair = pair + triangle_attention(stack.tri_att_start, pair, self.pair_heads, False)
        pair = pair + triangle_attention(stack.tri_att_end, pair, self.pair_heads, True)
        return msa, pair + transition(stack.pair_transition, pair)


def _openfold(ours: Any) -> nn.Module | None:
    return None if ours.part in ("ipa", "msa_column_global") else OpenFold(ours)


PEERS = {"evoformer": {"OpenFold, plain torch": _openfold}}
