r"""Long short-term memory: a cell that keeps, forgets and shows by gates.

    a = x W_ih^T + b_ih + h W_hh^T + b_hh;   i, f, o = sigmoid(a_i, a_f, a_o),   g = tanh(a_g)
    c' = f c + i g,   h' = o tanh(c')

Hochreiter, Schmidhuber, "Long Short-Term Memory", Neural Computation 1997; the forget gate is of Gers, Schmidhuber, Cummins 2000, peepholes
of Gers, Schraudolph, Schmidhuber 2002, layer norm of Ba, Kiros, Hinton 2016 (arXiv:1607.06450), i = 1 - f of Olah, "Understanding LSTM
Networks", 2015. Numbers and names are those of torch.nn.LSTMCell. B batch, T steps, I input_size, H hidden_size. A projection of h (proj_size)
is not offered.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...ops.recurrent_scan import LSTM
from ...parts.recurrent import Gates, State, add_parameters, check_sizes, keras_naming, run_sequence, run_step, torch_namings, zeros


class LSTMCell(Mechanism):
    """Args:
    input_size: width of the inputs.
    hidden_size: width of the state.
    bias: give the gates biases (two, as torch).
    layer_norm: normalise what input and state give to the gates, and the cell where it leaves.
    peephole: the gates see the cell: i and f the old one, o the new one.
    coupled: i = 1 - f, so there are three gates.
    forget_bias: what the forget gate's biases start at together; 1 keeps early gradients alive. None: torch's start, about 0.
    """

    card: ClassVar = Card(
        id="lstm_cell",
        layout="recurrent",
        paper=Paper(title="Long Short-Term Memory", authors="Sepp Hochreiter, Jürgen Schmidhuber", venue="Neural Computation", year=1997),
        source="torch.nn.LSTMCell 2.13 (BSD-3); options from the equations of their papers",
        summary="Gates decide what a memory cell keeps, takes in and shows; whole sequences or single steps, gates on request.",
        when="Streams and short sequences, constant memory per step, or to watch gates open and close.",
        flops="2*B*N*(input_size + hidden_size)*(3 if coupled else 4)*hidden_size",
        grows={"N": 1.0},
        can=frozenset({"mask", "step", "causal", "linear"}),
        checked_against="public",
        uncertain="Peepholes, layer norm and coupled gates were checked against the equations alone.",
        example={"input_size": 8, "hidden_size": 10},
        variants=(
            {"input_size": 7, "hidden_size": 9, "layer_norm": True, "peephole": True},
            {"input_size": 8, "hidden_size": 10, "coupled": True, "peephole": True, "forget_bias": 1.0},
            {"input_size": 8, "hidden_size": 6, "layer_norm": True, "bias": False},
        ),
        returns=("out", "h", "c", "gates"),
    )
    official: ClassVar = (*torch_namings("LSTM"), keras_naming("Keras LSTM", (0, 1, 2, 3)))

    weight_hh: nn.Parameter
    bias_ih: nn.Parameter
    bias_hh: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        layer_norm: bool = False,
        peephole: bool = False,
        coupled: bool = False,
        forget_bias: float | None = None,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes(input_size, hidden_size)
        require(forget_bias is None or bias, "forget_bias={} needs bias=True", forget_bias)
        self.input_size, self.hidden_size, self.bias, self.layer_norm = input_size, hidden_size, bias, layer_norm
        self.peephole, self.coupled, self.forget_bias = peephole, coupled, forget_bias
        self.cell = LSTM(peephole, layer_norm, coupled)
        add_parameters(self, bias=bias, layer_norm=layer_norm, device=device, dtype=dtype)
        for name in ("f", "o") if coupled else ("i", "f", "o"):
            if peephole:
                self.register_parameter(f"peephole_{name}", nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype)))
        if layer_norm:
            self.ln_c = nn.LayerNorm(hidden_size, device=device, dtype=dtype)
        if forget_bias is not None:
            forget = slice(0, hidden_size) if coupled else slice(hidden_size, 2 * hidden_size)
            with torch.no_grad():
                self.bias_ih[forget] = forget_bias - self.bias_hh[forget]

    def init_state(self, batch_size: int) -> State:
        """Zeros, each (B, H)."""
        return zeros(self, batch_size)

    def forward(
        self,
        x: Float[Tensor, "b t input_size"],
        state: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        return_gates: bool = False,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Gates]:
        """Run over a sequence from `state` (zeros if None). A False `mask` copies the state over that step.

        Returns h after every step (B, T, H) and the last (h, c), or those and the gates {"i", "f", "g", "o", "c"}, each (B, T, H).
        """
        return run_sequence(self, x, state, mask, return_gates)

    def step(
        self, x: Float[Tensor, "b input_size"], state: tuple[Tensor, Tensor] | None = None, *, return_gates: bool = False
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Gates]:
        """One time step: h and the state (h, c), or those and the gates, each (B, H)."""
        return run_step(self, x, state, return_gates)
