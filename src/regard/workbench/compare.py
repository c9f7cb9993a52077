"""`regard compare`: train candidates under equal conditions, measure what they cost, keep every finished piece, report.

>>> from pathlib import Path
>>> from rich.console import Console
>>> summary = compare(CompareConfig(("none", "multi_head"), task="digits", out=Path("runs/x"), budget="50steps"), Console())  #
doctest: +SKIP
"""

import dataclasses
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..errors import RegardError, require
from . import candidates as candidates_module
from . import speeds, tasks
from .candidates import Candidate, Setting
from .config import Budget, CompareConfig, check, parse_budget
from .measure import cpu_name, memory_gib
from .records import Records
from .summarise import git_revision, summarise, to_json, write
from .summary import CurvePoint, Machine, Summary, TaskFacts, TrialResult
from .train import Trial, check_shapes
from .worker import Worker, WorkFailed

__all__ = ["CompareConfig", "Plan", "compare", "plan"]

ROOM = 8 * 2**20  # bytes that must be writable in the folder before anything starts
MEASURE_LIMIT = 300.0  # seconds for one measurement
LATENCY_SECONDS = 1.0  # for each candidate at each length


@dataclass(frozen=True)
class Plan:
    """A configuration with every choice made; what `compare` carries out."""

    config: CompareConfig
    task: tasks.Task
    options: dict[str, Any]
    host: str
    candidates: tuple[Candidate, ...]
    lengths: tuple[int, ...]
    cost_lengths: tuple[int, ...]
    budget: Budget
    batch: int
    learning_rate: float
    threads: int
    device: str

    @property
    def longest(self) -> int:
        return max(*self.lengths, *self.cost_lengths)

    def trial(self, candidate: Candidate, length: int) -> Trial:
        device = torch.device("cpu")
        return Trial(self.task, self.options, candidate, self.host, length, self.longest, 0, self.batch, self.learning_rate, device)

    def conditions(self) -> dict[str, Any]:
        """What must be the same for results to stand beside each other."""
        return {
            "task": self.task.name,
            "task options": {k: v for k, v in self.options.items() if k != "layout"},
            "host": self.host,
            "lengths": list(self.lengths),
            "budget": f"{self.budget.amount:g}{self.budget.unit}",
            "batch_size": self.batch,
            "learning_rate": self.learning_rate,
            "threads": self.threads,
            "device": self.device,
        }


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


def plan(config: CompareConfig) -> Plan:
    """Make every choice and check everything that can be checked before any work."""
    check(config)
    task, options = tasks.parse(config.task)
    members = tuple(candidates_module.parse(name) for name in config.candidates)
    host = _host(task, options, members)
    lengths = tuple(sorted(config.lengths or task.lengths[host]))
    if task.fixed:
        require(
            lengths == task.lengths[host],
            "lengths={}: the task {!r} has the length {} only; leave it out",
            lengths,
            task.name,
            task.lengths[host],
        )
    cost_lengths = tuple(sorted(config.cost_lengths or {n * 2**k for n in lengths for k in range(3) if n * 2**k <= 4 * max(lengths)}))
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    made = Plan(
        config=config,
        task=task,
        options=options,
        host=host,
        candidates=members,
        lengths=lengths,
        cost_lengths=cost_lengths,
        budget=parse_budget(config.budget),
        batch=config.batch_size or task.batch,
        learning_rate=config.learning_rate or task.learning_rate,
        threads=config.threads or torch.get_num_threads(),
        device=device,
    )
    for length in lengths:
        _check_length(made, length)
    for candidate in members:
        _parameters(made, candidate)
    return made


def _check_length(made: Plan, length: int) -> None:
    """Build the data of generators whose rules depend on the length, the smallest possible."""
    small = {key: 1 for key in ("train", "test") if key in made.options}
    made.task.data(length, made.host, {**made.options, **small})


