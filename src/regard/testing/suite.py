"""The conformance suite: small checks, each with what it needs, run on any attention module."""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..errors import RegardError
from .subject import Subject


class CheckFailed(AssertionError):
    """A check found a fault; the text says what and what to do."""


class NotApplicable(Exception):
    """A check does not apply to this subject; the text says why."""


@dataclass(frozen=True)
class Check:
    """One check. `needs`: capabilities, all of which the subject must claim. `layouts`: empty for all."""

    name: str
    about: str
    run: Callable[[Subject], None]
    needs: frozenset[str]
    layouts: frozenset[str]
    needs_card: bool
    compiles: bool

    def applies(self, subject: Subject) -> bool:
        return (
            self.needs <= subject.can and (not self.layouts or subject.layout in self.layouts) and (not self.needs_card or subject.card is not None)
        )


@dataclass(frozen=True)
class Outcome:
    """What one check said of one subject."""

    subject: str
    check: str
    status: str  # "pass", "fail" or "skip"
    message: str
    seconds: float


CHECKS: dict[str, Check] = {}


def check(
    *, needs: Iterable[str] = (), layouts: Iterable[str] = (), needs_card: bool = False, compiles: bool = False
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Register a function `(subject) -> None` that raises CheckFailed as a check; its docstring is what it promises."""

    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        about = (function.__doc__ or "").strip().splitlines()[0]
        name = function.__name__
        CHECKS[name] = Check(name, about, function, frozenset(needs), frozenset(layouts), needs_card, compiles)
        return function

    return register


def expect(ok: bool, message: str, *values: object) -> None:
    """Raise CheckFailed with the formatted message unless `ok`."""
    if not ok:
        raise CheckFailed(message.format(*values))


def run(subject: Subject, only: Iterable[str] | None = None) -> Iterator[Outcome]:
    """Run every check that applies (or those named in `only`) on one subject."""
    for one in CHECKS.values():
        if only is not None and one.name not in set(only):
            continue
        if not one.applies(subject):
            continue
        start = time.perf_counter()
        status, message = "pass", ""
        try:
            one.run(subject)
        except NotApplicable as reason:
            status, message = "skip", str(reason)
        except (CheckFailed, RegardError) as fault:
            status, message = "fail", str(fault)
        except Exception as fault:
            status, message = "fail", f"{type(fault).__name__}: {str(fault).strip()[:300]} ({_place(fault)})"
        yield Outcome(subject.name, one.name, status, message, time.perf_counter() - start)


def _place(fault: Exception) -> str:
    frames = traceback.extract_tb(fault.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
