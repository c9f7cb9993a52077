"""A whole comparison, small: the same figures twice, failures recorded, everything reported."""

import csv
import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from regard.errors import RegardError
from regard.workbench import carrier, speeds
from regard.workbench.compare import CompareConfig, compare
from regard.workbench.summary import Summary


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "LATENCY_SECONDS", 0.02)


def run(config: CompareConfig) -> Summary:
    return compare(config, Console(quiet=True))


def figures(summary: Summary) -> dict[tuple[str, int, int], tuple]:
    """What must repeat to the last bit."""
    trials = {(t.candidate, t.length, t.seed): t for t in summary.trials}
    return {key: (t.metric, t.steps, [(p.step, p.loss, p.metric) for p in t.curve]) for key, t in trials.items()}


def test_same_figures_twice_and_failures_do_not_stop_the_others(tmp_path: Path) -> None:
    bad = ("toys:Fails", "toys:Killed", "toys:Sleeps")
    config = CompareConfig(
        ("toys:Gate", *bad, "none"), "digits:width=8", tmp_path / "a", seeds=2, budget="8steps", threads=1, cost_lengths=(8, 16), trial_limit=5
    )
    first = run(replace(config, seeds=1))
    trials = {t.candidate: t for t in first.trials}
    assert {name for name, t in trials.items() if t.status == "ok"} == {"toys:Gate", "none"}
    assert trials["toys:Fails"].reason == "RuntimeError: this one fails"
    assert "memory" in trials["toys:Killed"].reason and "signal 9" in trials["toys:Killed"].reason
    assert "time limit of 5 s" in trials["toys:Sleeps"].reason
    failing = {c.name: c.failures for c in first.candidates}
    assert failing["toys:Fails"] == ("length 8 seed 0: RuntimeError: this one fails",) and not failing["none"]

    # More seeds on resume: what is there stays as it is, and the new ones join.
    good = replace(config, candidates=("toys:Gate", "none"), resume=True)
    more = run(good)
    assert figures(more).items() >= figures(first).items()
    assert len(more.trials) == 7 and len(more.candidates) == 5, "nothing reported is lost"
    alone = run(replace(good, out=tmp_path / "b", resume=False))
    assert all(figures(more)[key] == value for key, value in figures(alone).items()), "same seed, same figures"
    assert len(figures(alone)) == 4

    with pytest.raises(RegardError, match=r"budget '8steps' there, '9steps' here"):
        run(replace(good, budget="9steps"))

    gate = next(c for c in alone.candidates if c.name == "toys:Gate")
    assert gate.score[8].half_width is not None and gate.parameters > 1000
    assert [cost.length for cost in gate.costs] == [8, 16]
    assert all(cost.flops > 0 and cost.peak_bytes > 0 and cost.latency_q25 <= cost.latency_ms <= cost.latency_q75 for cost in gate.costs)
    assert gate.flops_exponent == pytest.approx(2, abs=0.1), "a convolution's work grows with the square of the side"
    assert alone.task.chance is not None and 0.09 < alone.task.chance < 0.12
    written = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert written["candidates"][0]["score"]["8"]["mean"] == gate.score[8].mean
    rows = list(csv.DictReader((tmp_path / "b" / "results.csv").read_text().splitlines()))
    assert len(rows) == 4 and {row["length"] for row in rows} == {"8", "16"}
    assert (tmp_path / "b" / "report.html").stat().st_size > 1000


def test_a_budget_in_seconds_is_remembered_as_steps(tmp_path: Path) -> None:
    config = CompareConfig(("none",), "digits:width=4", tmp_path / "a", seeds=1, budget="0.2s", threads=1, cost_lengths=(8,))
    first = run(config)
    assert len(json.loads(speeds.path().read_text())) == 1
    second = run(replace(config, out=tmp_path / "b"))
    assert figures(first) == figures(second)
    assert first.trials[0].steps >= 1
    assert any("turned into steps" in note for note in first.notes)


def test_attention_is_pictured(tmp_path: Path) -> None:
    summary = run(CompareConfig(("multi_head",), "digits:dim=16,depth=1", tmp_path, seeds=1, budget="3steps", threads=1, cost_lengths=(64,)))
    (picture,) = summary.pictures
    assert len(picture.weights) == 64 and max(max(row) for row in picture.weights) == pytest.approx(1)
    assert summary.candidates[0].options == {"num_heads": 4, "causal": False}
    with sqlite3.connect(tmp_path / "results.db") as db:
        assert db.execute("select count(*) from claims where work not in ('machine')").fetchone() == (0,)
    db.close()
