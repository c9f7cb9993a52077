"""What a cell is to the scan: the names of its state, gates and weights, and the part of a step that needs no state.

Weights are a dictionary under torch's names (weight_ih, weight_hh, bias_ih, bias_hh) plus those of the options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from .._linear import linear

EPS = 1e-5
NORM = ("ln_hh.weight", "ln_hh.bias")
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class RNN:
    """State h; no gates."""

    nonlinearity: str = "tanh"
    layer_norm: bool = False
    state: ClassVar[tuple[str, ...]] = ("h",)
    gates: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[int] = 1

    @property
    def key(self) -> str:
        """How the opaque operator is told which cell this is."""
        return f"rnn_{self.nonlinearity}" + "_norm" * self.layer_norm

    @property
    def fused(self) -> str | None:
        """torch's kernel for it."""
        return None if self.layer_norm else f"rnn_{self.nonlinearity}"

    def recurrent(self) -> tuple[str, ...]:
        """The weights that a step needs, in the order the implementations take them."""
        return ("weight_hh", *(NORM if self.layer_norm else ()))

    def unpack(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        """The gates by name, out of what a step or a scan gives: the state, and the gates if there are any."""
        return {}


@dataclass(frozen=True)
class GRU:
    """State h. Rows of the weights: r, z, n; f, n when minimal: r = f and z = 1 - f."""

    layer_norm: bool = False
    reset_after: bool = True
    minimal: bool = False
    bias: bool = True
    state: ClassVar[tuple[str, ...]] = ("h",)

    @property
    def gates(self) -> tuple[str, ...]:
        return ("f", "n") if self.minimal else ("r", "z", "n")

    @property
    def rows(self) -> int:
        return len(self.gates)

    @property
    def key(self) -> str:
        options = (self.layer_norm, not self.reset_after, self.minimal, not self.bias)
        return "gru" + "".join(name * on for name, on in zip(("_norm", "_before", "_minimal", "_bare"), options, strict=True))

    @property
    def fused(self) -> str | None:
        return "gru" if self.reset_after and not self.layer_norm and not self.minimal else None

    def recurrent(self) -> tuple[str, ...]:
        # Reset after the product, the gate multiplies the bias as well.
        return ("weight_hh", *(NORM if self.layer_norm else ()), *(("bias_hh",) if self.bias and self.reset_after else ()))

    def unpack(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.gates, found[1].unflatten(-1, (self.rows, -1)).unbind(-2), strict=True))


@dataclass(frozen=True)
class LSTM:
    """State (h, c). Rows of the weights: i, f, g, o; f, g, o when coupled."""

    peephole: bool = False
    layer_norm: bool = False
    coupled: bool = False
    state: ClassVar[tuple[str, ...]] = ("h", "c")
    gates: ClassVar[tuple[str, ...]] = ("i", "f", "g", "o", "c")

    @property
    def rows(self) -> int:
        return 3 if self.coupled else 4

    @property
    def key(self) -> str:
        return "lstm" + "_peephole" * self.peephole + "_norm" * self.layer_norm + "_coupled" * self.coupled

    @property
    def fused(self) -> str | None:
        return None if self.peephole or self.layer_norm or self.coupled else "lstm"

    def recurrent(self) -> tuple[str, ...]:
        peepholes = ("peephole_f", "peephole_o") if self.coupled else ("peephole_f", "peephole_o", "peephole_i")
        norms = (*NORM, "ln_c.weight", "ln_c.bias")
        return ("weight_hh", *(norms if self.layer_norm else ()), *(peepholes if self.peephole else ()))

    def unpack(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        parts = found[2].unflatten(-1, (self.rows, -1)).unbind(-2)
        if self.coupled:
            parts = (1 - parts[0], *parts)
        return dict(zip(self.gates, (*parts, found[1]), strict=True))


Cell = RNN | GRU | LSTM
_ALL: list[Cell] = [
    *(RNN(*options) for options in product(("tanh", "relu"), (False, True))),
    *(GRU(*options) for options in product((False, True), repeat=4) if options[1] or not options[0]),
    *(LSTM(*options) for options in product((False, True), repeat=3)),
]
CELLS: dict[str, Cell] = {cell.key: cell for cell in _ALL}


def free_bias(cell: Cell, weights: Weights) -> Tensor | None:
    """The sum of the biases that nothing multiplies. How a file splits it between the two shows nowhere."""
    free = [weights[name] for name in ("bias_ih", "bias_hh") if name in weights and name not in cell.recurrent()]
    return sum(free[1:], free[0]) if free else None


def project(cell: Cell, x: Tensor, weights: Weights) -> Tensor:
    """All that the inputs and the free biases give to the gates, for every step at once: (..., k H)."""
    bias = free_bias(cell, weights)
    if not cell.layer_norm:
        return linear(x, weights["weight_ih"], bias)
    a = linear(x, weights["weight_ih"])
    a = F.layer_norm(a, a.shape[-1:], weights["ln_ih.weight"], weights["ln_ih.bias"], EPS)
    return a if bias is None else a + bias
