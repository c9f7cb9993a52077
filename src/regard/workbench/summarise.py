"""From the records to a `Summary`, and the summary as files."""

import csv
import dataclasses
import io
import json
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from .measure import Counted, Rates
from .records import Records
from .stats import crossover, estimate, growth
from .summary import AttentionPicture, CandidateSummary, Cost, Machine, Summary, TaskFacts, TrialResult

REFERENCE = "multi_head"


def summarise(records: Records, *, title: str, command: str, task: TaskFacts, machine: Machine, lengths: Sequence[int], cost_lengths:
Sequence[int],
              budget: str, notes: Sequence[str]) -> Summary:  # fmt: skip
    """Everything in the database, as plain data."""
    trials = records.trials()
    rates = Rates(machine.gflops, machine.gbytes)
    known = records.candidates()
    costs = {name: _costs(records, name, cost_lengths, rates) for name in known}
    reference = next((name for name, facts in known.items() if facts["id"] == REFERENCE), None)
    base = _times(costs[reference]) if reference else {}
    pictures = [
        AttentionPicture(name, p["caption"], _rows(p["weights"]), _rows(p["image"]) if p["image"] else None) for name, p in records.pictures().items()
    ]
    return Summary(
        title=title,
        command=command,
        started=records.fact("started"),
        seconds=records.fact("seconds") or 0.0,
        task=task,
        machine=machine,
        lengths=tuple(lengths),
        cost_lengths=tuple(cost_lengths),
        seeds=tuple(sorted({trial.seed for trial in trials})),
        budget=budget,
        candidates=tuple(
            _candidate(name, facts, [t for t in trials if t.candidate == name], costs[name], base if name != reference else {})
            for name, facts in known.items()
        ),
        trials=tuple(trials),
        pictures=tuple(sorted(pictures, key=lambda picture: list(known).index(picture.candidate))),
        notes=tuple(notes),
    )


def _costs(records: Records, name: str, lengths: Sequence[int], rates: Rates) -> tuple[Cost, ...]:
    found = [records.costs(name, length, lambda flops, least: rates.floor_ms(Counted(flops, 0, least))) for length in lengths]
    return tuple(cost for cost in found if cost is not None)


def _times(costs: Sequence[Cost]) -> dict[int, float]:
    return {cost.length: cost.latency_ms for cost in costs if math.isfinite(cost.latency_ms)}


def _rows(matrix: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix)


def _candidate(name: str, facts: dict[str, Any], trials: Sequence[TrialResult], costs: tuple[Cost, ...], base: dict[int, float]) -> CandidateSummary:
    good = [trial for trial in trials if trial.status == "ok" and trial.metric is not None]
    lengths = sorted({trial.length for trial in good})
    at = [cost.length for cost in costs]
    failures: dict[str, list[str]] = {}
    for trial in trials:
        if trial.status != "ok":
            failures.setdefault(trial.reason, []).append(f"length {trial.length} seed {trial.seed}")
    for cost in costs:
        if cost.reason:
            failures.setdefault(cost.reason, []).append(f"cost at length {cost.length}")
    return CandidateSummary(
        name=name,
        **facts,
        score={n: estimate([t.metric for t in good if t.length == n and t.metric is not None]) for n in lengths},
        examples_per_second={n: estimate([t.examples_per_second for t in good if t.length == n and t.examples_per_second]) for n in lengths},
        costs=costs,
        time_exponent=growth(at, [cost.latency_ms for cost in costs]),
        memory_exponent=growth(at, [cost.peak_bytes for cost in costs]),
        flops_exponent=growth(at, [cost.flops for cost in costs]),
        crossover_length=crossover(_times(costs), base),
        failures=tuple(f"{', '.join(where)}: {reason}" for reason, where in failures.items()),
    )


def git_revision() -> str | None:
    """The short commit of the checkout this package runs from; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def plain(value: Any) -> Any:
    """Dataclasses as dicts, and None for what JSON has no word for."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def write(summary: Summary, out: Path) -> None:
    """summary.json and results.csv (one row per candidate and length)."""
    write_whole(out / "summary.json", to_json(summary))
    write_whole(out / "results.csv", to_csv(summary))


def to_json(summary: Summary) -> str:
    return json.dumps(plain(summary), indent=1, allow_nan=False) + "\n"


def to_csv(summary: Summary) -> str:
    """Training lengths have a score, cost lengths have costs, most have both; what is not known is empty."""
    metric = summary.task.metric.replace(" ", "_")
    header = ["candidate", "length", "seeds", metric, f"{metric}_half_width", "parameters", "train_examples_per_second", "cost_batch",
    "latency_ms",
              "latency_q25_ms", "latency_q75_ms", "flops", "peak_bytes", "floor_ms", "over_floor", "time_exponent", "memory_exponent",
              "flops_exponent", "crossover_length", "failures"]  # fmt: skip
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(header)
    for c in summary.candidates:
        costs = {cost.length: cost for cost in c.costs}
        for length in sorted({*summary.lengths, *summary.cost_lengths}):
            score, speed, cost = c.score.get(length), c.examples_per_second.get(length), costs.get(length)
            row: list[Any] = [
                c.name,
                length,
                len(score.values) if score else 0,
                score and score.mean,
                score and score.half_width,
                c.parameters,
            ]
            row += [speed and speed.mean]
            row += (
                [
                    cost.batch,
                    cost.latency_ms,
                    cost.latency_q25,
                    cost.latency_q75,
                    cost.flops,
                    cost.peak_bytes,
                    cost.floor_ms,
                    cost.over_floor,
                ]
                if cost
                else [None] * 8
            )
            row += [c.time_exponent, c.memory_exponent, c.flops_exponent, c.crossover_length, "; ".join(c.failures)]
            rows.writerow(["" if value is None or (isinstance(value, float) and math.isnan(value)) else value for value in row])
    return text.getvalue()