def _host(task: tasks.Task, options: dict[str, Any], members: Sequence[Candidate]) -> str:
    """The kind of host in which every candidate can sit."""
    asked = options.get("layout")
    kinds = {"map": "map", "sequence": "tokens", None: None}
    require(asked in kinds, "task {}: layout={!r} is unknown; use map or sequence", task.name, asked)
    possible = [kinds[asked]] if asked is not None else list(task.hosts)
    for host in possible:
        assert host is not None
        if all(candidate.fits(host) for candidate in members):
            return host
    for host in possible:
        assert host is not None
        wrong = [f"{c.name} ({c.card.layout})" for c in members if c.card is not None and not c.fits(host)]
        if len(wrong) < len(members) or len(possible) == 1 or host == possible[-1]:
            raise RegardError(
                f"task {task.name!r} puts candidates into a network over {'maps' if host == 'map' else 'tokens'}; "
                f"{', '.join(wrong)} cannot sit "
                f"there; these can: none, {', '.join(candidates_module.ids_that_fit(Setting(host, False, 4, 64)))}"
            )
    raise AssertionError("unreachable")


def _parameters(made: Plan, candidate: Candidate) -> int:
    """Build the network once: a wrong option, a changed shape or a leak of the future shows here, before any training."""
    try:
        model: nn.Module = check_shapes(made.trial(candidate, made.lengths[0]))
    except RegardError as error:
        raise RegardError(f"candidate {candidate.name!r}: {error}") from error
    except Exception:
        # Not a wrong call but a module that fails; that is recorded with its reason, and the other candidates go on.
        return 0
    return sum(p.numel() for p in model.parameters())


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


@dataclass(frozen=True)
class _Work:
    """One claimable piece: `done` finds a row once it is finished, `run` does it and stores the result."""

    key: str
    done: str
    values: tuple[Any, ...]
    run: Callable[[str], None]


