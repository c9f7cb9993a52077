"""What a check looks at: a way to build a module, and inputs that fit it."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .. import registry
from ..card import Card, Layout
from ..errors import RegardError, require

Inputs = dict[str, Tensor]
Size = int | tuple[int, ...]

# First constructor argument -> layout, for classes that carry no card.
_FIRST_ARGUMENT = {
    "dim": "sequence",
    "embed_dim": "sequence",
    "d_model": "sequence",
    "channels": "map",
    "in_channels": "map",
    "input_size": "recurrent",
}
_SIGNS = {"key_mask": "key_mask", "attn_mask": "attn_mask", "mask": "mask", "context": "cross", "return_weights": "weights"}


@dataclass(frozen=True)
class Subject:
    """A module under test.

    Args:
        name: how reports call it.
        kind: the class. `options` are its constructor arguments; the first width among them (dim, channels, input_size) sizes the inputs.
        layout, can: what it works on and what it claims to do; they decide which checks apply.
        card: its card, if it has one.
        lenient: an awkward size may be refused with a RegardError (variants with strides, say) instead of handled.
    """

    name: str
    kind: Callable[..., nn.Module]
    options: Mapping[str, Any]
    layout: Layout
    can: frozenset[str]
    card: Card | None = None
    lenient: bool = False
    _cache: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def width(self) -> int:
        for name in (*_FIRST_ARGUMENT, "hidden_size", "num_heads"):
            if isinstance(self.options.get(name), int):
                return self.options[name]
        if hasattr(self.kind, "example_inputs"):
            x = self.inputs(batch=1)[self.main]
            return x.shape[self.channel_axis(x)]
        raise RegardError(f"{self.name}: options {dict(self.options)} hold none of {sorted(_FIRST_ARGUMENT)}; say the width, for example dim=32")

    @property
    def dims(self) -> int:
        return self.options.get("dims", 2)

    def with_options(self, **options: Any) -> "Subject":
        return replace(self, options={**self.options, **options}, _cache={})

    def build(self, *, seed: int = 0, shuffle: bool = True, **options: Any) -> nn.Module:
        """A fresh module in eval mode. With `shuffle` every parameter moves off its starting value, for a zero gain would hide any fault."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.kind(**{**self.options, **options}).eval()
            if shuffle and not any(p.is_meta for p in module.parameters()):
                shuffle_(module)
        return module

    def size(self, n: int = 12) -> Size:
        """A size of about n positions that is not square."""
        if self.layout in ("map", "pair"):
            return {1: (n,), 2: (6, 9), 3: (3, 4, 5)}[self.dims]
        return n

    def inputs(self, size: Size | None = None, *, batch: int = 2, seed: int = 1, scale: float = 1.0) -> Inputs:
        """Random forward arguments: `x`, and what else the layout needs."""
        size = self.size() if size is None else size
        generator = torch.Generator().manual_seed(seed)
        own = getattr(self.kind, "example_inputs", None)
        if own is not None:
            return own(self.options, batch=batch, size=size, generator=generator)

        def noise(*shape: int) -> Tensor:
            return scale * torch.randn(*shape, generator=generator)

        space = (size,) if isinstance(size, int) else size
        match self.layout:
            case "map":
                return {"x": noise(batch, self.width, *space)}
            case "pair":
                other = (*space[:-1], max(1, space[-1] - 2))
                return {"a": noise(batch, self.width, *space), "b": noise(batch, self.width, *other)}
            case "graph":
                (n,) = space
                edges = torch.rand(batch, n, n, generator=generator) < 0.4
                edges = edges.triu(1)
                return {"x": noise(batch, n, self.width), "adjacency": (edges | edges.mT).float()}
            case _:
                return {"x": noise(batch, space[0], self.width)}

    def bound(self, check: str, usual: float, module: nn.Module) -> float:
        """The tolerance of a check: the card's, where the definition forces a wider one on this instance."""
        return self.card.bound(check, usual, module) if self.card else usual

    @property
    def names(self) -> tuple[str, ...]:
        """What the module is called with; the first one is what the others go with."""
        if "names" not in self._cache:
            self._cache["names"] = tuple(self.inputs(batch=1))
        return self._cache["names"]

    @property
    def main(self) -> str:
        """The first input."""
        return self.names[0]

    @property
    def operands(self) -> tuple[str, ...]:
        """The inputs that are data: both of a pair, else the first one and a context."""
        return self.names[:2] if self.layout == "pair" else tuple(n for n in self.names if n in (self.main, "context"))

    @property
    def hidden(self) -> str:
        """The input whose elements a mask hides: a context that the layout does not have, or the first one."""
        return "context" if self.layout != "map" and "context" in self.names else self.main

    def channel_axis(self, x: Tensor) -> int:
        """Tokens have channels last, maps first, and sets of maps (of a pair) after the axis of the set."""
        if self.layout == "map" or (self.layout == "pair" and x.ndim == 4):
            return 1
        return 2 if self.layout == "pair" else x.ndim - 1

    def mask_name(self) -> str | None:
        """The argument that hides padded elements of `x` itself (or of the context, for key_mask)."""
        if "mask" in self.can:
            return "mask"
        if "key_mask" in self.can:
            return "key_mask"
        return "node_mask" if self.layout == "graph" else None


