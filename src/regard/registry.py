"""Which mechanisms there are: found by walking `regard.mechanisms`, where an id is a file name and a family a folder name.

Other packages add theirs through the entry point group "regard.mechanisms" (name = id, value = "package.module:Class").
"""

import difflib
import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from numbers import Integral, Real
from typing import Any

from . import mechanisms
from .card import Card
from .errors import RegardError, RegardTypeError, require, require_type
from .mechanism import Mechanism

# What users of other libraries type, and our word for it.
ALIASES = {
    "embed_dim": "dim",
    "d_model": "dim",
    "hidden_size": "dim",
    "heads": "num_heads",
    "nhead": "num_heads",
    "n_heads": "num_heads",
    "dim_head": "head_dim",
    "in_channels": "channels",
    "in_planes": "channels",
    "gate_channels": "channels",
    "reduction_ratio": "reduction",
    "bias": "qkv_bias",
}


@cache
def _files() -> dict[str, str]:
    """id -> module name, without importing any mechanism."""
    found: dict[str, str] = {}
    for family in pkgutil.iter_modules(mechanisms.__path__):
        if family.ispkg:
            package = importlib.import_module(f"{mechanisms.__name__}.{family.name}")
            found |= {m.name: f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}
    return found


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group="regard.mechanisms")}


def ids(*, layout: str | None = None, family: str | None = None, can: str | tuple[str, ...] = ()) -> list[str]:
    """The known ids, sorted; `layout`, `family` and `can` (capabilities, all of which it must have) narrow the list."""
    names = sorted({*_files(), *_plugins()})
    if family is not None:
        families = sorted({name.split(".")[-2] for name in _files().values()})
        require(family in families, "family={!r} is unknown; there are {}", family, families)
        names = [name for name in names if family_of(name) == family]
    wanted = {can} if isinstance(can, str) else set(can)
    if layout is not None or wanted:
        names = [n for n in names if (layout is None or layout in (card(n).layout, *card(n).also)) and wanted <= card(n).can]
    return names


def family_of(id: str) -> str:
    """The folder a mechanism lives in; "plugin" for those of other packages."""
    return _files()[id].split(".")[-2] if id in _files() else "plugin"


@cache
def get(id: str) -> type[Mechanism]:
    """The class behind an id."""
    if id in _files():
        module = importlib.import_module(_files()[id])
        classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Mechanism) and c.__module__ == module.__name__]
        require(len(classes) == 1, "{} must define exactly one Mechanism, it defines {}", module.__name__, [c.__name__ for c in classes])
        return classes[0]
    if id in _plugins():
        return _plugins()[id].load()
    near = difflib.get_close_matches(str(id), ids(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`regard list` shows all"
    raise RegardError(f"there is no mechanism {id!r}; {hint}")


def card(id: str) -> Card:
    """The card of one mechanism: paper, cost, capabilities."""
    return get(id).card


def cards() -> dict[str, Card]:
    """All cards by id. Imports every mechanism."""
    return {name: card(name) for name in ids()}


def create(id: str, /, *args: Any, **options: Any) -> Mechanism:
    """Make a mechanism by its id: `create("luna", dim=256, num_heads=8)`.

    Args:
        id: one of `regard.ids()`.
        *args, **options: the arguments of its constructor; `regard show ID` lists them.

    Raises:
        RegardError: there is no such id, or an argument is wrong; the text says which and what would do.
    """
    kind = get(id)
    parameters = inspect.signature(kind.__init__).parameters
    unknown = [name for name in options if name not in parameters]
    if unknown:
        hints = [f"{n} (here: {ALIASES[n]})" if ALIASES.get(n) in parameters else _near(n, list(parameters)) for n in unknown]
        options_text = ", ".join(name for name in parameters if name != "self")
        raise RegardTypeError(f"{id} has no option {', '.join(hints)}; its options are {options_text}")
    try:
        given = inspect.signature(kind).bind(*args, **options).arguments
    except TypeError as error:
        raise RegardTypeError(f"{id}: {error}; for example create({id!r}, {_spelled(kind.card.example)})") from None
    for name, value in given.items():
        _check_kind(name, value, parameters[name].annotation)
    return kind(*args, **options)


def _check_kind(name: str, value: Any, annotation: Any) -> None:
    """Numbers and switches are what they are said to be: anything else would fail in the depths of a layer, or pass a comparison by accident."""
    for kind, wanted, what in ((int, Integral, "a whole number"), (float, Real, "a number"), (bool, bool, "True or False")):
        optional = annotation == kind | None
        if annotation is not kind and not optional:
            continue
        fits = isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))
        require_type(fits or (optional and value is None), "{}={!r} must be {}{}", name, value, what, " or None" if optional else "")


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"{name} (did you mean {near[0]}?)" if near else name


def _spelled(options: Any) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def cite(*names: str) -> str:
    """BibTeX of the papers behind these ids, one entry each."""
    return "\n\n".join(card(name).paper.bibtex(name) for name in names)
