"""Doing the pieces of a plan: each is claimed, done by one worker process, and stored before the next."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import RegardError
from . import speeds
from .candidates import Candidate
from .measure import cpu_name, memory_gib
from .planning import Plan
from .records import Records
from .summarise import git_revision
from .summary import CurvePoint, Machine, TrialResult
from .worker import Worker, WorkFailed

MEASURE_LIMIT = 300.0  # seconds for one measurement
LATENCY_SECONDS = 1.0  # for each candidate at each length


@dataclass(frozen=True)
class Work:
    """One claimable piece: `done` finds a row once it is finished, `run` does it and stores the result."""

    key: str
    done: str
    values: tuple[Any, ...]
    run: Callable[[str], None]


class Carrier:
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

    def __enter__(self) -> "Carrier":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.worker.stop()

    def phase(self, title: str, works: Sequence[Work]) -> None:
        """Do every piece that nobody has done; wait for those that another process is doing, and take them over should it end."""
        bar = self.progress.add_task(title, total=len(works), now="")
        self.bar = bar
        pending = list(works)
        while pending:
            taken: list[Work] = []
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
            self.records.save_trial(key_of("trial", candidate.name, length, seed), result, seconds=None, parameters=None, picture=None)
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


def key_of(*parts: object) -> str:
    return " ".join(map(str, parts))


def _speed_key(made: Plan, candidate: Candidate, length: int) -> str:
    from .. import __version__

    where = torch.cuda.get_device_name() if made.device == "cuda" else cpu_name()
    options = ",".join(f"{k}={v}" for k, v in sorted(made.options.items()))
    parts = [candidate.name, f"{made.task.name}:{options}", made.host, f"length {length}", f"batch {made.batch}"]
    return " | ".join([*parts, f"threads {made.threads}", f"torch {torch.__version__}", f"regard {__version__}", where])
