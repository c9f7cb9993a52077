"""`regard compare`: train candidates under equal conditions, measure what they cost, keep every finished piece, report.

summary = compare(CompareConfig(("none", "multi_head"), task="digits", out=Path("runs/x"), budget="50steps"), Console())
"""

import dataclasses
import os
import shlex
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Console

from ..errors import RegardError, require
from . import candidates as candidates_module
from . import speeds
from .candidates import Candidate
from .carrier import Carrier, Work, key_of
from .config import CompareConfig
from .measure import cpu_name
from .planning import Plan, parameters, plan
from .records import Records
from .summarise import summarise, to_json, write
from .summary import Machine, Summary, TaskFacts

__all__ = ["CompareConfig", "Plan", "compare", "plan"]

ROOM = 8 * 2**20  # bytes that must be writable in the folder before anything starts


def compare(config: CompareConfig, console: Console) -> Summary:
    """Carry out one comparison and write results.db, summary.json, results.csv, report.html and pictures into `config.out`.

    Raises:
        RegardError: the configuration cannot work, or the folder cannot be used; before any training.
        SystemExit: 130 after Ctrl-C; everything finished is kept.
    """
    found = plan(config)
    records = _open(found)
    try:
        return _carry_out(found, records, console)
    except KeyboardInterrupt:
        records.release()
        console.print(f"Stopped. Everything finished is kept; go on with: {_command(dataclasses.replace(config, resume=True))}", style="yellow")
        raise SystemExit(130) from None
    finally:
        records.close()


