"""The report's figures as PNG files, for a paper or a slide; needs matplotlib."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RegardError
from ..files import write_whole
from .summary import Summary, TrialResult
from .table import bytes_text, cost_at, count_text, finite, labels, longest_scored, time_text

COLOURS = ("#0f4c9e", "#a8340f", "#0ea76a", "#5f1d52", "#b58515", "#6a7b95")
MARKERS = ("o", "s", "^", "D", "v", "P")


def write_plots(summary: Summary, out: Path) -> list[Path]:
    """Write accuracy_latency.png, growth.png and curves.png into the folder `out`; the first and the last at the longest trained length."""
    paths = []
    for name, draw, size in (
        ("accuracy_latency", _accuracy, (8.0, 5.0)),
        ("growth", _growth, (13.0, 4.5)),
        ("curves", _curves, (11.0, 4.5)),
    ):
        figure = _figure(size)
        draw(figure, summary)
        handles, names = _legend(summary)
        if handles:
            figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
        write_whole(out / f"{name}.png", buffer.getvalue())
        paths.append(out / f"{name}.png")
    return paths


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RegardError("the PNG figures need matplotlib, which is not installed: pip install 'regard[bench]'") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _style(index: int) -> dict[str, Any]:
    """The same colour and shape as in the report; hollow and dashed from the seventh candidate on."""
    colour, hollow = COLOURS[index % 6], index // 6 % 2
    return {
        "color": colour,
        "marker": MARKERS[index % 6],
        "markerfacecolor": "white" if hollow else colour,
        "linestyle": "--" if hollow else "-",
        "markersize": 6,
    }


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: no mathematics, and no leading underscore, which hides a legend entry."""
    return (" " if text.startswith("_") else "") + text.replace("\\", "/").replace("$", r"\$")


def _legend(summary: Summary) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    short = labels(summary)
    return [Line2D([], [], **_style(i)) for i in range(len(summary.candidates))], [_plain(short[c.name]) for c in summary.candidates]


def _axes(axes: Any, xlabel: str, title: str) -> None:
    axes.set_xlabel(_plain(xlabel))
    axes.set_title(_plain(title), loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#eceff2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _log(axis: Any, text: Callable[[float], str], base: float = 10) -> None:
    """A logarithmic axis whose ticks carry units."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=base)
    axis.set_major_locator(LogLocator(base=base, subs=(1.0,) if base == 2 else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0+(?= )", "", text(value))))
    axis.set_minor_formatter(NullFormatter())


def _accuracy(figure: Any, summary: Summary) -> None:
    axes, length, task = figure.subplots(), longest_scored(summary), summary.task
    for i, candidate in enumerate(summary.candidates):
        score, cost = candidate.score.get(length or 0), cost_at(candidate, length or 0)
        if score is None or cost is None or not finite(score.mean):
            continue
        x = [[max(cost.latency_ms - cost.latency_q25, 0)], [max(cost.latency_q75 - cost.latency_ms, 0)]]
        axes.errorbar([cost.latency_ms], [score.mean], yerr=score.half_width, xerr=x, capsize=3, elinewidth=1.2, **_style(i))
    _log(axes.xaxis, time_text)
    at = f" at {task.length_name} {length:,}" if length else ""
    _axes(axes, "latency of one forward pass", f"{task.metric}{at} ({'higher' if task.higher_is_better else 'lower'} is better)")


def _growth(figure: Any, summary: Summary) -> None:
    parts = (("latency_ms", "latency", time_text, 10), ("peak_bytes", "peak memory", bytes_text, 2), ("flops", "FLOPs", count_text, 10))
    for axes, (key, title, text, base) in zip(figure.subplots(1, 3), parts, strict=True):
        for i, candidate in enumerate(summary.candidates):
            points = [
                (c.length, getattr(c, key)) for c in candidate.costs if finite(c.latency_ms) and finite(getattr(c, key)) and getattr(c, key) > 0
            ]
            axes.plot(*zip(*sorted(points), strict=True), **_style(i)) if points else None
        _log(axes.xaxis, lambda value: f"{value:,.0f}", base=2)
        _log(axes.yaxis, text, base)
        _axes(axes, summary.task.length_name, title)


def _curves(figure: Any, summary: Summary) -> None:
    length = longest_scored(summary)
    for axes, key in zip(figure.subplots(1, 2), ("metric", "loss"), strict=True):
        for i, candidate in enumerate(summary.candidates):
            points = _spread([t for t in summary.trials if t.candidate == candidate.name and t.length == length], key)
            if points:
                steps, mean, low, high = zip(*points, strict=True)
                axes.plot(steps, mean, **_style(i) | {"markevery": [len(steps) - 1]})
                axes.fill_between(steps, low, high, color=COLOURS[i % 6], alpha=0.13, linewidth=0)
        _axes(axes, "training step", summary.task.metric if key == "metric" else "training loss")


def _spread(trials: list[TrialResult], key: str) -> list[tuple[int, float, float, float]]:
    """Step, mean, lowest and highest over the seeds at each evaluation."""
    by_step: dict[int, list[float]] = {}
    for trial in trials:
        for point in trial.curve:
            if finite(getattr(point, key)):
                by_step.setdefault(point.step, []).append(getattr(point, key))
    return [(step, sum(values) / len(values), min(values), max(values)) for step, values in sorted(by_step.items())]
