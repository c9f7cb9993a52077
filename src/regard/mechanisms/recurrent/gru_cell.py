r"""Gated recurrent unit: one gate resets what the candidate sees of the state, another mixes the two.

    r, z = sigmoid(a_r + b_r, a_z + b_z),   n = tanh(a_n + r b_n),   h' = (1 - z) n + z h,   a = W_ih x + b_ih,   b = W_hh h + b_hh

K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014 (arXiv:1406.1078); J. Chung et al. 2014 (arXiv:1412.3555).
Numbers and names are those of torch.nn.GRUCell, which resets after the recurrent product, as cuDNN; reset_after=False resets the state before it,
n = tanh(a_n + W_hn (r h) + b_hn), as Cho et al. Many texts exchange z and 1 - z; neither of the two does. Layer norm is of Ba, Kiros, Hinton 2016
(arXiv:1607.06450); the minimal unit, r = f and z = 1 - f with rows f, n, of Zhou et al. 2016 (arXiv:1603.09420).
B batch, T steps, I input_size, H hidden_size.
"""

from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap
from ...ops.recurrent_scan import GRU
from ...parts.recurrent import Gates, State, add_parameters, check_sizes, keras_naming, run_sequence, run_step, torch_namings, zeros

_TITLE = "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation"


class GRUCell(Mechanism):
    """Args:
    input_size: width of the inputs.
    hidden_size: width of the state.
    bias: give the gates biases (two, as torch).
    layer_norm: normalise what input and state give to the gates, before the biases. Needs reset_after.
    reset_after: the reset gate multiplies what the state gives, bias and all, instead of the state.
    minimal: one gate f in place of both.
    """

    card: ClassVar = Card(
        id="gru_cell",
        layout="recurrent",
        paper=Paper(title=_TITLE, authors="Kyunghyun Cho, Bart van Merriënboer, Caglar Gulcehre et al.", venue="EMNLP", year=2014, arxiv="1406.1078"),
        source="torch.nn.GRUCell 2.13 (BSD-3); options from the equations of their papers",
        summary="Two gates decide what of the state is seen and what is kept; whole sequences or single steps, gates on request.",
        when="As lstm_cell, with three quarters of its weights and one state.",
        flops="2*B*N*(input_size + hidden_size)*(2 if minimal else 3)*hidden_size",
        grows={"N": 1.0},
        can=frozenset({"mask", "step", "causal", "linear"}),
        checked_against="public",
        uncertain="Resetting before the product, layer norm and the minimal unit were checked against the equations alone.",
        example={"input_size": 8, "hidden_size": 10},
        variants=(
            {"input_size": 7, "hidden_size": 9, "layer_norm": True},
            {"input_size": 6, "hidden_size": 8, "reset_after": False},
            {"input_size": 8, "hidden_size": 6, "minimal": True, "bias": False},
            {"input_size": 5, "hidden_size": 8, "minimal": True, "reset_after": False},
        ),
        returns=("out", "h", "gates"),
    )
    # Keras' order is z, r, n.
    official: ClassVar = (*torch_namings("GRU"), keras_naming("Keras GRU", (1, 0, 2), two_biases=True))

    weight_hh: nn.Parameter

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        layer_norm: bool = False,
        reset_after: bool = True,
        minimal: bool = False,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes(input_size, hidden_size)
        require(reset_after or not layer_norm, "layer_norm={} needs reset_after=True: it normalises the whole recurrent product", layer_norm)
        self.input_size, self.hidden_size, self.bias, self.layer_norm = input_size, hidden_size, bias, layer_norm
        self.reset_after, self.minimal = reset_after, minimal
        self.cell = GRU(layer_norm, reset_after, minimal, bias)
        add_parameters(self, bias=bias, layer_norm=layer_norm, device=device, dtype=dtype)

    def key_maps(self) -> tuple[KeyMap, ...]:
        """torch resets after the product, Keras does either with biases of either shape; nobody else's unit is minimal."""
        if self.minimal:
            return ()
        return self.official if self.reset_after else (keras_naming("Keras GRU, reset_after=False", (1, 0, 2)),)

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

        Returns h after every step (B, T, H) and the last h, or those and the gates {"r", "z", "n"} ({"f", "n"} when minimal), each (B, T, H).
        """
        return run_sequence(self, x, state, mask, return_gates)

    def step(
        self, x: Float[Tensor, "b input_size"], state: Float[Tensor, "b hidden_size"] | None = None, *, return_gates: bool = False
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Gates]:
        """One time step: h, and h as the state, or those and the gates, each (B, H)."""
        return run_step(self, x, state, return_gates)
