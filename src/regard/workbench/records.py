"""results.db: everything a comparison has found so far, in plain SQL. Each finished piece of work is there before the next begins.

Several processes may share one database. A piece of work is claimed under a key before it is done; the claim names the process, and a claim whose
process is gone is free again.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import RegardError
from .summary import Cost, CurvePoint, TrialResult

SCHEMA = """
create table if not exists facts (name text primary key, value text not null);
create table if not exists candidates (name text primary key, place integer not null, facts text not null);
create table if not exists claims (work text primary key, owner text not null, since real not null);
create table if not exists plans (candidate text, length integer, steps integer not null, seconds_per_step real,
    primary key (candidate, length));
create table if not exists trials (candidate text, length integer, seed integer, status text not null, reason text not null, metric real,
    steps integer not null, seconds real, examples_per_second real, parameters integer, finished real not null,
    primary key (candidate, length, seed));
create table if not exists curves (candidate text, length integer, seed integer, step integer, examples integer, seconds real, loss real,
    metric real, primary key (candidate, length, seed, step));
create table if not exists counts (candidate text, length integer, batch integer not null, flops real, peak_bytes integer, least_bytes
integer,
    reason text not null, primary key (candidate, length));
create table if not exists latencies (candidate text, length integer, median_ms real, q25_ms real, q75_ms real, rounds integer,
    reason text not null, primary key (candidate, length));
