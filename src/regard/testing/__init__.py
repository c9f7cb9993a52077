"""Checks that any attention module can be put through, and the replay of golden files.

from regard.testing import check
check("my_package:MyAttention")      # or a class, or an id: raises CheckFailed listing every fault
"""

from collections.abc import Iterable, Mapping
from typing import Any

from . import checks  # noqa: F401  (registers the checks)
from .goldens import Verdict, verify
from .subject import Subject, resolve
from .suite import CHECKS, CheckFailed, Outcome, run

__all__ = ["CHECKS", "CheckFailed", "Outcome", "Subject", "Verdict", "check", "resolve", "run", "verify"]


def check(target: str | type, *, only: Iterable[str] | None = None, options: Mapping[str, Any] | None = None) -> None:
    """Run the conformance suite on an id, a class, or "package.module:Class".

    Raises:
        CheckFailed: one line for every check that failed.
    """
    name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    outcomes = [outcome for subject in resolve(name, options=options) for outcome in run(subject, only)]
    failed = [f"{o.subject}: {o.check}: {o.message}" for o in outcomes if o.status == "fail"]
    if failed:
        raise CheckFailed("\n".join(failed))
