"""A comparison in words and numbers: the cells that the terminal table and the report share, and the conclusion."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
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
    """A column of the results; a narrow terminal leaves out those of the highest rank first. `{name}` is filled from the task."""

    key: str
    heading: str
    definition: str
    rank: int = 0
    group: str = ""


COLUMNS: tuple[Column, ...] = (
    Column(
        "score",
        "{metric}",
        "{metric_definition} Mean over the seeds ± half the width of its 95 % interval (Student's t); {direction} is better. A candidate "
        "is marked “within noise” when its interval overlaps that of the best one. The intervals are per candidate, not corrected for how "
        "many candidates are compared.",
    ),
    Column("parameters", "params", "Trainable numbers in the whole network, the part shared by all candidates included.", rank=4),
    Column("speed", "train ex/s", "Examples trained on per second (forward, backward, update), mean over the seeds.", rank=6),
    Column(
        "latency",
        "latency",
        "Time of one forward pass of the whole network on one batch, without gradients: median over rounds, with the quartiles. The batch "
        "size is in the tooltip.",
        rank=1,
    ),
    Column(
        "flops",
        "FLOPs",
        "Floating-point operations of the matrix products in that forward pass (2·m·n·k each), counted while it runs, not timed. "
        "Element-wise work is left out.",
        rank=5,
    ),
    Column(
        "memory",
        "peak mem",
        "Most bytes of tensors alive at one moment of that forward pass, beyond inputs and parameters; counted, not sampled.",
        rank=2,
    ),
    Column(
        "floor",
        "× floor",
        "Latency divided by the machine's floor: the least time its calibrated matrix-product and copy rates allow for the counted FLOPs "
        "and the bytes that must move. 1 is the limit of the hardware; large values are overhead.",
        rank=3,
    ),
    Column("time", "time", "Exponent e of the fit latency ∝ {length_name}^e over the cost lengths, on log axes.", group="growth", rank=3),
    Column("space", "mem", "The same fit for the counted peak memory.", group="growth", rank=8),
    Column("work", "FLOPs", "The same fit for the counted FLOPs.", group="growth", rank=9),
    Column(
        "crossover",
        "crossover",
        "Shortest measured {length_name} from which on the candidate is faster than multi_head. “not seen”: at no measured {length_name}.",
        rank=7,
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
    value = float(f"{value:.{digits - 1}e}")
    return f"{value:,.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


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
    smallest, half = 10.0**-decimals, estimate.half_width
    if half == 0:
        return f"{text} ± 0"
    return f"{text} ± " + (f"<{smallest:.{decimals}f}" if half < smallest / 2 else f"{half:.{decimals}f}")


def labels(summary: Summary) -> dict[str, str]:
    """A short name for each candidate, for figures and sentences: no module path, options cut; still different from each other."""
    result: dict[str, str] = {}
    for candidate in summary.candidates:
        parts = candidate.name.split(":")
        if (len(parts) > 1 and "." in parts[0]) or len(parts) > 2:
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
    if not finite(a.half_width) or not finite(b.half_width):
        return True
    return abs(a.mean - b.mean) <= half_width(a) + half_width(b)


def half_width(estimate: Estimate) -> float:
    """Half the interval's width, 0 where there is none."""
    return estimate.half_width if estimate.half_width is not None and math.isfinite(estimate.half_width) else 0.0


def longest_scored(summary: Summary) -> int | None:
    return max((length for length in summary.lengths if ranking(summary, length)), default=None)


def _listed(names: list[str]) -> str:
    shown = [f"`{name}`" for name in names]
    if len(shown) > 4:
        shown = [*shown[:3], f"{len(shown) - 3} others"]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " and " + shown[-1]


def conclusion(summary: Summary, length: int | None = None) -> str:
    """One line: who is best at this length (by default the longest), whether beyond the noise, and at what cost. Names are in backticks."""
    length = longest_scored(summary) if length is None else length
    task, short = summary.task, labels(summary)
    metric = task.metric
    ranked = ranking(summary, length) if length is not None else []
    if length is None or not ranked:
        return f"No candidate finished training on {task.name}: there is nothing to compare."
    (best, score), others = ranked[0], ranked[1:]
    name, place = short[best.name], f"on {task.name} at {task.length_name} {length:,}"
    noise = f"the noise of {len(score.values)} seeds" if score.half_width is not None else "what one seed can show"
    tied = [c for c, estimate in others if overlap(score, estimate)]
    sign = 1 if task.higher_is_better else -1
    if task.chance is not None and all(sign * (estimate.mean - task.chance) <= half_width(estimate) for _, estimate in ranked):
        at_best = f"{metric} {estimate_text(score)} (`{name}`)"
        text = f"No candidate is better than chance ({task.chance:.3g}) {place} beyond {noise}: at best {at_best}."
    elif not others:
        text = f"`{name}` reaches {metric} {estimate_text(score)} {place}{_price(best, [best], length, short)}."
    elif score.half_width is None or all(estimate.half_width is None for _, estimate in others):
        text = f"`{name}` has the best {metric} {place} ({estimate_text(score)}), but one seed cannot tell a difference from noise."
    elif not tied:
        next_best, next_score = others[0]
        text = (
            f"`{name}` is best {place}: {metric} {estimate_text(score)}, beyond the 95 % intervals over {len(score.values)} seeds; next is "
            f"`{short[next_best.name]}` with {estimate_text(next_score)}{_price(best, [c for c, _ in ranked], length, short)}."
        )
    elif len(tied) == len(others):
        price = _price(best, [best, *tied], length, short)
        text = f"No difference in {metric} beyond {noise} {place}: best mean {estimate_text(score)} (`{name}`){price}."
    else:
        text = (
            f"`{name}` has the best {metric} {place} ({estimate_text(score)}), no different beyond {noise} from "
            f"{_listed([short[c.name] for c in tied])}{_price(best, [best, *tied], length, short)}."
        )
    done = [candidate for candidate, _ in ranked]
    unfinished = [short[c.name] for c in summary.candidates if length in summary.lengths and c not in done]
    return text + (f" {_listed(unfinished)} did not finish." if unfinished else "")