create table if not exists pictures (candidate text primary key, picture text not null);
"""


class Records:
    """The database of one folder.

    Args:
        path: of results.db; made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("pragma journal_mode=wal")
            self._db.execute("pragma synchronous=full")
            self._db.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise RegardError(f"{path} cannot be used as a results database: {error}") from error
        self.owner = process_mark(os.getpid())

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction, begun at once, so that two processes take turns."""
        try:
            self._db.execute("begin immediate")
            try:
                yield self._db
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")
        except sqlite3.OperationalError as error:
            raise RegardError(f"writing {self.path} failed: {error}; what was finished before is kept, free some space and use --resume") from error

    def fact(self, name: str) -> Any:
        """A stored value, or None."""
        row = self._db.execute("select value from facts where name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_fact(self, name: str, value: Any) -> None:
        with self._write() as db:
            db.execute("insert or replace into facts values (?, ?)", (name, json.dumps(value)))

    def candidates(self) -> dict[str, dict[str, Any]]:
        """Facts by candidate, in the order they were first asked for."""
        return {name: json.loads(facts) for name, facts in self._db.execute("select name, facts from candidates order by place")}

    def add_candidate(self, name: str, facts: dict[str, Any]) -> None:
        with self._write() as db:
            place = db.execute("select coalesce(max(place), 0) + 1 from candidates").fetchone()[0]
            db.execute("insert or ignore into candidates values (?, ?, ?)", (name, place, json.dumps(facts)))

    def claim(self, work: str, done_query: str, values: Sequence[Any]) -> str:
        """ "mine" when the work is now this process's, "done" when `done_query` finds a row, "taken" when a living process has it."""
        with self._write() as db:
            if db.execute(done_query, values).fetchone():
                return "done"
            row = db.execute("select owner from claims where work = ?", (work,)).fetchone()
            if row is not None and row[0] != self.owner and alive(row[0]):
                return "taken"
            db.execute("insert or replace into claims values (?, ?, ?)", (work, self.owner, time.time()))
            return "mine"

    def release(self) -> None:
        """Give back what this process has claimed and not finished."""
        with self._write() as db:
            db.execute("delete from claims where owner = ?", (self.owner,))

    def others(self) -> list[int]:
        """Process ids of the living others that hold claims."""
        owners = {row[0] for row in self._db.execute("select owner from claims")}
        return sorted(int(owner.split(":")[0]) for owner in owners if owner != self.owner and alive(owner))

    def save_plan(self, work: str, candidate: str, length: int, steps: int, seconds_per_step: float | None) -> None:
        with self._write() as db:
            db.execute("insert or replace into plans values (?, ?, ?, ?)", (candidate, length, steps, seconds_per_step))
            db.execute("delete from claims where work = ?", (work,))

    def plan(self, candidate: str, length: int) -> tuple[int, float | None] | None:
        """(steps, seconds a step) of a candidate's trainings."""
        return self._db.execute("select steps, seconds_per_step from plans where candidate = ? and length = ?", (candidate, length)).fetchone()

    def save_trial(self, work: str, result: TrialResult, *, seconds: float | None, parameters: int | None, picture: dict[str, Any] | None) -> None:
        """Store one finished trial, its curve and its picture together."""
        key = (result.candidate, result.length, result.seed)
        with self._write() as db:
            db.execute(
                "insert or replace into trials values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *key,
                    result.status,
                    result.reason,
                    result.metric,
                    result.steps,
                    seconds,
                    result.examples_per_second,
                    parameters,
                    time.time(),
                ),
            )
            db.execute("delete from curves where candidate = ? and length = ? and seed = ?", key)
            rows = [(*key, p.step, p.examples, p.seconds, p.loss, p.metric) for p in result.curve]
            db.executemany("insert into curves values (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            if picture is not None:
                db.execute("insert or replace into pictures values (?, ?)", (result.candidate, json.dumps(picture)))
            db.execute("delete from claims where work = ?", (work,))

    def forget_failures(self) -> None:
        """Drop failed trials and failed measurements, so that they run again."""
        with self._write() as db:
            db.execute("delete from trials where status = 'failed'")
            db.execute("delete from plans where steps = 0")
            db.execute("delete from counts where reason <> ''")
            db.execute("delete from latencies where reason <> ''")

    def trials(self) -> list[TrialResult]:
        """All finished trials with their curves, by candidate's place, length and seed."""
        curves: dict[tuple[str, int, int], list[CurvePoint]] = {}
        for candidate, length, seed, *point in self._db.execute("select * from curves order by candidate, length, seed, step"):
            curves.setdefault((candidate, length, seed), []).append(CurvePoint(*point))
        rows = self._db.execute(
            "select t.candidate, length, seed, status, reason, metric, steps, examples_per_second from trials t "
            "left join candidates c on c.name = t.candidate order by c.place, length, seed"
        )
        return [TrialResult(*row, curve=tuple(curves.get(row[:3], ()))) for row in rows]

    def trial_facts(self) -> list[tuple[str, int, int, float | None, int | None]]:
        """(candidate, length, seed, seconds of training, parameters) of finished trials."""
        return self._db.execute("select candidate, length, seed, seconds, parameters from trials").fetchall()

    def save_count(self, work: str, candidate: str, length: int, batch: int, counted: tuple[float, int, int] | None, reason: str) -> None:
        with self._write() as db:
            db.execute("insert or replace into counts values (?, ?, ?, ?, ?, ?, ?)", (candidate, length, batch, *(counted or (None,) * 3), reason))
            db.execute("delete from claims where work = ?", (work,))

    def count(self, candidate: str, length: int) -> tuple[int, float, int, int, str] | None:
        """(batch, FLOPs, peak bytes, least bytes, reason) of one pass."""
        query = "select batch, flops, peak_bytes, least_bytes, reason from counts where candidate = ? and length = ?"
        return self._db.execute(query, (candidate, length)).fetchone()

    def save_latencies(self, work: str, length: int, rows: dict[str, tuple[float, float, float, int] | str]) -> None:
        """Store (median, lower, upper quartile, rounds) or the reason of a failure, for candidates timed together."""
        with self._write() as db:
            for candidate, row in rows.items():
                values = (None, None, None, 0, row) if isinstance(row, str) else (*row, "")
                db.execute("insert or replace into latencies values (?, ?, ?, ?, ?, ?, ?)", (candidate, length, *values))
            db.execute("delete from claims where work = ?", (work,))

    def latency(self, candidate: str, length: int) -> tuple[float, float, float, int, str] | None:
        query = "select median_ms, q25_ms, q75_ms, rounds, reason from latencies where candidate = ? and length = ?"
        return self._db.execute(query, (candidate, length)).fetchone()

    def costs(self, candidate: str, length: int, floor_ms: Any) -> Cost | None:
        """What was counted and timed at one length; `floor_ms` turns (FLOPs, least bytes) into milliseconds."""
        counted, timed = self.count(candidate, length), self.latency(candidate, length)
        if counted is None:
            return None
        nan = float("nan")
        batch, flops, peak, least, reason = counted
        if reason:
            return Cost(candidate, length, batch, nan, nan, nan, nan, 0, nan, nan, reason)
        floor = floor_ms(flops, least)
        if timed is None or timed[4]:
            return Cost(candidate, length, batch, nan, nan, nan, flops, peak, floor, nan, timed[4] if timed else "not timed")
        return Cost(candidate, length, batch, timed[0], timed[1], timed[2], flops, peak, floor, timed[0] / floor)

    def pictures(self) -> dict[str, dict[str, Any]]:
        return {name: json.loads(picture) for name, picture in self._db.execute("select candidate, picture from pictures")}


def process_mark(pid: int) -> str:
    """ "pid:start": the start time tells a process from a later one with the same id; the boot from one before a restart."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The name in brackets may hold spaces; the fields after it do not.
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        return f"{pid}::"
    # A zombie has ended; only its parent has not asked how.
    return f"{pid}:{fields[19]}:{boot}" if fields[0] != "Z" else f"{pid}:ended:"


def alive(mark: str) -> bool:
    """Whether the process of this mark still runs."""
    pid = int(mark.split(":")[0])
    if mark.endswith("::"):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return process_mark(pid) == mark
