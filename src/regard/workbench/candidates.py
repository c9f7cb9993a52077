"""A candidate: what is put into the slot. An id of the registry, a class of the user's own, or nothing."""

import importlib
import inspect
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin

import torch
from torch import nn

from .. import registry
from ..card import Card
from ..errors import RegardError, RegardTypeError, require
from ..hosts.slot import MapSlot, TokenSlot
from .config import split_name

NONE = "none"
# Which layouts can sit in which kind of host.
FITS = {"tokens": ("sequence", "set", "recurrent"), "map": ("map",)}
# Capabilities worth naming where they are missing, by kind of host.
MATTERS = {
    "tokens": ("causal", "cross", "key_mask", "attn_mask", "weights", "linear", "step"),
    "map": ("any_dims", "weights", "linear"),
}
# The constructors' words for the width of their input; a recurrent cell has two.
WIDTHS = {"tokens": ("dim", "input_size", "hidden_size"), "map": ("channels",)}


@dataclass(frozen=True)
class Setting:
    """What the host lends to a candidate's constructor where it has such an argument and the user did not give it.

    Args:
        host: "tokens" or "map".
        causal: whether the task needs a causal mechanism.
        num_heads: the same for every candidate.
        longest: the longest input that will come, in tokens or pixels of a side.
    """

    host: str
    causal: bool
    num_heads: int
    longest: int


@dataclass(frozen=True)
class Candidate:
    """`name` as typed, `id` of the registry or None, `kind` the class (None for `none`), `options` as typed."""

    name: str
    id: str | None
    kind: type[nn.Module] | None
    options: dict[str, Any]

    @property
    def card(self) -> Card | None:
        found = getattr(self.kind, "card", None)
        return found if isinstance(found, Card) else None

    def fits(self, host: str) -> bool:
        """Whether it can sit in this kind of host; a class without a card is believed to."""
        if self.card is None:
            return True
        assert self.kind is not None
        arguments = list(inspect.signature(self.kind.forward).parameters.values())[1:]
        needed = [p for p in arguments if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        return any(layout in FITS[host] for layout in (self.card.layout, *self.card.also)) and len(needed) <= 1

    def lent(self, setting: Setting) -> dict[str, Any]:
        """The constructor's arguments besides the width and the user's options."""
        if self.kind is None:
            return {}
        parameters = inspect.signature(self.kind.__init__).parameters
        values: dict[str, Any] = {
            "num_heads": setting.num_heads,
            "causal": setting.causal,
            "layout": "map" if setting.host == "map" else "sequence",
        }
        if "max_len" in parameters and parameters["max_len"].default is inspect.Parameter.empty:
            values["max_len"] = setting.longest
        return {name: value for name, value in values.items() if name in parameters and name not in self.options and _takes(parameters[name], value)}

    def sizes(self, width: int, setting: Setting) -> dict[str, int]:
        """The width under the constructor's words for it; its first argument where it uses none of ours."""
        assert self.kind is not None
        names = [name for name in inspect.signature(self.kind.__init__).parameters if name != "self"]
        known = [name for name in WIDTHS[setting.host] if name in names] if self.card is not None else []
        return {name: width for name in known or names[:1] if name not in self.options}

    def make(self, width: int, setting: Setting) -> nn.Module | None:
        """The module for one slot."""
        if self.kind is None:
            return None
        arguments = {**self.sizes(width, setting), **self.lent(setting), **self.options}
        if self.id is not None:
            return registry.create(self.id, **arguments)
        try:
            inspect.signature(self.kind).bind(**arguments)
        except TypeError as error:
            raise RegardTypeError(f"candidate {self.name!r}: {error}; its constructor takes the width first, then the options given") from None
        return self.kind(**arguments)


def _takes(parameter: inspect.Parameter, value: Any) -> bool:
    """Whether an argument may have this value: one annotated with Literal takes only what stands there."""
    return get_origin(parameter.annotation) is not Literal or value in get_args(parameter.annotation)


def parse(text: str) -> Candidate:
    """Read one candidate and import its class.

    Raises:
        RegardError: there is no such id, module or class; the text says which and what is near.
    """
    name, options = split_name(text)
    if name == NONE:
        require(not options, "candidate {!r}: none means no attention and takes no options", text)
        return Candidate(text, None, None, {})
    if ":" not in name:
        return Candidate(text, name, registry.get(name), options)
    module_name, class_name = name.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RegardError(f"candidate {text!r}: importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    kind = getattr(module, class_name, None)
    known = [n for n, v in vars(module).items() if inspect.isclass(v) and issubclass(v, nn.Module) and v.__module__ == module.__name__]
    require(
        inspect.isclass(kind) and issubclass(kind, nn.Module),
        "candidate {!r}: {} has no torch module class {!r}; it has {}",
        text,
        module_name,
        class_name,
        known,
    )
    return Candidate(text, None, cast(type[nn.Module], kind), options)


def cannot(candidate: Candidate, host: str) -> tuple[str, ...]:
    """The capabilities that matter in this kind of host and that the card does not have; nothing is said without a card."""
    if candidate.card is None:
        return ()
    # Sets and recurrent cells call the same thing `mask`.
    can = candidate.card.can | ({"key_mask"} if "mask" in candidate.card.can else set())
    return tuple(name for name in MATTERS[host] if name not in can)


def ids_that_fit(setting: Setting) -> list[str]:
    """Ids of the registry that can sit in this kind of host: each is built and tried, so this is for error messages only."""
    width, good = 32, []
    x = torch.zeros(2, width, 16, 16) if setting.host == "map" else torch.zeros(2, 64, width)
    slot = MapSlot if setting.host == "map" else TokenSlot
    for id in registry.ids():
        candidate = Candidate(id, id, registry.get(id), {})
        if candidate.fits(setting.host):
            try:
                module = candidate.make(width, setting)
                assert module is not None
                with torch.no_grad():
                    slot(module.eval())(x)
                good.append(id)
            except Exception:
                continue
    return good


def causal_ids() -> list[str]:
    """Ids of the registry that sit in a token host and have a causal mode."""
    return [id for id in registry.ids(can="causal") if Candidate(id, id, registry.get(id), {}).fits("tokens")]
