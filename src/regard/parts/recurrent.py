"""What recurrent cells share: their parameters, their namings in circulation, and runs over a sequence or one step with the checks before.

A cell's module has `cell` (what ops.recurrent_scan calls a cell), `input_size` and `hidden_size`.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import require, require_type
from ..official import KeyMap, Rule, rename
from ..ops.recurrent_scan import Cell, run, step
from ..validate import check_floating, check_mask, check_tokens

State = Tensor | tuple[Tensor, Tensor]
Gates = dict[str, Tensor]


class HasCell(Protocol):
    input_size: int
    hidden_size: int
    weight_hh: nn.Parameter

    @property
    def cell(self) -> Cell: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def check_sizes(input_size: int, hidden_size: int) -> None:
    require(input_size > 0, "input_size={} must be at least 1", input_size)
    require(hidden_size > 0, "hidden_size={} must be at least 1", hidden_size)


def add_parameters(module: Any, *, bias: bool, layer_norm: bool, device: Any, dtype: Any) -> None:
    """Weights and biases under torch's names, started as torch does; ln_ih and ln_hh over what they give."""
    width, dd = module.hidden_size, {"device": device, "dtype": dtype}
    rows = module.cell.rows * width
    shapes = {"weight_ih": (rows, module.input_size), "weight_hh": (rows, width), "bias_ih": (rows,), "bias_hh": (rows,)}
    for name, shape in shapes.items():
        if bias or len(shape) > 1:
            module.register_parameter(name, nn.Parameter(nn.init.uniform_(torch.empty(shape, **dd), -(width**-0.5), width**-0.5)))
    if layer_norm:
        module.ln_ih, module.ln_hh = nn.LayerNorm(rows, **dd), nn.LayerNorm(rows, **dd)


def torch_namings(kind: str) -> tuple[KeyMap, KeyMap]:
    """Those of torch.nn's cell and of its layer: `kind` is "RNN", "GRU" or "LSTM"."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return KeyMap(f"torch.nn.{kind}Cell"), KeyMap(f"torch.nn.{kind}", tuple(rename(f"{name}_l0", name) for name in names))


def keras_naming(name: str, order: tuple[int, ...], *, two_biases: bool = False) -> KeyMap:
    """Kernels are transposed; theirs holds our gates in `order`, a permutation that is its own inverse; biases are one, or stacked."""

    def turned(t: Tensor) -> Tensor:
        """Gates along the last axis exchanged."""
        return t.unflatten(-1, (len(order), -1))[..., list(order), :].flatten(-2)

    def read_biases(tensors: list[Tensor], _: nn.Module) -> list[Tensor]:
        bias = turned(tensors[0])
        require(bias.ndim == 1 + two_biases, "{} has a bias of shape {}", name, tuple(bias.shape))
        return list(bias.unbind()) if two_biases else [bias, torch.zeros_like(bias)]

    def write_biases(tensors: list[Tensor], _: nn.Module) -> list[Tensor]:
        return [turned(torch.stack(tensors) if two_biases else tensors[0] + tensors[1])]

    kernels = [
        Rule((theirs,), (ours,), lambda t, _: [turned(t[0]).mT], lambda t, _: [turned(t[0].mT)])
        for theirs, ours in (("kernel", "weight_ih"), ("recurrent_kernel", "weight_hh"))
    ]
    return KeyMap(name, (*kernels, Rule(("bias",), ("bias_ih", "bias_hh"), read_biases, write_biases)))


def zeros(module: HasCell, batch_size: int) -> State:
    return _plain([module.weight_hh.new_zeros(batch_size, module.hidden_size) for _ in module.cell.state])


def run_sequence(
    module: HasCell, x: Tensor, state: State | None, mask: Tensor | None, return_gates: bool
) -> tuple[Tensor, State] | tuple[Tensor, State, Gates]:
    """x (B, T, I): h after every step and the last state, and the gates if asked for."""
    check_floating(x)
    width = module.input_size
    require(x.ndim == 3, "x must be (batch, time, {}), got {}; a single time step is step(x, state)", width, tuple(x.shape))
    check_tokens(x, width, option="input_size")
    check_mask(mask, *x.shape[:2], name="mask")
    start = _checked(module, state, x)
    out, last, gates = run(module.cell, x, start, dict(module.named_parameters()), mask=mask, gates=return_gates)
    return (out, _plain(last), gates) if return_gates else (out, _plain(last))


def run_step(module: HasCell, x: Tensor, state: State | None, return_gates: bool) -> tuple[Tensor, State] | tuple[Tensor, State, Gates]:
    """x (B, I): h and the state, and the gates if asked for."""
    check_floating(x)
    width = module.input_size
    require(x.ndim == 2, "x must be (batch, {}), got {}; a sequence is forward(x, state)", width, tuple(x.shape))
    require(x.shape[1] == width, "x has width {} but this module was made with input_size={}", x.shape[1], width)
    after, gates = step(module.cell, x, _checked(module, state, x), dict(module.named_parameters()))
    return (after[0], _plain(after), gates) if return_gates else (after[0], _plain(after))


def _plain(state: list[Tensor]) -> State:
    return state[0] if len(state) == 1 else (state[0], state[1])


def _checked(module: HasCell, state: State | None, x: Tensor) -> tuple[Tensor, ...]:
    names, want = module.cell.state, (x.shape[0], module.hidden_size)
    if state is None:
        return tuple(x.new_zeros(want) for _ in names)
    if len(names) == 1:
        require_type(isinstance(state, Tensor), "state must be the tensor h {}, got {}; only LSTMs have a pair", want, type(state).__name__)
    else:
        require_type(isinstance(state, tuple | list), "state must be the pair (h, c), got {}", type(state).__name__)
        require(len(state) == 2, "state must be the pair (h, c), got {} tensors", len(state))
    parts = (state,) if isinstance(state, Tensor) else tuple(state)
    for name, s in zip(names, parts, strict=True):
        check_floating(s, f"state's {name}")
        require(tuple(s.shape) == want, "state's {} must be (batch, hidden_size) = {}, got {}", name, want, tuple(s.shape))
    return parts
