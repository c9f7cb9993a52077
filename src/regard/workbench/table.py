"""A comparison in words and numbers: the cells that the terminal table and the report share, and the conclusion."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ..card import CAPABILITIES
from .summary import CandidateSummary, Cost, Estimate, Summary

CHECKED: Mapping[str, tuple[str, str]] = {
    "authors": ("authors' code", "Outputs and gradients equal those of the authors' code."),
    "public": ("public code", "Outputs and gradients equal those of a trusted public implementation."),
    "equations": ("equations", "No code was published; equal to the paper's equations evaluated in float64."),
    "reconstruction": ("reconstruction", "The paper leaves details open; this is a documented reading of it."),
}
UNCHECKED = ("not checked", "Nobody has compared this module with a reference.")


@dataclass(frozen=True)
class Column:
    """A column of the results; `wide` ones are left out of a narrow terminal. `{name}` in a definition is filled from the task."""

    key: str
    heading: str
    definition: str
    wide: bool = False
    group: str = ""


COLUMNS: tuple[Column, ...] = (
    Column(
        "score",
        "{metric}",
        "{metric_definition} Mean over the seeds ± half the width of its 95 % interval (Student's t); {direction} is better. A candidate is "
        "marked “within noise” when its interval overlaps that of the best one. The intervals are per candidate, not corrected for how many "
        "candidates are compared.",
    ),
    Column("parameters", "params", "Trainable numbers in the whole network, the part shared by all candidates included."),
    Column("speed", "train ex/s", "Examples trained on per second (forward, backward, update), mean over the seeds.", wide=True),
    Column(
        "latency",
        "latency",
        "Time of one forward pass of the whole network on one batch, without gradients: median over rounds, with the quartiles. The batch "
        "size is in the tooltip.",
    ),
    Column(
        "flops",
        "FLOPs",
        "Floating-point operations of the matrix products in that forward pass (2·m·n·k each), counted while it runs, not timed. "
        "Element-wise work is not counted.",
    ),
    Column("memory", "peak mem", "Most bytes alive at one moment of that forward pass beyond the weights, counted, not sampled."),
    Column(
        "floor",
        "× floor",
        "Latency divided by the machine's floor: the least time its calibrated matrix-product and copy rates allow for the counted FLOPs and "
        "the bytes that must move. 1 is the limit of the hardware; large values are overhead.",
    ),
    Column("time", "time", "Exponent e of the fit latency ∝ {length_name}^e over the cost lengths, on log axes.", group="growth"),
    Column("space", "mem", "The same fit for the counted peak memory.", wide=True, group="growth"),
    Column("work", "FLOPs", "The same fit for the counted FLOPs.", wide=True, group="growth"),
    Column(
        "crossover",
        "crossover",
        "Shortest measured {length_name} from which on the candidate is faster than multi_head. “not seen” means at no measured {length_name}.",
        wide=True,
    ),
)


@dataclass(frozen=True)
class Cell:
    """What a cell shows, what it is sorted by (None = nothing to sort, always last), a second line and a tooltip."""

    text: str
    value: float | None = None
    detail: str = ""
    tip: str = ""


MISSING = Cell("–")


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def significant(value: float, digits: int = 3) -> str:
    """`value` to so many significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def scaled(value: float, step: float, units: tuple[str, ...], gap: str = " ") -> str:
    unit = 0
    while abs(value) >= step * (0.9995 if step == 1000 else 1) and unit < len(units) - 1:
        value, unit = value / step, unit + 1
    return significant(value) + (gap if units[unit] else "") + units[unit]


def count_text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1000 and float(value).is_integer() else scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def bytes_text(value: float) -> str:
    return scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def time_text(milliseconds: float) -> str:
    return scaled(milliseconds * 1000, 1000, ("µs", "ms", "s"))


