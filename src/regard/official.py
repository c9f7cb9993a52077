"""Authors' parameter names: declared, invertible key maps between their checkpoints and our modules.

A mechanism lists in `official` one `KeyMap` for each naming in circulation; a `KeyMap` is a list of rules; a rule ties some of their keys to
some of ours, with a reshaping that can be undone. Our own names always load as well.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import RegardError, require, require_type

M = TypeVar("M", bound=nn.Module)
# (their tensors, module) -> our tensors, and back. Each gets and gives as many tensors as the rule names keys.
Convert = Callable[[list[Tensor], nn.Module], list[Tensor]]


def _same(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """`theirs` and `ours` name whole keys; in both, "*" stands for the same text (usually "weight" and "bias")."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Convert = _same
    write: Convert = _same


@dataclass(frozen=True)
class KeyMap:
    """One naming of a mechanism's parameters.

    Args:
        name: whose it is, as error messages and `to_official(module, naming=...)` call it.
        rules: the ties, tried in order; keys that no rule names must be equal on both sides.
        ignore: regular expressions of their keys that carry nothing for this module.
        optional: regular expressions of our keys that such a file may leave out (they keep their value).
    """

    name: str
    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def rename(theirs: str, ours: str) -> Rule:
    """`rename("reprojection.*", "out_proj.*")`."""
    return Rule((theirs,), (ours,))


