"""The base class of every mechanism: a typed place for its card, its authors' parameter names and its forward. Nothing else."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from .card import Card, Layout
from .official import KeyMap


class Mechanism(nn.Module):
    """Abstract. A subclass is final: it has a `card`, declares in `official` how others name its parameters, and is never subclassed.

    Every constructor option is kept as an attribute of the same name, so `print(module)` shows the call that makes it.
    """

    card: ClassVar[Card]
    official: ClassVar[tuple[KeyMap, ...]] = ()
    # Builders of the sub-modules and plain functions that golden files address by `part` or `function`; a function named as an output of a module's
    # file is called with the module and the inputs.
    parts: ClassVar[Mapping[str, Callable[..., nn.Module]]] = {}
    functions: ClassVar[Mapping[str, Callable[..., Any]]] = {}

    # The layout whose checks apply where the card's own layout has none: "map" for heads (B, H, N, d), say.
    tested_as: ClassVar[Layout]

    forward: Callable[..., Any]
    # With the capability "rows": `weights(x, ..., queries=)`, the weights of chosen positions; what `attend_rows` calls.
    weights: Callable[..., Any]

    def key_maps(self) -> tuple[KeyMap, ...]:
        """The namings of this instance. Override where they depend on its options (a number of heads, say)."""
        return self.official

    def extra_repr(self) -> str:
        names = [name for name in inspect.signature(type(self).__init__).parameters if name not in ("self", "device", "dtype")]
        return ", ".join(
            f"{name}={getattr(self, name)!r}" for name in names if hasattr(self, name) and not isinstance(getattr(self, name), nn.Module)
        )