def seconds_text(seconds: float) -> str:
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def estimate_text(estimate: Estimate) -> str:
    """Mean ± half-width with one number of decimals for all candidates of a metric: three below 10."""
    size = abs(estimate.mean)
    decimals = 3 if size < 10 else 2 if size < 100 else 1
    text = f"{estimate.mean:,.{decimals}f}"
    if estimate.half_width is None or not finite(estimate.half_width):
        return text
    smallest = 10.0**-decimals
    return f"{text} ± {'<' if 0 < estimate.half_width < smallest / 2 else ''}{max(estimate.half_width, smallest * (estimate.half_width > 0)):.{decimals}f}"


def labels(summary: Summary) -> dict[str, str]:
    """A short name for each candidate, for figures and sentences: no module path, options cut; still different from each other."""
    result: dict[str, str] = {}
    for candidate in summary.candidates:
        parts = candidate.name.split(":")
        if len(parts) > 1 and "." in parts[0] or len(parts) > 2:
            parts = parts[1:]
        text = ":".join(parts)
        text = text if len(text) <= 26 else text[:25] + "…"
        taken, number = text, 2
        while taken in result.values():
            taken, number = f"{text[:23]} #{number}", number + 1
        result[candidate.name] = taken
    return result


def cost_at(candidate: CandidateSummary, length: int) -> Cost | None:
    """The cost at this length if it was measured."""
    return next((cost for cost in candidate.costs if cost.length == length and finite(cost.latency_ms)), None)


def ranking(summary: Summary, length: int) -> list[tuple[CandidateSummary, Estimate]]:
    """Candidates with a score at this length, the best first."""
    scored = [(c, c.score[length]) for c in summary.candidates if length in c.score and finite(c.score[length].mean)]
    return sorted(scored, key=lambda pair: pair[1].mean, reverse=summary.task.higher_is_better)


def overlap(a: Estimate, b: Estimate) -> bool:
    """Whether the 95 % intervals meet; an estimate without one (a single seed) is not known to differ from anything."""
    if a.half_width is None or b.half_width is None:
        return True
    return abs(a.mean - b.mean) <= a.half_width + b.half_width


def longest_scored(summary: Summary) -> int | None:
    return max((length for length in summary.lengths if ranking(summary, length)), default=None)


def _listed(names: list[str]) -> str:
    shown = [f"`{name}`" for name in names]
    if len(shown) > 4:
        shown = [*shown[:3], f"{len(shown) - 3} others"]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def conclusion(summary: Summary, length: int | None = None) -> str:
    """One line: who is best at this length (by default the longest), whether that is more than noise, and at what cost. Names stand in backticks."""
    length = longest_scored(summary) if length is None else length
    task, short = summary.task, labels(summary)
    ranked = ranking(summary, length) if length is not None else []
    if length is None or not ranked:
        return f"No candidate finished training on {task.title}: there is nothing to compare."
    (best, score), others = ranked[0], ranked[1:]
    name, place = short[best.name], f"on {task.title} at {task.length_name} {length:,}"
    seeds = min(len(estimate.values) for _, estimate in ranked)
    noise = f"the noise of {seeds} seeds" if seeds > 1 else "what one seed can show"
    sign = 1 if task.higher_is_better else -1
    fastest = min((c for c, _ in ranked if cost_at(c, length)), key=lambda c: cost_at(c, length).latency_ms, default=None)  # pyright: ignore[reportOptionalMemberAccess]

    if task.chance is not None and sign * (score.mean - task.chance) <= (score.half_width or 0):
        text = f"No candidate is better than chance ({significant(task.chance)}) {place} beyond {noise}; the best {task.metric} is {estimate_text(score)} (`{name}`)."
    elif not others:
        text = f"`{name}` reaches {task.metric} {estimate_text(score)} {place}{_cost_clause(best, length)}."
    else:
        tied = [c for c, estimate in others if overlap(score, estimate)]
        if seeds == 1:
            text = f"`{name}` has the best {task.metric} {place} ({estimate_text(score)}), but one seed cannot tell a difference from noise."
        elif not tied:
            second, second_score = others[0]
            text = (
                f"`{name}` is best {place}: {task.metric} {estimate_text(score)}, more than the 95 % intervals over {seeds} seeds apart from the next, "
                f"`{short[second.name]}` ({estimate_text(second_score)}){_cost_clause(best, length, fastest, short)}."
            )
        elif len(tied) == len(others):
            text = f"No difference in {task.metric} beyond {noise} {place}: {_listed([short[c.name] for c, _ in ranked])} overlap (best mean {estimate_text(score)}, `{name}`)."
        else:
            text = (
                f"`{name}` has the best {task.metric} {place} ({estimate_text(score)}), "
                f"no different beyond {noise} from {_listed([short[c.name] for c in tied])}."
            )
        group = [c for c in (best, *tied) if cost_at(c, length)]
        if tied and len(group) > 1:
            text += _fastest_clause(group, best, length, short)
    unfinished = [short[c.name] for c in summary.candidates if length in summary.lengths and c not in [r for r, _ in ranked]]
    return text + (f" {_listed(unfinished)} did not finish." if unfinished else "")


