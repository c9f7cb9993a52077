r"""Elman's recurrent cell: the state is what the last state and the new input give, and nothing decides what it keeps.

    h' = act(W_ih x + b_ih + W_hh h + b_hh),   act = tanh or relu

J. Elman, "Finding Structure in Time", Cognitive Science 1990; layer norm of Ba, Kiros, Hinton 2016 (arXiv:1607.06450). Numbers and names are
those of torch.nn.RNNCell. B batch, T steps, I input_size, H hidden_size. Without gates, `return_gates` gives an empty dictionary: the option is
there so that the three cells are called alike.
"""

from typing import ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...mechanism import Mechanism
from ...ops.recurrent_scan import RNN
from ...parts.recurrent import Gates, State, add_parameters, check_sizes, keras_naming, run_sequence, run_step, torch_namings, zeros
from ...validate import check_option


class RNNCell(Mechanism):
    """Args:
    input_size: width of the inputs.
    hidden_size: width of the state.
    bias: two biases, as torch.
    layer_norm: normalise what input and state give, before the biases.
    nonlinearity: "tanh", or "relu", which keeps gradients whole but lets states grow.
    """

    card: ClassVar = Card(
        id="rnn_cell",
        layout="recurrent",
        paper=Paper(title="Finding Structure in Time", authors="Jeffrey L. Elman", venue="Cognitive Science", year=1990),
        source="torch.nn.RNNCell 2.13 (BSD-3); layer norm from its paper's equations",
        summary="One product and one nonlinearity a step: the recurrent cell without gates.",
        when="Short memories, or to see what gates are for.",
        flops="2*B*N*(input_size + hidden_size)*hidden_size",
        grows={"N": 1.0},
        can=frozenset({"mask", "step", "causal", "linear"}),
        checked_against="public",
        uncertain="Layer norm was checked against the equations alone.",
        example={"input_size": 8, "hidden_size": 10},
        variants=(
            {"input_size": 7, "hidden_size": 9, "nonlinearity": "relu"},
            {"input_size": 8, "hidden_size": 6, "layer_norm": True},
            {"input_size": 5, "hidden_size": 8, "layer_norm": True, "bias": False, "nonlinearity": "relu"},
        ),
        returns=("out", "h", "gates"),
    )
    official: ClassVar = (*torch_namings("RNN"), keras_naming("Keras SimpleRNN", (0,)))

    weight_hh: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        layer_norm: bool = False,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes(input_size, hidden_size)
        check_option(nonlinearity, ("tanh", "relu"), "nonlinearity")
        self.input_size, self.hidden_size, self.bias, self.layer_norm = input_size, hidden_size, bias, layer_norm
        self.nonlinearity = nonlinearity
        self.cell = RNN(nonlinearity, layer_norm)
        add_parameters(self, bias=bias, layer_norm=layer_norm, device=device, dtype=dtype)

    def init_state(self, batch_size: int) -> State:
        """Zeros (B, H)."""
        return zeros(self, batch_size)

    def forward(
        self,
        x: Float[Tensor, "b t input_size"],
        state: Float[Tensor, "b hidden_size"] | None = None,
        *,
        mask: Bool[Tensor, "b t"] | None = None,
        return_gates: bool = False,
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Gates]:
        """Run over a sequence from `state` (zeros if None). A False `mask` copies the state over that step.

        Returns h after every step (B, T, H) and the last h, or those and {}: there are no gates.
        """
        return run_sequence(self, x, state, mask, return_gates)

    def step(
        self, x: Float[Tensor, "b input_size"], state: Float[Tensor, "b hidden_size"] | None = None, *, return_gates: bool = False
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Gates]:
        """One time step: h, and h as the state; {} after them if gates are asked for."""
        return run_step(self, x, state, return_gates)
