"""How close the approximations of softmax come to it on the attention of a trained text encoder, untrained themselves.

    regard data get minilm && pip install tokenizers     # once
    python benchmarks/approximation.py                    # about a minute; writes docs/measured/approximation.{csv,svg,md}
    python benchmarks/approximation.py --heads tests/data/real_heads.safetensors --dry      # six heads of 128 tokens, without a download

Queries, keys and values are those of all-MiniLM-L6-v2 reading this project's LICENSE, 512 tokens at a time: 6 layers, 12 heads of width 32. The
error of a head is |out - softmax out| / |softmax out|, the mean over heads and layers is given, and for random methods over draws. FLOPs are
counted (matrix products of the core, relative to the 4 N^2 d of softmax attention). The text encoder was trained with softmax: what a method
reaches when it is trained itself is another question.
"""

import argparse
import csv
import io
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard.data.minilm import attention_inputs, tokens_of
from regard.files import write_whole

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "docs" / "measured"
Layers = list[tuple[Tensor, Tensor, Tensor]]
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One method at one size."""

    id: str
    what: str
    size: int
    error: float
    lowest_layer: float
    highest_layer: float
    flops_of_softmax: float


def real_heads(file: Path | None) -> Layers:
    if file is None:
        return attention_inputs(tokens_of((ROOT / "LICENSE").read_text(), 512))
    t = load_file(file)
    return [tuple(t[f"{layer}.{name}"].float()[None] for name in "qkv") for layer in sorted({key.split(".")[0] for key in t})]  # type: ignore[misc]


def methods(heads: int, width: int, n: int) -> Iterator[tuple[str, str, int, int, Callable[[], Core]]]:
    """(id, what is counted, how many, draws to average the error over, a maker of the core, which draws anew)."""
    base = {"dim": heads * width, "num_heads": heads}

    def performer(m: int, **options: object) -> Core:
        return regard.create("performer", **base, num_features=m, per_head_features=True, **options).attend

    def mean_of_draws(count: int) -> Core:
        module = regard.create("randomized", **base, noise_std="unbiased").train()
        return lambda q, k, v: torch.stack([module.attend(q, k, v) for _ in range(count)]).mean(0)

    def lara(landmarks: int) -> Core:
        rows = 2 ** ((n.bit_length() - 1) // 2)
        module = regard.create("lara", **base, num_landmarks=landmarks, proposal="no-param-pool", noise_std="unbiased", mis_type="mis-bh").train()
        return lambda q, k, v: module.attend(q, k, v, grid_size=(rows, n // rows))

    def mra(blocks: int, mode: str) -> Core:
        return regard.create("mra", **base, block_size=16, num_blocks=n // 16 * blocks, mode=mode, out_proj=False).eval().attend

    for m in (16, 64, 256, 1024):
        yield "performer", "positive random features", m, 5, lambda m=m: performer(m, eps=0.0)
    for m in (64, 1024):
        yield "performer", "the same with the published eps of 1e-4", m, 5, lambda m=m: performer(m)
    for m in (16, 64, 256):
        yield "performer", "trigonometric random features", m, 5, lambda m=m: performer(m, feature_map="trig")
    for draws in (1, 4, 16, 64):
        yield "randomized", "draws", draws, 1, lambda draws=draws: mean_of_draws(draws)
    for landmarks in (16, 64, 256):
        yield "lara", "landmarks", landmarks, 5, lambda landmarks=landmarks: lara(landmarks)
    for blocks in (1, 2, 4, 8):
        yield "mra", "exact blocks of 16 a row, the rest coarse", blocks, 1, lambda blocks=blocks: mra(blocks, "full")
        yield "mra", "exact blocks of 16 a row alone", blocks, 1, lambda blocks=blocks: mra(blocks, "sparse")
    for block in (8, 16, 32):
        yield "hypercube", "tokens a block", block, 1, lambda block=block: regard.create("hypercube", **base, block_size=block).eval().attend
    for stride in (16, 32, 64):
        options = {"pattern": "strided", "stride": stride, "causal": False}
        yield "sparse", "stride", stride, 1, lambda options=options: regard.create("sparse", **base, **options).eval().attend


@torch.no_grad()
def measure(layers: Layers, skip: tuple[str, ...] = ()) -> Iterator[Row]:
    _, heads, n, width = layers[0][0].shape
    exact = [F.scaled_dot_product_attention(*layer) for layer in layers]
    for id, what, size, draws, make in methods(heads, width, n):
        if id in skip:
            continue
        torch.manual_seed(0)
        errors = []
        for layer, expected in zip(layers, exact, strict=True):
            found = []
            for _ in range(draws):
                out = make()(*layer)
                off = (out - expected).norm(dim=(2, 3)) / expected.norm(dim=(2, 3))
                found.append(off.mean().item())
            errors.append(statistics.mean(found))
        with FlopCounterMode(display=False) as counter:
            make()(*layers[0])
        share = counter.get_total_flops() / (4 * layers[0][0].shape[0] * heads * n * n * width)
        yield Row(id, what, size, statistics.mean(errors), min(errors), max(errors), share)


def picture(rows: list[Row], path: Path) -> None:
    """Error against counted work, a line for each method."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for key in dict.fromkeys((row.id, row.what) for row in rows):
        own = [row for row in rows if (row.id, row.what) == key]
        axes.plot([row.flops_of_softmax for row in own], [row.error for row in own], marker="o", label=f"{key[0]}: {key[1]}")
        for row in own:
            axes.annotate(str(row.size), (row.flops_of_softmax, row.error), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="matrix products relative to softmax attention", ylabel="relative error of the output")
    axes.axvline(1.0, color="0.6", linewidth=0.8)
    axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    write_whole(path, buffer.getvalue())


def write(rows: list[Row], about: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(Row)])
    for row in rows:
        writer.writerow([f"{value:.4g}" if isinstance(value, float) else value for value in asdict(row).values()])
    write_whole(MEASURED / "approximation.csv", text.getvalue())
    lines = ["| id | what is varied | | error | by layer | FLOPs of softmax |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{r.id}` | {r.what} | {r.size} | {r.error:.2f} | {r.lowest_layer:.2f} to {r.highest_layer:.2f} | {r.flops_of_softmax:.2f} |" for r in rows
    ]
    head = "# Approximations of softmax on real attention\n\n" + " ".join((__doc__ or "").split("\n\n")[2].split())
    write_whole(MEASURED / "approximation.md", f"{head}\n\n{about}\n\n![error against work](approximation.svg)\n\n" + "\n".join(lines) + "\n")
    picture(rows, MEASURED / "approximation.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", type=Path, help="queries, keys and values from this file in place of the encoder")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    layers = real_heads(options.heads)
    rows = []
    for row in measure(layers):
        rows.append(row)
        print(f"{row.id:12} {row.what:42} {row.size:5} error {row.error:7.3f}  FLOPs {row.flops_of_softmax:6.3f}", flush=True)
    if not options.dry:
        write(rows, f"`python benchmarks/approximation.py`, torch {torch.__version__}, float32, fixed seeds.")


if __name__ == "__main__":
    main()
