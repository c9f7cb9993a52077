"""How time, memory and counted work grow with length, for every mechanism of sequences and sets.

    python benchmarks/growth.py                 # some minutes on two quiet cores; writes docs/measured/growth.{csv,md,svg}
    python benchmarks/growth.py luna gau        # these anew, the others as they stand in growth.csv; with --dry printed alone

One sample of width 256 with 8 heads; each point is the median of several forward + backward passes, the peak of the allocator's events in one of
them, and the FLOPs counted without data. The exponents are the powers of the length between the two longest ones measured. A mechanism stops at
the length where one pass takes longer than `--limit` seconds, and is timed there once.
"""

import argparse
import csv
import io
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is loaded

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.files import write_whole
from regard.workbench.measure import cpu_name, peak_bytes

MEASURED = Path(__file__).parents[1] / "docs" / "measured"
LENGTHS = (1024, 4096, 16384)
TOKENS = {"dim": 256, "num_heads": 8}


@dataclass(frozen=True)
class Point:
    """One mechanism at one length, forward and backward."""

    id: str
    options: str
    length: int
    ms: float
    mb: float
    gflops: float


def grid(n: int) -> tuple[int, int]:
    """The most square grid of n = 2^k cells."""
    rows = 2 ** (int(math.log2(n)) // 2)
    return rows, n // rows


def options_of(id: str, n: int) -> list[dict[str, Any]]:
    """What to make for sequences of n: the forms worth telling apart."""
    own: dict[str, list[dict[str, Any]]] = {
        "multi_head": [{}, {"causal": True}],
        "luna": [{"memory_len": 128}, {"memory_len": 16, "causal": True}],
        "performer": [{}, {"causal": True}],
        "efficient": [{}, {"causal": True}],
        "sparse": [{}, {"pattern": "local", "stride": 128}],
        "lara": [{"proposal": "adaptive-1d", "num_landmarks": 64}],
        "gau": [{"num_heads": None}],
        "mixed_chunk": [{"num_heads": None}, {"num_heads": None, "causal": True}],
        "synthesizer": [{"max_len": n}, {"max_len": n, "mode": "factorized_random"}],
        "ripple": [{"grid_size": grid(n)}],
        "masked_linear": [{"max_len": n}, {"mask": "none", "causal": True}],
        "context_pool": [{"num_heads": None}, {"num_heads": None, "window": 64}],
        "vars": [{"variant": "d"}],
        "luong_global": [{"num_heads": None}],
        "luong_local": [{"num_heads": None}],
        "isab": [{"num_inducing": 32}],
    }
    return own.get(id, [{}])


def build(id: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return regard.create(id, **{key: value for key, value in {**TOKENS, **options}.items() if value is not None})


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])