def _price(best: CandidateSummary, group: list[CandidateSummary], length: int, short: Mapping[str, str]) -> str:
    """What the best costs, and which of the group is fastest."""
    costs = {c.name: cost.latency_ms for c in group if (cost := cost_at(c, length))}
    if best.name not in costs:
        return ""
    mine, quick = costs[best.name], min(costs, key=lambda name: costs[name])
    if len(costs) == 1:
        return f"; {time_text(mine)} a batch"
    if quick == best.name:
        return f"; `{short[quick]}` is also the fastest of them, {time_text(mine)} a batch"
    ratio = significant(mine / costs[quick], 2)
    return f"; `{short[quick]}` is the fastest of them, {time_text(costs[quick])} a batch against {time_text(mine)} ({ratio}×)"


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
        quartiles = ""
        if finite(cost.latency_q25) and finite(cost.latency_q75):
            (low, unit), (high, high_unit) = time_text(cost.latency_q25).split(" "), time_text(cost.latency_q75).split(" ")
            quartiles = f"{low}–{high} {unit}" if unit == high_unit else f"{low} {unit}–{high} {high_unit}"
        result["latency"] = Cell(time_text(cost.latency_ms), cost.latency_ms, quartiles, f"batch of {cost.batch}")
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
            badges.append((text.replace("_", " "), f"no “{text}”: {CAPABILITIES[text]}"))
        else:
            head = text.split(":")[0].strip()
            badges.append((head if len(head) <= 22 else head[:21] + "…", text))
    return badges


def table(summary: Summary, width: int | None = None) -> Table:
    """The results for a terminal of `width` columns: a block for each length, best first; green: the best and what overlaps with it."""
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    headings, short, task = definitions(summary), labels(summary), summary.task
    lengths = [length for length in summary.lengths if ranking(summary, length)] or list(summary.lengths[-1:])
    blocks = []
    for length in lengths:
        ranked = [candidate for candidate, _ in ranking(summary, length)]
        blocks.append([(c, cells(summary, c, length), c in ranked) for c in ranked + [c for c in summary.candidates if c not in ranked]])
    heads = {column.key: f"{column.heading} ^{task.length_name[:1]}" if column.group else headings[column.key][0] for column in COLUMNS}
    widths = {key: max([cell_len(heads[key]), *(cell_len(row[key].text) for block in blocks for _, row, _ in block)]) for key in heads}
    shown, gap, least = list(COLUMNS), 3, 16
    while len(shown) > 1 and least + sum(widths[column.key] + gap for column in shown) > width:
        shown.remove(max(shown, key=lambda column: column.rank))
    room = max(least, width - sum(widths[column.key] + gap for column in shown))

    seeds = "1 seed" if len(summary.seeds) == 1 else f"{len(summary.seeds)} seeds"
    at = f" at {task.length_name} {lengths[0]:,}" if len(lengths) == 1 else ""
    result = Table(
        title=Text(f"{task.title}{at}: {task.metric}, {'higher' if task.higher_is_better else 'lower'} is better, {seeds}", style="bold"),
        caption=Text(conclusion(summary)),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    result.add_column("candidate", max_width=room, no_wrap=True, overflow="ellipsis")
    for column in shown:
        result.add_column(Text(heads[column.key]), justify="right", no_wrap=True)
    for length, block in zip(lengths, blocks, strict=True):
        if len(lengths) > 1:
            result.add_row(Text(f"{task.length_name} {length:,}", style="dim"))
        first = block[0][0].score.get(length) if block else None
        for candidate, row, scored in block:
            values = [Text(row[column.key].text) for column in shown]
            if first and scored and overlap(first, candidate.score[length]):
                values[0].stylize("bold green" if candidate is block[0][0] else "green")
            result.add_row(Text(short[candidate.name]), *values)
        result.add_section()
    return result