def _open(made: Plan) -> Records:
    """The folder and its database, after a look at whether they may be used."""
    out = made.config.out
    path = out / "results.db"
    require(made.config.resume or not path.exists(), "{} exists already; go on with it with --resume, or give another --out", path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out, prefix=".room.") as file:
            file.write(os.urandom(2**16) * (ROOM // 2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RegardError(f"out={str(out)!r} cannot be written: {error}; give a folder with at least {ROOM >> 20} MB free") from error
    records = Records(path)
    stored, mine = records.fact("conditions"), made.conditions()
    if stored is None:
        records.set_fact("started", datetime.now(UTC).isoformat(timespec="seconds"))
        records.set_fact("conditions", mine)
        return records
    wrong = [f"{key} {stored.get(key)!r} there, {mine[key]!r} here" for key in mine if stored.get(key) != mine[key]]
    if wrong:
        records.close()
        raise RegardError(f"{path} was made under other conditions: {'; '.join(wrong)}; use those, or give another --out")
    if made.config.retry_failed:
        records.forget_failures()
    return records


def _carry_out(made: Plan, records: Records, console: Console) -> Summary:
    config, began = made.config, time.monotonic()
    for candidate in made.candidates:
        records.add_candidate(candidate.name, _facts(made, candidate))
    names = [candidate.name for candidate in made.candidates]
    pairs = [(candidate, length) for length in made.lengths for candidate in made.candidates]
    with Carrier(made, records, console) as carrier:
        carrier.phase("preparing", [Work("machine", "select 1 from facts where name = 'machine'", (), carrier.calibrate)])
        query = "select 1 from plans where candidate = ? and length = ?"
        carrier.phase("planning", [Work(key_of("plan", c.name, n), query, (c.name, n), carrier.steps(c, n)) for c, n in pairs])
        query = "select 1 from trials where candidate = ? and length = ? and seed = ?"
        carrier.phase(
            "training",
            # Seed by seed, so that an interrupted run has something of every candidate.
            [Work(key_of("trial", c.name, n, s), query, (c.name, n, s), carrier.trial(c, n, s)) for s in range(config.seeds) for c, n in pairs],
        )
        query = "select 1 from counts where candidate = ? and length = ?"
        costs = [(candidate, length) for length in made.cost_lengths for candidate in made.candidates]
        carrier.phase("counting", [Work(key_of("count", c.name, n), query, (c.name, n), carrier.count(c, n)) for c, n in costs])
        query = f"select 1 where (select count(*) from latencies where length = ? and candidate in ({', '.join('?' * len(names))})) = ?"
        carrier.phase("timing", [Work(key_of("latency", n), query, (n, *names, len(names)), carrier.latency(n)) for n in made.cost_lengths])
    records.set_fact("seconds", (records.fact("seconds") or 0.0) + time.monotonic() - began)
    summary = _summary(made, records)
    return _publish(summary, config, console)


def _publish(summary: Summary, config: CompareConfig, console: Console) -> Summary:
    """The files, and the table on the terminal."""
    from .plots import write_plots
    from .report import write_report
    from .table import table

    try:
        write(summary, config.out)
        page = write_report(summary, config.out)
        write_plots(summary, config.out)
    except OSError as error:
        raise RegardError(
            f"writing the report into {str(config.out)!r} failed: {error}; results.db is whole, free some space and use --resume"
        ) from error
    if config.json:
        console.out(to_json(summary), highlight=False, end="")
    else:
        console.print(table(summary, console.width))
        console.print(f"report: {page}", soft_wrap=True, highlight=False)
    return summary


def _summary(made: Plan, records: Records) -> Summary:
    task, machine = made.task, Machine(**records.fact("machine"))
    facts = TaskFacts(
        name=made.config.task,
        title=task.title,
        description=task.description,
        source=task.source,
        metric=task.metric,
        metric_definition=task.metric_definition,
        higher_is_better=task.higher_is_better,
        chance=records.fact("chance"),
        host=task.host_text(made.host, made.options),
        length_name="side" if made.host == "map" else "length",
    )
    names = ", ".join(records.candidates())
    return summarise(
        records,
        title=f"{names} on {task.name}",
        command=_command(made.config),
        task=facts,
        machine=machine,
        lengths=made.lengths,
        cost_lengths=made.cost_lengths,
        budget=made.config.budget,
        notes=_notes(made, records, machine),
    )


def _notes(made: Plan, records: Records, machine: Machine) -> list[str]:
    """What a reader should know before believing the figures."""
    notes = [
        "Every candidate has the same host, the same weights outside its slots, the same batches in the same order, AdamW with learning "
        f"rate {made.learning_rate:g} (rising over the first tenth of the steps, then falling as a cosine to 0), batch {made.batch}. "
        "One learning rate for all favours those it suits.",
        f"Costs are of the whole network in inference, batch {made.task.cost_batch}; FLOPs count matrix products and convolutions, "
        "peak memory counts live tensors beyond inputs and parameters, the floor comes from the rates this machine reached in this run.",
        "Learning curves are read on every fourth held-out example, the final metric on all of them.",
    ]
    if made.host == "map":
        notes.append("The length of a map is its side; something that grows with the number of places squared has exponent 4.")
    if made.budget.unit == "s":
        plans = {(c, n): records.plan(c, n) for c in records.candidates() for n in made.lengths}
        steps = ", ".join(
            f"{c} {p[0]}" + (f" (length {n})" if len(made.lengths) > 1 else "") for (c, n), p in plans.items() if p is not None and p[0]
        )
        notes.append(
            f"The budget of {made.budget.amount:g} s was turned into steps by each candidate's speed: {steps}. "
            f"Speeds are remembered in {speeds.path()}; delete it to measure again."
        )
    load = records.fact("load") or 0.0
    if load > machine.cores / 2:
        busy = f"Other work was running at the start (load {load:.1f} on {machine.cores} cores)"
        notes.append(f"{busy}; a quiet machine is faster, and its times are steadier.")
    here = (cpu_name(), torch.__version__)
    if (machine.cpu, machine.torch) != here:
        notes.append(f"Begun on {machine.cpu} with torch {machine.torch}, ended on {here[0]} with torch {here[1]}; times do not compare.")
    return notes


def _facts(made: Plan, candidate: Candidate) -> dict[str, Any]:
    """What the summary says of a candidate besides its results."""
    card = candidate.card
    lent = candidate.lent(made.trial(candidate, made.lengths[0]).setting())
    if card is not None:
        title = card.paper.title
        first = card.paper.authors.replace(" and ", ",").split(",")
        paper = f"{first[0].strip()}{' et al.' if len(first) > 1 else ''}, {card.paper.venue} {card.paper.year}"
    else:
        title, paper = ("no attention", "") if candidate.kind is None else (candidate.kind.__name__, "")
    return {
        "id": candidate.id,
        "title": title,
        "paper": paper,
        "checked_against": card.checked_against if card is not None else "",
        "options": {**lent, **candidate.options},
        "parameters": parameters(made, candidate),
        "cannot": list(candidates_module.cannot(candidate, made.host)),
    }


def _command(config: CompareConfig) -> str:
    """The command line of this configuration."""
    words = ["regard", "compare", *config.candidates, "--task", config.task]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("candidates", "task", "out") or value == field.default:
            continue
        name = f"--{field.name.replace('_', '-')}"
        words += [name] if value is True else [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join([*words, "--out", str(config.out)])