def passes(module: nn.Module, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    first(module(x)).sum().backward()
    module.zero_grad()


def measure(ids: list[str], lengths: tuple[int, ...], limit: float) -> Iterator[Point]:
    for id in ids:
        for number in range(len(options_of(id, lengths[0]))):
            for n in lengths:
                options = options_of(id, n)[number]
                module, x = build(id, options).train(), torch.randn(1, n, TOKENS["dim"])
                if n == lengths[0]:
                    passes(module, x)  # what torch sets up once is no cost of the mechanism
                times, start = [], time.perf_counter()
                passes(module, x)
                warm = time.perf_counter() - start
                while warm <= limit and len(times) < (3 if warm > 0.3 else 7):
                    begin = time.perf_counter()
                    passes(module, x)
                    times.append(time.perf_counter() - begin)
                peak = peak_bytes(lambda module=module, x=x: passes(module, x), x.device) / 1e6
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    build(id, options).to("meta")(torch.empty_like(x, device="meta"))
                said = {key: "N" if value == n else value for key, value in options.items() if value is not None and key != "grid_size"}
                shown = ", ".join(f"{key}={value}" for key, value in said.items())
                yield Point(id, shown, n, 1e3 * (statistics.median(times) if times else warm), peak, counter.get_total_flops() / 1e9)
                if warm > limit:
                    break


def stored() -> list[Point]:
    """What growth.csv holds."""
    path = MEASURED / "growth.csv"
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    return [Point(r["id"], r["options"], int(r["length"]), float(r["ms"]), float(r["mb"]), float(r["gflops"])) for r in rows]


def exponents(points: list[Point]) -> dict[str, float]:
    """The powers of the length between the last two points."""
    a, b = points[-2:]
    steps = math.log2(b.length / a.length)
    return {name: math.log2(getattr(b, name) / getattr(a, name)) / steps for name in ("ms", "mb", "gflops") if getattr(a, name) > 0}


def write(points: list[Point], about: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(Point)])
    writer.writerows([f"{v:.4g}" if isinstance(v, float) else v for v in asdict(point).values()] for point in points)
    write_whole(MEASURED / "growth.csv", text.getvalue())
    lines = ["| id | options | declared | counted | timed | memory | ms at 1024 | at 4096 | at 16384 | MB at 4096 |", "| --- " * 10 + "|"]
    for key in dict.fromkeys((p.id, p.options) for p in points):
        own = [p for p in points if (p.id, p.options) == key]
        at = {p.length: p for p in own}
        grown = exponents(own) if len(own) > 1 else {}
        measured = [f"{grown[name]:.2f}" if name in grown else "" for name in ("gflops", "ms", "mb")]
        cells = [f"`{key[0]}`", key[1], f"{regard.card(key[0]).grows['N']:g}", *measured]
        cells += [f"{at[n].ms:.3g}" if n in at else "" for n in (1024, 4096, 16384)] + [f"{at[4096].mb:.3g}" if 4096 in at else ""]
        lines.append("| " + " | ".join(cells) + " |")
    head = "# Growth with length\n\n" + " ".join((__doc__ or "").split("\n\n")[2].split())
    write_whole(MEASURED / "growth.md", f"{head}\n\n{about}\n\n![time against length](growth.svg)\n\n" + "\n".join(lines) + "\n")
    picture(points, MEASURED / "growth.svg")


def picture(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 6), layout="constrained")
    keys = list(dict.fromkeys((p.id, p.options) for p in points))
    styles = [(color, line) for line in ("-", "--", ":") for color in plt.get_cmap("tab10").colors]
    for (id, options), (color, line) in zip(keys, styles * 2, strict=False):
        own = [p for p in points if (p.id, p.options) == (id, options)]
        for axes, name in zip(panels, ("ms", "mb"), strict=True):
            axes.plot([p.length for p in own], [getattr(p, name) for p in own], line, color=color, linewidth=1.2, label=f"{id} {options}".strip())
    for axes, title in zip(panels, ("forward + backward, ms", "peak memory, MB"), strict=True):
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", xlabel="length", title=title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_whole(path, buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ids", nargs="*", help="ids to measure; all sequence and set mechanisms if none")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--limit", type=float, default=6.0, help="seconds of one pass after which no longer length is tried")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    skipped = ("set_transformer", "head_gate")  # a whole model, and a gate on heads
    ids = options.ids or [id for layout in ("sequence", "set") for id in regard.ids(layout=layout) if id not in skipped]
    day = time.strftime("%Y-%m-%d", time.gmtime())
    about = f"`python benchmarks/growth.py` on {cpu_name()}, {options.threads} threads, torch {torch.__version__}, {day}."
    points: list[Point] = []
    for point in measure(ids, tuple(int(n) for n in options.lengths.split(",")), options.limit):
        points.append(point)
        print(f"{point.id:14} {point.options:34} {point.length:6} {point.ms:10.2f} ms {point.mb:9.1f} MB {point.gflops:9.2f} GFLOP", flush=True)
    if not options.dry:
        kept = [point for point in stored() if options.ids and point.id not in ids]
        write(sorted(points + kept, key=lambda point: point.id), about)


if __name__ == "__main__":
    main()