class _Carrier:
    """Does the pieces of a plan with one worker process and stores each before the next."""

    def __init__(self, made: Plan, records: Records, console: Console) -> None:
        self.made, self.records, self.console = made, records, console
        quiet = made.config.json or not console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn(),
            console=console, disable=quiet, transient=True,
        )  # fmt: skip
        self.worker = Worker(
            {
                "task": made.config.task,
                "host": made.host,
                "device": made.device,
                "threads": made.threads,
                "longest": made.longest,
                "batch": made.batch,
                "learning_rate": made.learning_rate,
            }
        )

    def __enter__(self) -> "_Carrier":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.worker.stop()

    def phase(self, title: str, works: Sequence[_Work]) -> None:
        """Do every piece that nobody has done; wait for those that another process is doing, and take them over should it end."""
        bar = self.progress.add_task(title, total=len(works), now="")
        self.bar = bar
        pending = list(works)
        while pending:
            taken: list[_Work] = []
            for work in pending:
                match self.records.claim(work.key, work.done, work.values):
                    case "mine":
                        work.run(work.key)
                    case "taken":
                        taken.append(work)
                self.progress.update(bar, completed=len(works) - len(pending) + pending.index(work) + 1 - len(taken))
            if len(taken) == len(pending):
                self.progress.update(bar, now=f"waiting for process {', '.join(map(str, self.records.others()))}")
                time.sleep(0.5)
            pending = taken
        self.progress.remove_task(bar)

    def say(self, text: str) -> None:
        self.progress.update(self.bar, now=text)

    def calibrate(self, work: str) -> None:
        self.say("the machine's rates")
        before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        try:
            found = self.worker.ask({"work": "calibrate", "length": self.made.lengths[0]}, limit=MEASURE_LIMIT)
        except WorkFailed as failure:
            raise RegardError(f"the worker process cannot start: {failure}") from failure
        self.records.set_fact("chance", found.pop("chance"))
        self.records.set_fact("load", before)
        self.records.set_fact("machine", dataclasses.asdict(_machine(self.made, found)))

    def steps(self, candidate: Candidate, length: int) -> Callable[[str], None]:
        """Turn the budget into steps; a speed seen before on this machine is used again, so that the same command trains the same."""

        def run(work: str) -> None:
            made, seconds = self.made, None
            if made.budget.unit == "s":
                self.say(f"{candidate.name}, length {length}: speed of a step")
                key = _speed_key(made, candidate, length)
                seconds = speeds.recall(key)
                if seconds is None:
                    request = {"work": "plan", "candidate": candidate.name, "length": length, "budget": made.budget.amount}
                    try:
                        seconds = self.worker.ask(request, limit=self.limit(None))
                    except WorkFailed as failure:
                        self.no_plan(work, candidate, length, str(failure))
                        return
                    speeds.remember(key, seconds)
            self.records.save_plan(work, candidate.name, length, made.budget.steps(made.batch, seconds or 1.0), seconds)

        return run

    def no_plan(self, work: str, candidate: Candidate, length: int, reason: str) -> None:
        """A candidate that cannot do one step fails in all its trials."""
        for seed in range(self.made.config.seeds):
            result = TrialResult(candidate.name, length, seed, "failed", reason, None, 0, None)
            self.records.save_trial(_key("trial", candidate.name, length, seed), result, seconds=None, parameters=None, picture=None)
        self.records.save_plan(work, candidate.name, length, 0, None)

    def limit(self, steps: int | None) -> float:
        """Seconds a trial may take: as asked, or ten times its budget and some."""
        if self.made.config.trial_limit is not None:
            return self.made.config.trial_limit
        return 120 + (10 * self.made.budget.amount if self.made.budget.unit == "s" or steps is None else 10.0 * steps)

    def trial(self, candidate: Candidate, length: int, seed: int) -> Callable[[str], None]:
        def run(work: str) -> None:
            planned = self.records.plan(candidate.name, length)
            assert planned is not None
            steps = planned[0]
            name = f"{candidate.name}, length {length}, seed {seed}"
            self.say(name)

            def progress(step: int, loss: float, metric: float | None) -> None:
                more = "" if metric is None else f", {self.made.task.metric} {metric:.3f}"
                self.say(f"{name}: step {step} of {steps}, loss {loss:.3f}{more}")

            request = {
                "work": "trial",
                "candidate": candidate.name,
                "length": length,
                "seed": seed,
                "steps": steps,
                "picture": seed == 0 and length == self.made.lengths[0],
            }
            seconds = parameters = picture = None
            try:
                if steps == 0:
                    raise WorkFailed("it could not do a single step, see its other seeds")
                got = self.worker.ask(request, limit=self.limit(steps), progress=progress)
                curve = tuple(CurvePoint(**point) for point in got["curve"])
                seconds, parameters, picture = got["seconds"], got["parameters"], got["picture"]
                result = TrialResult(candidate.name, length, seed, "ok", "", got["metric"], steps, got["examples_per_second"], curve)
            except WorkFailed as failure:
                result = TrialResult(candidate.name, length, seed, "failed", str(failure), None, steps, None)
            self.records.save_trial(work, result, seconds=seconds, parameters=parameters, picture=picture)

        return run

    def count(self, candidate: Candidate, length: int) -> Callable[[str], None]:
        def run(work: str) -> None:
            self.say(f"{candidate.name}, length {length}: FLOPs and memory")
            counted, reason = None, ""
            try:
                flops, peak, least = self.worker.ask({"work": "count", "candidate": candidate.name, "length": length}, limit=MEASURE_LIMIT)
                counted = (flops, int(peak), int(least))
            except WorkFailed as failure:
                reason = str(failure)
            self.records.save_count(work, candidate.name, length, self.made.task.cost_batch, counted, reason)

        return run

    def latency(self, length: int) -> Callable[[str], None]:
        """Time together, in interleaved rounds, everything that could be counted; where that fails, each alone."""

        def run(work: str) -> None:
            self.say(f"length {length}: time of a pass")
            counts = {c.name: self.records.count(c.name, length) for c in self.made.candidates}
            good = [name for name, count in counts.items() if count is not None and not count[4]]
            rows: dict[str, tuple[float, float, float, int] | str] = {name: "see its count" for name in counts if name not in good}
            try:
                rows |= self._timed(good, length)
            except WorkFailed:
                for name in good:
                    try:
                        rows |= self._timed([name], length)
                    except WorkFailed as failure:
                        rows[name] = str(failure)
            self.records.save_latencies(work, length, rows)

        return run

    def _timed(self, names: list[str], length: int) -> dict[str, tuple[float, float, float, int]]:
        if not names:
            return {}
        request = {"work": "latency", "candidates": names, "length": length, "seconds": LATENCY_SECONDS * len(names)}
        found = self.worker.ask(request, limit=MEASURE_LIMIT)
        return {name: (row[0], row[1], row[2], int(row[3])) for name, row in found.items()}


