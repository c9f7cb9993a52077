"""Which implementation of an operation runs, and why.

Each operation has a "reference" and may have faster ones. Left alone, it chooses by device, dtype and size and can say why (`explain`); a choice
made with `use_impl` is final and never falls back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import require


@dataclass(frozen=True)
class Choice:
    """One decision: operation, implementation, reason."""

    op: str
    impl: str
    why: str

    def __str__(self) -> str:
        return f"{self.op}: {self.impl} ({self.why})"


IMPLS: dict[str, tuple[str, ...]] = {}
_forced: dict[str, str] = {}
_log: list[Choice] | None = None


def register(op: str, *impls: str) -> None:
    """Declare an operation and the names of its implementations; "reference" is always one."""
    IMPLS[op] = ("reference", *impls)


def choose(op: str, automatic: str, why: str) -> str:
    """The implementation to run: the one forced by `use_impl`, else `automatic`."""
    if _forced:
        impl = _forced.get(op, _forced.get("*", automatic))
        why = "asked for by use_impl" if op in _forced or "*" in _forced else why
    else:
        impl = automatic
    if _log is not None:
        _log.append(Choice(op, impl, why))
    return impl


@contextmanager
def use_impl(every: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Force implementations inside a `with` block: `use_impl("reference")` for all, `use_impl(window_apply="shifted")` for one.

    Raises:
        RegardError: no such operation, or it has no implementation of that name.
    """
    global _forced
    for op, impl in by_op.items():
        require(op in IMPLS, "use_impl: there is no operation {!r}; there are {}", op, sorted(IMPLS))
        require(impl in IMPLS[op], "use_impl: {} has no implementation {!r}; it has {}", op, impl, IMPLS[op])
    require(
        every in (None, "reference"), "use_impl: only 'reference' exists for every operation, got {!r}; name the operation: op={!r}", every, every
    )
    before = _forced
    _forced = {**before, **({"*": every} if every else {}), **by_op}
    try:
        yield
    finally:
        _forced = before


def explain(module: nn.Module, *args: Any, **kwargs: Any) -> list[Choice]:
    """Run `module(*args, **kwargs)` once and list which implementation each operation chose, and why."""
    global _log
    before, _log = _log, []
    try:
        module(*args, **kwargs)
        return list(dict.fromkeys(_log))
    finally:
        _log = before


def on_cpu(x: Tensor) -> bool:
    """Whether the CPU forms apply (a tensor on the meta device follows the CPU, so that counted costs are those of the CPU)."""
    return x.device.type in ("cpu", "meta")