def _cost_clause(best: CandidateSummary, length: int, fastest: CandidateSummary | None = None, short: Mapping[str, str] | None = None) -> str:
    cost = cost_at(best, length)
    if cost is None:
        return ""
    text = f", at {time_text(cost.latency_ms)} a batch"
    if fastest is None or short is None:
        return text
    if fastest is best:
        return f"{text}, the fastest too"
    other = cost_at(fastest, length)
    return text if other is None else f"{text}, {significant(cost.latency_ms / other.latency_ms, 2)}× the time of the fastest, `{short[fastest.name]}`"


def _fastest_clause(group: list[CandidateSummary], best: CandidateSummary, length: int, short: Mapping[str, str]) -> str:
    costs = {c.name: cost for c in group if (cost := cost_at(c, length))}
    quick = min(costs, key=lambda name: costs[name].latency_ms)
    text = f" The fastest of these is `{short[quick]}`: {time_text(costs[quick].latency_ms)} a batch"
    if quick == best.name or best.name not in costs:
        return text + "."
    ratio = costs[best.name].latency_ms / costs[quick].latency_ms
    return f"{text}, against {time_text(costs[best.name].latency_ms)} for `{short[best.name]}` ({significant(ratio, 2)}×)."


def definitions(summary: Summary) -> dict[str, tuple[str, str]]:
    """Heading and definition of each column, filled with the task's words."""
    task = summary.task
    words = {
        "metric": task.metric,
        "metric_definition": task.metric_definition.rstrip(". ") + ".",
        "direction": "higher" if task.higher_is_better else "lower",
        "length_name": task.length_name,
    }
    return {column.key: (column.heading.format_map(words), column.definition.format_map(words)) for column in COLUMNS}


