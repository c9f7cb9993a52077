"""Draws map-attention.svg and writes the table of map-attention.md: every map mechanism as gather, transform, distribute.

python docs/three_moves.py
"""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import regard
from regard.files import write_whole

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "map-attention.md", HERE / "map-attention.svg"
BEGIN, END = "<!-- table: made by docs/three_moves.py -->", "<!-- end of table -->"
SIZE = "4x64x56x56"
WIDE, TALL = 36.0, 0.34  # units across the picture of 12 inches; inches of a row


class Moves(NamedTuple):
    """One mechanism. `kept`: what the gather leaves of the map, a key of KEPT; `sign`: how the result joins the map, a key of SIGNS."""

    id: str
    kept: str
    gather: str
    transform: str
    sign: str
    distribute: str


KEPT = {
    "one": "One vector for the whole map",
    "few": "A few vectors",
    "regions": "One vector for each region",
    "all": "Every position",
    "channels": "A matrix of channels",
}
SIGNS = {"times": "×", "plus": "+", "sum": "Σ", "out": "→"}
FAMILY = (
    Moves("se", "one", "mean", "MLP", "times", "gate for each channel"),
    Moves("eca", "one", "mean", "1-D convolution along the channels", "times", "gate for each channel"),
    Moves("gc", "one", "softmax-weighted mean", "MLP with LayerNorm", "plus", "one term for all positions (or a gate)"),
    Moves("cbam", "one", "mean, max; then both over channels", "MLP; then 7 x 7 convolution", "times", "gate for each channel, then position"),
    Moves("bam", "one", "mean, beside a narrow map", "MLP, beside dilated convolutions", "times", "1 + gate for each entry"),
    Moves("sk", "one", "mean of the sum of all kernels' maps", "MLP", "sum", "softmax over the kernels"),
    Moves("split", "one", "mean of the sum of all branches", "MLP in groups", "sum", "softmax over the branches"),
    Moves("cgnl", "one", "inner products, a few per group", "none", "plus", "times a projection of each position"),
    Moves("double", "few", "n softmax-weighted sums", "none", "plus", "each position's softmax over the n"),
    Moves("glore", "few", "n projected sums", "graph convolution over the n", "plus", "the same projection, transposed"),
    Moves("spygr", "few", "n projected sums, at several scales", "1 x 1 convolution", "out", "the map minus the same, projected back"),
    Moves("sc_conv", "regions", "means of r x r windows", "3 x 3 convolution", "times", "gate from this, upsampled, and x"),
    Moves("spp", "regions", "maxima of 1, 4, 9, 36 regions", "none", "out", "concatenated: a vector, no map"),
    Moves("ppm", "regions", "means of 1, 4, 9, 36 regions", "1 x 1 convolution for each size", "out", "upsampled, concatenated with x"),
    Moves("adaptive_context", "regions", "means of s x s regions", "1 x 1 convolution", "sum", "affinities predicted from the pixel"),
    Moves("asymmetric_non_local", "regions", "means of 110 regions: keys, values", "none", "sum", "each position's softmax over the regions"),
    Moves("sagan", "all", "maxima of 2 x 2 windows: N / 4 keys", "none", "plus", "each position's softmax over the keys"),
    Moves("non_local", "all", "nothing is reduced", "none", "plus", "each position's kernel over all positions"),
    Moves("position", "all", "nothing is reduced", "none", "plus", "each position's softmax over all positions"),
    Moves("generalized", "all", "one pixel in 2 x 2: N / 4 keys", "none", "plus", "each position's softmax by content and distance"),
    Moves("criss_cross", "all", "nothing is reduced", "none", "plus", "each position's softmax over its row and column"),
    Moves("channel_affinity", "channels", "C x C Gram matrix of the channels", "softmax of its negative", "plus", "mixes each position's channels"),
    Moves("dual", "channels", "as position, and as channel_affinity", "as both", "out", "the sum of both, in a narrower map"),
)


def built() -> list[Moves]:
    return [moves for moves in FAMILY if moves.id in regard.ids()]


