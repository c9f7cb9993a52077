"""What a cell is to the scan: the names of its gates and weights, and the part of a step that needs no state.

Weights are a dictionary under torch's names (weight_ih, weight_hh, bias_ih, bias_hh) plus those of the options.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class LSTM:
    """State (h, c). Rows of the weights: i, f, g, o; f, g, o when coupled."""

    peephole: bool = False
    layer_norm: bool = False
    coupled: bool = False
    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o", "c")

    @property
    def key(self) -> str:
        """How the opaque operator is told which cell this is."""
        return "lstm" + "_peephole" * self.peephole + "_norm" * self.layer_norm + "_coupled" * self.coupled

    @property
    def fused(self) -> str | None:
        """torch's kernel for it."""
        return None if self.peephole or self.layer_norm or self.coupled else "lstm"

    def recurrent(self) -> tuple[str, ...]:
        """The weights that a step needs, in the order the implementations take them."""
        peepholes = ("peephole_f", "peephole_o") if self.coupled else ("peephole_f", "peephole_o", "peephole_i")
        norms = ("ln_hh.weight", "ln_hh.bias", "ln_c.weight", "ln_c.bias")
        return ("weight_hh", *(norms if self.layer_norm else ()), *(peepholes if self.peephole else ()))

    def project(self, x: Tensor, weights: Weights) -> Tensor:
        """All that the inputs and the biases give to the gates, for every step at once: (..., k H)."""
        if not self.layer_norm:
            bias = weights["bias_ih"] + weights["bias_hh"] if "bias_ih" in weights else None
            return F.linear(x, weights["weight_ih"], bias)
        a = F.linear(x, weights["weight_ih"])
        a = F.layer_norm(a, a.shape[-1:], weights["ln_ih.weight"], weights["ln_ih.bias"], EPS)
        return a + (weights["bias_ih"] + weights["bias_hh"]) if "bias_ih" in weights else a

    def unpack(self, states: list[Tensor], gates: Tensor) -> dict[str, Tensor]:
        """The gates by name."""
        parts = gates.unflatten(-1, (-1, states[0].shape[-1])).unbind(-2)
        if self.coupled:
            parts = (1 - parts[0], *parts)
        return dict(zip(self.gates, (*parts, states[1]), strict=True))


CELLS: dict[str, LSTM] = {cell.key: cell for cell in (LSTM(*options) for options in product((False, True), repeat=3))}
