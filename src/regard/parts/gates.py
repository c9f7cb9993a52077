"""Gates (a number in [0, 1] from a logit) and activations, by name."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..validate import check_option

Pointwise = Callable[[Tensor], Tensor]

# hard_sigmoid is relu6(x + 3) / 6.
GATES: Mapping[str, Pointwise] = MappingProxyType({"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid})
ACTIVATIONS: Mapping[str, Pointwise] = MappingProxyType(
    {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "hard_swish": F.hardswish, "leaky_relu": F.leaky_relu, "tanh": torch.tanh}
)


INITS = ("default", "identity")


def gate_function(kind: str, name: str = "gate", init: str = "default") -> Pointwise:
    """The gate; with init="identity" twice the gate, so that a logit of zero multiplies by exactly one."""
    check_option(kind, tuple(GATES), name)
    check_option(init, INITS, "init")
    return GATES[kind] if init == "default" else partial(_twice, GATES[kind])


def _twice(gate: Pointwise, logit: Tensor) -> Tensor:
    return 2 * gate(logit)


def activation(kind: str, name: str = "act") -> Pointwise:
    check_option(kind, tuple(ACTIVATIONS), name)
    return ACTIVATIONS[kind]


def options_repr(module: nn.Module, *names: str) -> str:
    """For `extra_repr` where `module.gate` is a method: the options `names`, and the gate's kind under the option's name `gate`."""
    return ", ".join([*(f"{name}={getattr(module, name)!r}" for name in names), f"gate={module.gate_kind!r}"])