def table() -> str:
    """One row for each mechanism of the library; the milliseconds are those of docs/measured."""
    with (HERE / "measured" / "floors.csv").open() as file:
        steps = {row["id"]: float(row["ours_ms"]) for row in csv.DictReader(file) if row["run"] == "forward+backward" and row["size"] == SIZE}
    rows = ["| id | left of the map | gather | transform | distribute | grows | place | ms |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for moves in built():
        card = regard.card(moves.id)
        exponent = card.grows["N"]
        growth = "1" if exponent == 0 else "N" if exponent == 1 else f"N^{exponent:g}"
        milliseconds = f"{steps[moves.id]:.3g}" if moves.id in steps else ""
        cells = (f"`{moves.id}`", KEPT[moves.kept].lower(), moves.gather, moves.transform, f"{SIGNS[moves.sign]} {moves.distribute}")
        rows.append(f"| {' | '.join(cells)} | {growth} | {card.place or ''} | {milliseconds} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def picture(form: str = "svg") -> bytes:
    """A row for each mechanism, a column for each move; the same bytes for the same data."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Rectangle

    ink, faint, accent, box = "#1f2328", "#6e7781", "#0a5fb4", "#e7eef7"
    rows = built()
    kinds = list(dict.fromkeys(moves.kept for moves in rows))
    height = len(rows) + 1.2 * len(kinds) + 1.8
    figure = Figure(figsize=(12, TALL * height), facecolor="white")  # opaque: legible on a dark page too
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDE)
    axes.set_ylim(height, 0)
    axes.axis("off")
    for x, title in ((6.2, "gather"), (15.8, "transform"), (25.0, "distribute")):
        axes.text(x, 0.6, title, color=ink, fontsize=13, fontweight="bold", va="center")
    y = 0.7
    for kind in kinds:
        y += 1.2
        axes.text(0.4, y, KEPT[kind], color=accent, fontsize=10.5, fontweight="bold", va="center")
        axes.plot((0.4, WIDE - 0.4), (y - 0.6, y - 0.6), color="#d0d7de", linewidth=0.8)
        for moves in (moves for moves in rows if moves.kept == kind):
            y += 1
            _glyph(axes, Rectangle, kind, 6.2, y - 0.28, accent)
            label = axes.text(0.7, y, moves.id, color=ink, fontsize=10, family="monospace", va="center")
            label.set_gid(moves.id)
            axes.text(7.4, y, moves.gather, color=ink, fontsize=9.5, va="center")
            through = moves.transform != "none"
            if through:
                axes.add_patch(FancyBboxPatch((15.8, y - 0.34), 8.0, 0.68, boxstyle="round,pad=0,rounding_size=0.2", facecolor=box, edgecolor="none"))
                axes.text(16.1, y, moves.transform, color=ink, fontsize=9.5, va="center")
            else:
                axes.plot((15.8, 23.8), (y, y), color=faint, linewidth=1)
            axes.text(25.4, y, SIGNS[moves.sign], color=accent, fontsize=13, fontweight="bold", va="center", ha="center")
            axes.text(26.1, y, moves.distribute, color=ink, fontsize=9.5, va="center")
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "regard", "svg.fonttype": "none"}):
        figure.savefig(file, format=form, dpi=110, metadata={"Date": None} if form == "svg" else None)
    return file.getvalue()


def _glyph(axes, rectangle, kind: str, x: float, y: float, color: str) -> None:
    """A 4 x 4 map: what is left of it, filled. Widths and heights differ since the axes do."""
    side, wide = 0.56, 0.56 * TALL * WIDE / 12
    whole = [(i / 4, j / 4, 1 / 4) for i in range(4) for j in range(4)]
    filled = {
        "one": [(0.3, 0.3, 0.4)],
        "few": [(0.03 + 0.32 * i, 0.35, 0.3) for i in range(3)],
        "regions": [(i / 2, j / 2, 1 / 2) for i in range(2) for j in range(2)],
        "all": whole,
        "channels": [(i / 4, i / 4, 1 / 4) for i in range(4)],
    }[kind]
    axes.add_patch(rectangle((x, y), wide, side, facecolor="none", edgecolor=color, linewidth=0.8))
    for left, top, size in filled:
        corner = (x + (left + 0.03) * wide, y + (top + 0.03) * side)
        axes.add_patch(rectangle(corner, (size - 0.06) * wide, (size - 0.06) * side, facecolor=color, edgecolor="none"))


if __name__ == "__main__":
    write_whole(PAGE, updated(PAGE.read_text()))
    write_whole(PICTURE, picture())