def cells(summary: Summary, candidate: CandidateSummary, length: int) -> dict[str, Cell]:
    """What each column shows for a candidate at a length."""
    cost = cost_at(candidate, length)
    result = {column.key: MISSING for column in COLUMNS}
    result["parameters"] = Cell(count_text(candidate.parameters), candidate.parameters, tip=f"{candidate.parameters:,}")
    score = candidate.score.get(length)
    if score and finite(score.mean):
        values = ", ".join(significant(value, 4) for value in score.values)
        result["score"] = Cell(estimate_text(score), score.mean, tip=f"each seed: {values}")
    speed = candidate.examples_per_second.get(length)
    if speed and finite(speed.mean):
        result["speed"] = Cell(count_text(float(f"{speed.mean:.3g}")), speed.mean)
    if cost:
        low, high = time_text(cost.latency_q25), time_text(cost.latency_q75)
        if low.split(" ")[-1] == high.split(" ")[-1]:
            low = low.split(" ")[0]
        result["latency"] = Cell(time_text(cost.latency_ms), cost.latency_ms, f"{low}–{high}", f"batch of {cost.batch}")
        if finite(cost.flops):
            result["flops"] = Cell(count_text(cost.flops), cost.flops, tip=f"{cost.flops:,.0f}, batch of {cost.batch}")
        if finite(cost.peak_bytes):
            result["memory"] = Cell(bytes_text(cost.peak_bytes), cost.peak_bytes, tip=f"{cost.peak_bytes:,} bytes")
        if finite(cost.over_floor):
            result["floor"] = Cell(f"{significant(cost.over_floor, 2)}×", cost.over_floor, tip=f"floor {time_text(cost.floor_ms)}")
    else:
        reason = next((c.reason for c in candidate.costs if c.length == length and c.reason), "")
        result["latency"] = Cell("–", tip=reason)
    for key, exponent in (("time", candidate.time_exponent), ("space", candidate.memory_exponent), ("work", candidate.flops_exponent)):
        if exponent is not None and finite(exponent):
            result[key] = Cell(f"{exponent:.2f}", exponent)
    if candidate.crossover_length is not None:
        result["crossover"] = Cell(f"{candidate.crossover_length:,}", candidate.crossover_length)
    elif candidate.id != "multi_head" and any(other.id == "multi_head" for other in summary.candidates):
        result["crossover"] = Cell("not seen")
    return result


def checked_badge(candidate: CandidateSummary) -> tuple[str, str]:
    """Label and full text of what the candidate was checked against."""
    return CHECKED.get(candidate.checked_against, (candidate.checked_against, "As its card says.") if candidate.checked_against else UNCHECKED)


def cannot_badges(candidate: CandidateSummary) -> list[tuple[str, str]]:
    """Label and full text of each thing the candidate cannot do."""
    badges = []
    for text in candidate.cannot:
        if text in CAPABILITIES:
            badges.append((text.replace("_", " "), f"It lacks: {CAPABILITIES[text]}"))
        else:
            head = text.split(":")[0].strip()
            badges.append((head if len(head) <= 22 else head[:21] + "…", text))
    return badges


def table(summary: Summary, width: int | None = None) -> Table:
    """The results for the terminal: a row for each candidate and length, the best first. Below 120 columns the `wide` columns are left out."""
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    headings, short = definitions(summary), labels(summary)
    lengths = [length for length in summary.lengths if ranking(summary, length)] or list(summary.lengths[-1:])
    shown = [column for column in COLUMNS if width >= 120 or not column.wide]
    title = f"{summary.task.title}, {summary.task.length_name} {', '.join(f'{length:,}' for length in lengths)}"
    result = Table(title=Text(title), caption=Text(conclusion(summary)), title_justify="left", caption_justify="left", expand=False)
    result.add_column("candidate", max_width=28 if width >= 120 else 22, overflow="fold")
    if len(lengths) > 1:
        result.add_column(Text(summary.task.length_name), justify="right", no_wrap=True)
    for column in shown:
        heading = f"{column.heading} ^" if column.group else headings[column.key][0]
        result.add_column(Text(heading), justify="right", no_wrap=column.key != "score" or len(headings["score"][0]) < 16)
    if width >= 120:
        result.add_column("cannot", max_width=24)
    for length in lengths:
        ranked = [candidate for candidate, _ in ranking(summary, length)]
        best = ranking(summary, length)[0][1] if ranked else None
        for candidate in ranked + [c for c in summary.candidates if c not in ranked]:
            row = cells(summary, candidate, length)
            values = [Text(row[column.key].text) for column in shown]
            score = candidate.score.get(length)
            if best and score and finite(score.mean) and overlap(best, score):
                values[0].stylize("bold green" if candidate is ranked[0] else "green")
            texts = [Text(short[candidate.name])] + ([Text(f"{length:,}")] if len(lengths) > 1 else []) + values
            if width >= 120:
                texts.append(Text(", ".join(label for label, _ in cannot_badges(candidate))))
            result.add_row(*texts)
        result.add_section()
    return result