def shuffle_(module: nn.Module) -> None:
    """Move every parameter and running statistic to a random place of ordinary size."""
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.data.add_(torch.randn_like(parameter) * max(fan_in, 1) ** -0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.2 * torch.randn_like(buffer))
        elif name.endswith("running_var"):
            buffer.mul_(1 + 0.5 * torch.rand_like(buffer))


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [t for item in result.values() for t in tensors(item)]
    if isinstance(result, tuple | list):
        return [t for item in result for t in tensors(item)]
    return []


def subjects_of(id: str) -> list[Subject]:
    """The example and the variants of a mechanism of the registry."""
    card = registry.card(id)
    return [_subject(id, options, variant=at > 0) for at, options in enumerate((card.example, *card.variants))]


def _subject(id: str, options: Mapping[str, Any], variant: bool = True) -> Subject:
    card, kind = registry.card(id), registry.get(id)
    name = f"{id}({', '.join(f'{k}={v!r}' for k, v in options.items())})" if variant else id
    layout = options.get("layout", getattr(kind, "tested_as", card.layout))
    return Subject(name, kind, dict(options), layout, _applying(card, kind, options), card, lenient=variant)


def _applying(card: Card, kind: Callable[..., nn.Module], options: Mapping[str, Any]) -> frozenset[str]:
    """The capabilities under these options."""
    with torch.random.fork_rng(devices=[]):
        return card.capabilities(kind(**options))


def resolve(target: str, *, layout: str | None = None, options: Mapping[str, Any] | None = None, can: tuple[str, ...] | None = None) -> list[Subject]:
    """The subjects behind an id or "package.module:Class".

    A class with a `card` needs nothing else. For any other class the layout is taken from its first constructor argument (dim: sequence, channels:
    map, input_size: recurrent) and the capabilities from the arguments of its forward, unless they are given or are attributes of the class.

    Raises:
        RegardError: no such id, module or class, or what to build cannot be told; the text says which option to give.
    """
    if ":" not in target:
        return [_subject(target, {**registry.card(target).example, **options})] if options else subjects_of(target)
    kind = load_class(target)
    own = getattr(kind, "card", None)
    if isinstance(own, Card):
        example = {**own.example, **(options or {})}
        return [Subject(target, kind, example, own.layout, _applying(own, kind, example), own)]
    parameters = list(inspect.signature(kind).parameters)
    layout = layout or getattr(kind, "layout", None) or (_FIRST_ARGUMENT.get(parameters[0]) if parameters else None)
    require(
        layout is not None, "cannot tell what {} works on: its first argument is {!r}; say --layout sequence, map, set, ...", target, parameters[:1]
    )
    require(layout in get_args(Layout), "layout={!r} is not one of {}", layout, get_args(Layout))
    example = options or getattr(kind, "example", None) or ({parameters[0]: 16} if parameters else {})
    signs = inspect.signature(kind.forward).parameters
    claimed = can or getattr(kind, "can", None) or {_SIGNS[name] for name in signs if name in _SIGNS}
    return [Subject(target, kind, dict(example), layout, frozenset(claimed))]  # type: ignore[arg-type]


def load_class(target: str) -> type[nn.Module]:
    """The nn.Module class named "package.module:Class"; the working folder counts as importable, as for `python -m`."""
    module_name, _, class_name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RegardError(f"cannot import {module_name!r} of {target!r}: {error}") from None
    kind = getattr(module, class_name, None)
    require(inspect.isclass(kind) and issubclass(kind, nn.Module), "{} has no nn.Module class {!r}", module_name, class_name)
    return kind  # type: ignore[return-value]
