"""What a comparison is asked to do, and the reading of its words: candidates, task, budget. Everything is checked here, before any work."""

import ast
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RegardError, require


@dataclass(frozen=True)
class CompareConfig:
    """One comparison.

    Args:
        candidates: ids, `none` (no attention), or `package.module:Class`; options follow as `:key=value[,key=value]`.
        task: a name from `tasks.names()`, with options in the same way.
        lengths: training lengths in tokens (side of the map for map tasks); None for the task's own.
        seeds: how many seeds; they are 0, 1, ...
        budget: of one training: "60s" (wall seconds), "500steps" or "20000ex" (examples).
        batch_size: examples a step; None for the task's own.
        out: folder for results.db, report.html and the rest.
        resume: go on with the comparison in `out`.
        cost_lengths: lengths at which time and memory are measured; None for the training lengths and their doublings up to four times
            the longest.
        threads: of the CPU; None for torch's choice.
        trial_limit: seconds after which one trial is stopped and recorded as failed; None for a generous multiple of the budget.
        device: "auto", "cpu" or "cuda".
        learning_rate: of AdamW at its highest; None for the task's own.
        retry_failed: with `resume`, run failed trials again.
        json: print the summary as JSON instead of tables, and no progress.
    """

    candidates: tuple[str, ...]
    task: str
    out: Path
    lengths: tuple[int, ...] | None = None
    seeds: int = 3
    budget: str = "60s"
    batch_size: int | None = None
    resume: bool = False
    cost_lengths: tuple[int, ...] | None = None
    threads: int | None = None
    trial_limit: float | None = None
    device: str = "auto"
    learning_rate: float | None = None
    retry_failed: bool = False
    json: bool = False


@dataclass(frozen=True)
class Budget:
    """How long one training lasts: an amount of "s" (seconds), "steps" or "ex" (examples)."""

    amount: float
    unit: str

    def steps(self, batch: int, seconds_per_step: float) -> int:
        """Steps of a training; a budget in seconds becomes a number with two significant digits."""
        match self.unit:
            case "steps":
                return int(self.amount)
            case "ex":
                return max(1, math.ceil(self.amount / batch))
            case _:
                exact = max(1.0, self.amount / seconds_per_step)
                return int(float(f"{exact:.1e}"))


def parse_budget(text: str) -> Budget:
    """ "60s", "1.5m", "500steps" or "20000ex"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|steps|ex)", text.strip())
    require(found is not None, "budget={!r} is not understood; use seconds (60s), minutes (2m), steps (500steps) or examples (20000ex)", text)
    assert found is not None
    amount, unit = float(found[1]), found[2]
    if unit == "m":
        amount, unit = amount * 60, "s"
    require(amount > 0, "budget={!r} must be more than nothing", text)
    require(unit == "s" or amount == int(amount), "budget={!r}: a number of {} is whole", text, "steps" if unit == "steps" else "examples")
    return Budget(amount, unit)


def parse_options(text: str, owner: str) -> dict[str, Any]:
    """ "a=1,b=(2, 3),c=mean" -> {"a": 1, "b": (2, 3), "c": "mean"}: Python literals, anything else is a string."""
    options: dict[str, Any] = {}
    for part in re.split(r",(?=\s*\w+\s*=)", text):
        key, equals, value = part.partition("=")
        key = key.strip()
        require(bool(equals) and key.isidentifier(), "{!r}: {!r} is not an option; write key=value, several with commas between", owner, part)
        require(key not in options, "{!r}: the option {} is given twice", owner, key)
        try:
            options[key] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            options[key] = value.strip()
    return options


def split_name(text: str) -> tuple[str, dict[str, Any]]:
    """ "luna:memory_len=32" -> ("luna", {...}); "pkg.mod:Class:width=3" -> ("pkg.mod:Class", {...})."""
    name, *rest = text.split(":", 1)
    if rest and "=" not in rest[0].split(":", 1)[0]:
        kind, *rest = rest[0].split(":", 1)
        name = f"{name}:{kind}"
    require(bool(re.fullmatch(r"[\w.]+(:\w+)?", name)), "{!r} is not a name; write id, none or package.module:Class, then :key=value", text)
    return name, parse_options(rest[0], text) if rest else {}


def check(config: CompareConfig) -> None:
    """Raise RegardError for values that no task could work with."""
    require(len(config.candidates) > 0, "no candidates; name at least one, for example: multi_head luna")
    twice = sorted({name for name in config.candidates if config.candidates.count(name) > 1})
    require(not twice, "candidates {} are given twice; each needs a name or options of its own", twice)
    require(config.seeds >= 1, "seeds={} must be at least 1", config.seeds)
    for name in ("batch_size", "threads", "trial_limit", "learning_rate"):
        value = getattr(config, name)
        require(value is None or value > 0, "{}={} must be more than 0", name, value)
    for name in ("lengths", "cost_lengths"):
        values = getattr(config, name)
        require(values is None or len(values) > 0, "{} is empty; leave it out for the task's own", name)
        require(values is None or all(v >= 1 for v in values), "{}={} must be at least 1", name, values)
        require(values is None or len(set(values)) == len(values), "{}={} names one twice", name, values)
    require(config.device in ("auto", "cpu", "cuda"), "device={!r} is unknown; use auto, cpu or cuda", config.device)
    parse_budget(config.budget)
    if config.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RegardError("device='cuda', but torch sees no CUDA device here; use cpu, or install torch with CUDA")
