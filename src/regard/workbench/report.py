"""`report.html`: one page that stands alone, with the results, the figures and what every number means."""

import dataclasses
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup, escape

from ..files import write_whole
from .summary import AttentionPicture, CandidateSummary, Estimate, Summary
from .table import (
    COLUMNS,
    Cell,
    Column,
    bytes_text,
    cannot_badges,
    cells,
    checked_badge,
    conclusion,
    count_text,
    definitions,
    finite,
    half_width,
    labels,
    longest_scored,
    overlap,
    ranking,
    seconds_text,
)

COLOURS = 6
SHAPES = (
    "M5,0A5,5 0 1 1 -5,0A5,5 0 1 1 5,0Z",
    "M-4.4,-4.4H4.4V4.4H-4.4Z",
    "M0,-5.8L5.4,4.2H-5.4Z",
    "M0,-6.2L6.2,0L0,6.2L-6.2,0Z",
    "M0,5.8L5.4,-4.2H-5.4Z",
    "M-5.4,-1.9H-1.9V-5.4H1.9V-1.9H5.4V1.9H1.9V5.4H-1.9V1.9H-5.4Z",
)

FIGURES: tuple[tuple[str, str, str], ...] = (
    (
        "accuracy",
        "{Metric} against latency",
        "Each mark is a candidate trained at the chosen {length_name}: {metric} (mean and 95 % interval over the seeds) against the median "
        "latency of one forward pass (quartiles over rounds). The stepped line joins the candidates that no other one beats in both.",
    ),
    (
        "growth",
        "Growth with {length_name}",
        "Latency, counted peak memory and counted FLOPs of one forward pass at each measured {length_name}. Both axes are logarithmic: a "
        "straight line is a power law, and the number beside a name is its fitted exponent.",
    ),
    (
        "curves",
        "Learning curves",
        "{Metric} on held-out data and training loss at each evaluation. The line is the mean over the seeds, the band runs from the "
        "lowest seed to the highest. Seconds count training only, on this machine.",
    ),
    (
        "pictures",
        "Attention",
        "Weights of trained candidates on a held-out example, as each caption says. Colours run from 0 to the largest value of that "
        "picture, so they compare within a picture, not between two.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the results table."""

    candidate: CandidateSummary
    cells: dict[str, Cell]
    verdict: str
    strip: dict[str, float] | None


def write_report(summary: Summary, out: Path) -> Path:
    """Write `report.html` into the folder `out` (made if need be) and return its path."""
    path = out / "report.html"
    write_whole(path, render(summary).encode())
    return path


def render(summary: Summary) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    task = summary.task
    words = {"metric": task.metric, "Metric": task.metric[:1].upper() + task.metric[1:], "length_name": task.length_name}
    shown = longest_scored(summary) or max(summary.lengths, default=None)
    short = labels(summary)
    figures = {key: (title.format_map(words), text.format_map(words)) for key, title, text in FIGURES if key != "pictures" or summary.pictures}
    view = {
        "labels": [short[c.name] for c in summary.candidates],
        "shapes": SHAPES,
        "colours": COLOURS,
        "shown": shown,
        "trained": [length for length in summary.lengths if ranking(summary, length)],
    }
    return environment.get_template("report.html").render(
        summary=summary,
        task=task,
        short=short,
        headline=_names(conclusion(summary)),
        further=[_names(conclusion(summary, length)) for length in summary.lengths if length != shown and ranking(summary, length)],
        facts=_facts(summary),
        columns=COLUMNS,
        heads=_heads(COLUMNS, definitions(summary)),
        definitions=definitions(summary),
        tables=[(length, _rows(summary, length)) for length in sorted({*summary.lengths, *summary.cost_lengths})],
        shown=shown,
        figures=figures,
        failures=_failures(summary),
        index={c.name: i for i, c in enumerate(summary.candidates)},
        marks=[_mark(i) for i in range(len(summary.candidates))],
        checked_badge=checked_badge,
        cannot_badges=cannot_badges,
        paper=_paper,
        options=lambda c: ", ".join(f"{key}={value!r}" for key, value in c.options.items()),
        machine=_machine(summary),
        summary_json=_embed(dataclasses.replace(summary, pictures=tuple(_rounded(picture) for picture in summary.pictures))),
        view_json=_embed(view),
    )


def _embed(value: object) -> Markup:
    """JSON that no text inside can end early; NaN becomes null."""
    text = msgspec.json.encode(value).decode()
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _rounded(picture: AttentionPicture) -> AttentionPicture:
    """Three digits are all that a colour shows, and keep the page small."""

    def short(rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(float(f"{value:.3g}") for value in row) for row in rows)

    return dataclasses.replace(picture, weights=short(picture.weights), image=short(picture.image) if picture.image else None)


def _names(text: str) -> Markup:
    """Escaped text whose `names` are set as such."""
    return Markup(re.sub(r"`([^`]+)`", r'<b class="name">\1</b>', str(escape(text))))


def _paper(text: str) -> Markup:
    """Escaped text whose arXiv identifiers are links."""
    return Markup(re.sub(r"\b(\d{4}\.\d{4,5})\b", r'<a href="https://arxiv.org/abs/\1" rel="noreferrer">\1</a>', str(escape(text))))


def _mark(index: int) -> Markup:
    """The mark of a candidate: a colour and a shape, hollow from the seventh on."""
    style = f"c{index % COLOURS}" + (" hollow" if index // COLOURS % 2 else "")
    return Markup(f'<svg class="mark {style}" viewBox="-8 -8 16 16" aria-hidden="true"><path d="{SHAPES[index % COLOURS]}"/></svg>')


def _heads(columns: tuple[Column, ...], words: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Headings of the table in two rows: a group spans its columns."""
    heads: list[dict[str, Any]] = []
    for column in columns:
        head = {"key": column.key, "text": words[column.key][0], "tip": words[column.key][1]}
        if column.group and heads and heads[-1]["group"] == column.group:
            heads[-1]["columns"].append(head)
        else:
            heads.append({"group": column.group, "columns": [head]})
    return heads


def _rows(summary: Summary, length: int) -> list[Row]:
    """Rows of the table at a length, the best first; the interval of each score as percentages of the range all of them span."""
    ranked = ranking(summary, length)
    best = ranked[0][1] if ranked else None
    spans = [(score.mean - half_width(score), score.mean + half_width(score)) for _, score in ranked]
    low, high = (min(a for a, _ in spans), max(b for _, b in spans)) if spans else (0.0, 0.0)

    def strip(score: Estimate) -> dict[str, float] | None:
        if high <= low:
            return None
        half = half_width(score)
        return {
            "left": 100 * (score.mean - half - low) / (high - low),
            "width": 200 * half / (high - low),
            "mean": 100 * (score.mean - low) / (high - low),
        }

    rows = []
    for candidate, score in ranked:
        verdict = "best" if score is best else "within noise" if best and len(score.values) > 1 and overlap(best, score) else ""
        rows.append(Row(candidate, cells(summary, candidate, length), verdict if len(ranked) > 1 else "", strip(score)))
    done = {candidate.name for candidate, _ in ranked}
    return rows + [Row(c, cells(summary, c, length), "", None) for c in summary.candidates if c.name not in done]


def _failures(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Candidate, what (a seed or the cost), lengths, and reason of everything that did not work."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for trial in summary.trials:
        if trial.status != "ok":
            found.setdefault((trial.candidate, f"training, seed {trial.seed}", trial.reason or "no reason given"), []).append(trial.length)
    for candidate in summary.candidates:
        for cost in candidate.costs:
            if cost.reason or not finite(cost.latency_ms):
                found.setdefault((candidate.name, "cost", cost.reason or "no figure"), []).append(cost.length)
        told = [reason for name, _, reason in found if name == candidate.name]
        for text in candidate.failures:
            if not any(reason in text for reason in told):
                found[candidate.name, "", text] = []
    return [(name, what, ", ".join(f"{length:,}" for length in lengths), reason) for (name, what, reason), lengths in found.items()]


def _facts(summary: Summary) -> list[tuple[str, str]]:
    """The line of facts under the headline."""
    task, machine = summary.task, summary.machine
    metric = f"{task.metric}, {'higher' if task.higher_is_better else 'lower'} is better"
    chance = "" if task.chance is None else f" (chance {task.chance:.3g})"
    return [
        ("Task", task.title),
        ("Metric", metric + chance),
        (task.length_name.capitalize(), ", ".join(f"{length:,}" for length in summary.lengths)),
        ("Seeds", ", ".join(map(str, summary.seeds)) + (" (one seed: no intervals)" if len(summary.seeds) == 1 else "")),
        ("Budget", summary.budget),
        ("Machine", machine.device if machine.device not in ("", "cpu") else machine.cpu),
    ]


def _machine(summary: Summary) -> list[tuple[str, str]]:
    machine = summary.machine
    try:
        started = datetime.fromisoformat(summary.started).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        started = summary.started
    return [
        ("Run", f"{started}, took {seconds_text(summary.seconds)}"),
        ("Device", machine.device),
        ("Processor", f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads used"),
        ("Memory", bytes_text(machine.memory_gib * 2**30)),
        ("Calibrated rates", f"{count_text(machine.gflops * 1e9)}FLOP/s matrix product, {count_text(machine.gbytes * 1e9)}B/s copy"),
        (
            "Versions",
            f"Python {machine.python}, PyTorch {machine.torch}, regard {machine.regard}" + (f" ({machine.git})" if machine.git else ""),
        ),
    ]