def _carry_out(made: Plan, records: Records, console: Console) -> Summary:
    config, began = made.config, time.monotonic()
    for candidate in made.candidates:
        records.add_candidate(candidate.name, _facts(made, candidate))
    names = [candidate.name for candidate in made.candidates]
    pairs = [(candidate, length) for length in made.lengths for candidate in made.candidates]
    with _Carrier(made, records, console) as carrier:
        carrier.phase("preparing", [_Work("machine", "select 1 from facts where name = 'machine'", (), carrier.calibrate)])
        query = "select 1 from plans where candidate = ? and length = ?"
        carrier.phase("planning", [_Work(_key("plan", c.name, n), query, (c.name, n), carrier.steps(c, n)) for c, n in pairs])
        query = "select 1 from trials where candidate = ? and length = ? and seed = ?"
        carrier.phase(
            "training",
            # Seed by seed, so that an interrupted run has something of every candidate.
            [_Work(_key("trial", c.name, n, s), query, (c.name, n, s), carrier.trial(c, n, s)) for s in range(config.seeds) for c, n in pairs],
        )
        query = "select 1 from counts where candidate = ? and length = ?"
        costs = [(candidate, length) for length in made.cost_lengths for candidate in made.candidates]
        carrier.phase("counting", [_Work(_key("count", c.name, n), query, (c.name, n), carrier.count(c, n)) for c, n in costs])
        query = f"select 1 where (select count(*) from latencies where length = ? and candidate in ({', '.join('?' * len(names))})) = ?"
        carrier.phase("timing", [_Work(_key("latency", n), query, (n, *names, len(names)), carrier.latency(n)) for n in made.cost_lengths])
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
        "parameters": _parameters(made, candidate),
        "cannot": list(candidates_module.cannot(candidate, made.host)),
    }


def _machine(made: Plan, rates: dict[str, float]) -> Machine:
    from .. import __version__

    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        threads=made.threads,
        memory_gib=round(memory_gib(), 1),
        device=torch.cuda.get_device_name() if made.device == "cuda" else "cpu",
        python=sys.version.split()[0],
        torch=torch.__version__,
        regard=__version__,
        git=git_revision(),
        gflops=rates["gflops"],
        gbytes=rates["gbytes"],
    )


def _key(*parts: object) -> str:
    return " ".join(map(str, parts))


def _speed_key(made: Plan, candidate: Candidate, length: int) -> str:
    from .. import __version__

    where = torch.cuda.get_device_name() if made.device == "cuda" else cpu_name()
    options = ",".join(f"{k}={v}" for k, v in sorted(made.options.items()))
    parts = [candidate.name, f"{made.task.name}:{options}", made.host, f"length {length}", f"batch {made.batch}"]
    return " | ".join([*parts, f"threads {made.threads}", f"torch {torch.__version__}", f"regard {__version__}", where])


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
