"""Linear layers whose weight is a direction and one number for its length, and the names torch gives the two."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..official import Rule, rename
from ..ops._linear import linear


class WeightNormLinear(nn.Module):
    """x W^T + b with W = g v / ||v||: g a scalar, ||v|| the Frobenius norm of the whole matrix (torch's weight norm with dim=None).

    A scalar commutes with the product, so W is never made: the result is scaled instead.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__()
        start = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        self.weight_v, self.bias = start.weight, start.bias
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(start.weight.detach()))

    def forward(self, x: Tensor) -> Tensor:
        product = linear(x, self.weight_v)
        return torch.addcmul(self.bias.to(product.dtype), product, self.gain().to(product.dtype))

    def gain(self) -> Tensor:
        """g / ||v||, a scalar."""
        return self.weight_g / torch.linalg.vector_norm(self.weight_v)

    def weight(self) -> Tensor:
        """W, for those who need the matrix itself."""
        return self.weight_v * self.gain()

    def extra_repr(self) -> str:
        return f"{self.weight_v.shape[1]}, {self.weight_v.shape[0]}"


def weight_norm_rules(
    theirs: str, ours: str, weight: str = "weight", bias: str = "bias", shape: Callable[[Tensor], Tensor] | None = None
) -> dict[str, tuple[Rule, ...]]:
    """{style: rules} for a layer named `theirs` that is our WeightNormLinear `ours`.

    The styles are torch's: "weight_v" of the old hook, "parametrizations" of the new one. `weight` and `bias` are the attributes' names there;
    `shape` gives a tensor of ours the axes of theirs.
    """

    def tie(name: str, own: str) -> Rule:
        if shape is None or own == "weight_g":
            return rename(f"{theirs}.{name}", f"{ours}.{own}")
        theirs_of = shape

        def read(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
            return [tensors[0].reshape(module.get_parameter(f"{ours}.{own}").shape)]

        return Rule((f"{theirs}.{name}",), (f"{ours}.{own}",), read, lambda tensors, _: [theirs_of(tensors[0])])

    new = f"parametrizations.{weight}.original"
    styles = {"weight_v": (f"{weight}_v", f"{weight}_g"), "parametrizations": (f"{new}1", f"{new}0")}
    return {style: (tie(v, "weight_v"), tie(g, "weight_g"), tie(bias, "bias")) for style, (v, g) in styles.items()}