def pointwise(theirs: str, ours: str, axes: int | None = None) -> Rule:
    """A 1x1 convolution of theirs, (out, in, 1, ...), that is a linear layer of ours, (out, in); other keys of the layer pass as they are.

    `axes` is the number of spatial axes to write; None takes it from the module's `dims` (2 where it has none).
    """

    def read(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
        (w,) = tensors
        return [w.flatten(1) if w.ndim > 2 and w.shape[2:].numel() == 1 else w]

    def write(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
        (w,) = tensors
        count = axes if axes is not None else getattr(module, "dims", 2)
        return [w.reshape(*w.shape, *[1] * count) if w.ndim == 2 else w]

    return Rule((theirs,), (ours,), read, write)


def fused(theirs: str, ours: Iterable[str]) -> Rule:
    """One tensor of theirs that is several of ours, stacked along the rows."""
    ours = tuple(ours)

    def read(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
        target = module.state_dict()
        rows = [target[name].shape[0] for name in ours]
        require(sum(rows) == tensors[0].shape[0], "{} has {} rows, but {} need {}", theirs, tensors[0].shape[0], ours, rows)
        return list(tensors[0].split(rows))

    def write(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
        return [torch.cat(tensors)]

    return Rule((theirs,), ours, read, write)


def _bind(pattern: str, star: str) -> str:
    return pattern.replace("*", star)


def _match(pattern: str, key: str) -> str | None:
    """What "*" stands for if `key` fits `pattern`; "" for a pattern without a star; None if it does not fit."""
    if "*" not in pattern:
        return "" if pattern == key else None
    head, tail = pattern.split("*", 1)
    fits = len(key) >= len(head) + len(tail) and key.startswith(head) and key.endswith(tail)
    return key[len(head) : len(key) - len(tail)] if fits else None


@dataclass
class _Reading:
    """What came of reading a file by one naming."""

    naming: str
    tensors: dict[str, Tensor]
    unknown: list[str]
    missing: list[str]
    misshapen: list[str]

    @property
    def faults(self) -> int:
        return len(self.unknown) + len(self.missing) + len(self.misshapen)

    def describe(self) -> str:
        rows = [("unknown", self.unknown), ("missing", self.missing), ("misshapen", self.misshapen)]
        return f"read as {self.naming}: " + "; ".join(f"{name} {', '.join(keys)}" for name, keys in rows if keys)


def translate(module: nn.Module, state: Mapping[str, Tensor], keymap: KeyMap) -> _Reading:
    """Their tensors under our names, with everything that does not fit."""
    target = module.state_dict()
    left = {key: value for key, value in state.items() if not any(re.fullmatch(pattern, key) for pattern in keymap.ignore)}
    found: dict[str, Tensor] = {}
    misshapen: list[str] = []
    for rule in keymap.rules:
        for star in dict.fromkeys(s for key in left if (s := _match(rule.theirs[0], key)) is not None):
            theirs, ours = [_bind(t, star) for t in rule.theirs], [_bind(o, star) for o in rule.ours]
            if not all(t in left for t in theirs) or not all(o in target for o in ours):
                continue
            values = [left.pop(t) for t in theirs]
            try:
                found |= zip(ours, rule.read(values, module), strict=True)
            except (RegardError, RuntimeError) as error:
                misshapen.append(f"{', '.join(theirs)} ({error})")
                found |= {o: target[o] for o in ours}
    for key in [key for key in left if key in target and key not in found]:
        found[key] = left.pop(key)
    wrong = [k for k, v in found.items() if v.shape != target[k].shape]
    misshapen += [f"{_their_name(k, keymap)} {tuple(found[k].shape)}, needs {tuple(target[k].shape)}" for k in wrong]
    free = (*keymap.optional, r"(.*\.)?num_batches_tracked")
    missing = [key for key in target if key not in found and not any(re.fullmatch(pattern, key) for pattern in free)]
    unknown = [key for key in left if not re.fullmatch(r"(.*\.)?num_batches_tracked", key)]
    return _Reading(keymap.name, found, unknown, [_their_name(key, keymap, state) for key in missing], misshapen)


def _their_name(key: str, keymap: KeyMap, given: Container[str] = ()) -> str:
    """What a key of ours is called in their files, with our name if it is another; of several names those that are not `given`."""
    for rule in keymap.rules:
        for star in (s for ours in rule.ours if (s := _match(ours, key)) is not None):
            bound = [_bind(theirs, star) for theirs in rule.theirs]
            names = ", ".join([name for name in bound if name not in given] or bound)
            return names if names == key else f"{names} (here {key})"
    return key


OWN = KeyMap("regard's own names")


def _namings(module: nn.Module) -> tuple[KeyMap, ...]:
    own = getattr(module, "key_maps", tuple)
    return (*own(), OWN)


def load_official(module: M, state: Mapping[str, Tensor]) -> M:
    """Load a checkpoint under its authors' parameter names, or under ours, into `module`, whole or not at all.

    Args:
        module: a mechanism made by `regard.create`.
        state: names to tensors, as `safetensors.torch.load_file` or `torch.load(..., weights_only=True)` gives them.

    Returns:
        `module`, for chaining.

    Raises:
        RegardError: names every unknown, missing and misshapen key, by the naming that comes nearest; the module is then unchanged.
    """
    require_type(isinstance(state, Mapping), "state must map names to tensors, got {}", type(state).__name__)
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    require_type(not wrong, "state holds things that are not tensors: {}; pass the state dict itself, not the checkpoint around it", wrong[:5])
    readings = [translate(module, state, keymap) for keymap in _namings(module)]
    best = min(readings, key=lambda reading: reading.faults)
    if best.faults:
        known = ", ".join(reading.naming for reading in readings)
        raise RegardError(f"this state does not fit {type(module).__name__}; {best.describe()}. Known namings: {known}. Nothing was loaded.")
    module.load_state_dict(best.tensors, strict=False)
    return module


def to_official(module: nn.Module, naming: str | None = None, *, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The module's parameters and buffers under their authors' names: the inverse of `load_official`.

    Args:
        module: a mechanism made by `regard.create`.
        naming: which of the module's namings; None takes the first that fits its options.
        state: other tensors under our names to write instead of `module.state_dict()` (gradients, for example); may be a part of them.

    Raises:
        RegardError: `naming` is unknown, or this module's options cannot be written in it.
    """
    namings = {keymap.name: keymap for keymap in _namings(module)}
    require(naming is None or naming in namings, "naming={!r} is unknown for {}; it has {}", naming, type(module).__name__, list(namings))
    full = module.state_dict()
    for keymap in [namings[naming]] if naming else namings.values():
        written = _write(module, full if state is None else state, keymap)
        if written is not None and translate(module, _write(module, full, keymap) or {}, keymap).faults == 0:
            return written
    raise RegardError(f"{type(module).__name__} with these options cannot be written as {naming or list(namings)}")


def _write(module: nn.Module, state: Mapping[str, Tensor], keymap: KeyMap) -> dict[str, Tensor] | None:
    left, out = dict(state), {}
    for rule in keymap.rules:
        for star in dict.fromkeys(s for key in left if (s := _match(rule.ours[0], key)) is not None):
            theirs, ours = [_bind(t, star) for t in rule.theirs], [_bind(o, star) for o in rule.ours]
            if not all(o in left for o in ours):
                continue
            try:
                out |= zip(theirs, rule.write([left[o] for o in ours], module), strict=True)
            except RuntimeError:  # widths that this naming cannot stack
                return None
            for o in ours:
                del left[o]
    return {**out, **left}


def naming_of(module: nn.Module, keys: Iterable[str]) -> str:
    """The name of the module's naming that knows all of `keys`."""
    wanted = set(keys)
    for keymap in _namings(module):
        written = _write(module, module.state_dict(), keymap)
        if written is not None and wanted <= set(written):
            return keymap.name
    raise RegardError(f"no naming of {type(module).__name__} has all of {sorted(wanted)}")
