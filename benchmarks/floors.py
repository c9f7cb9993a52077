"""Our modules beside public forms of the same mechanism, in one run: same weights, outputs found equal first, then time and peak memory.

    python benchmarks/floors.py                     # all cases, some minutes on two quiet cores; writes docs/measured/floors.csv and its README
    python benchmarks/floors.py se halo             # these ids again, their rows replaced
    python benchmarks/floors.py se halo --dry       # printed alone

Times are medians of interleaved rounds (ours, peer, ours, peer, ...) of wall milliseconds. Memory is the peak of the allocator's events during
one pass beyond what was there before, scratch space inside operators included. `floor` is the factor this project holds itself to, held from 95 %
of it on (the noise of a quiet run); `target` is one that nobody has reached yet.
"""

import argparse
import copy
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is loaded; else the memory counter reports every start and stop

import torch
from torch import Tensor, nn

import regard
from regard.parts.linear import Linear
from regard.workbench.measure import allocations, calibrate, cpu_name, peak_bytes

sys.path.insert(0, str(Path(__file__).parent))
from peers import PEERS

MEASURED = Path(__file__).parents[1] / "docs" / "measured"
EQUAL = 0.95
MAPS = ((4, 64, 56, 56), (4, 256, 28, 28))


@dataclass(frozen=True)
class Case:
    """One comparison: what to build, on what, and the factors to reach (time and peak memory, forward and forward + backward)."""

    id: str
    options: dict[str, object]
    shape: tuple[int, ...]
    floor_forward: float | None = None
    floor_both: float | None = None
    floor_memory: float | None = None
    floor_memory_forward: float | None = None
    target_both: float | None = None
    training: bool = True
    others: tuple[tuple[int, ...], ...] = ()  # the shapes of further inputs


def cases() -> list[Case]:
    halo = {"num_heads": 8, "block_size": 7, "halo_size": 3}
    tokens = {"dim": 256, "num_heads": 8}
    equal = {"floor_both": 1.0, "floor_memory": 1.0}
    out = [Case("se", {}, s, floor_both=1.8) for s in MAPS]
    out += [Case("eca", {}, s, target_both=1.5) for s in MAPS]
    out += [Case("cbam", {}, s, target_both=1.5) for s in MAPS]
    out += [Case("gc", {"zero_init": False}, s, floor_forward=1.6) for s in MAPS]
    out += [Case("non_local", {"zero_init": False}, MAPS[0], floor_both=2.0, floor_memory=15.0), Case("non_local", {"zero_init": False}, MAPS[1])]
    out += [Case("criss_cross", {"recurrence": 1}, s, target_both=1.3) for s in MAPS]
    out += [Case("halo", halo, s, floor_forward=1.7, floor_both=1.0, target_both=2.0) for s in MAPS]
    out += [Case("carafe", {}, s, floor_both=5.0, floor_memory=3.0) for s in MAPS]
    out += [Case("sasa", {}, s, floor_forward=9.0, floor_both=2.8, floor_memory=5.0) for s in MAPS]
    out += [Case("local_relation", {}, s, floor_forward=1.0, **equal) for s in MAPS]
    out += [Case("san_pairwise", {}, s, floor_forward=f, **equal, target_both=3.0) for s, f in zip(MAPS, (4.0, 1.7), strict=True)]
    out += [Case("san_patchwise", {}, s, **equal, target_both=3.0) for s in MAPS]
    out += [Case("dgmn", {"groups": g}, s, **equal) for g in (1, 4) for s in MAPS]
    out += [Case(id, {}, s, **equal) for id in ("sk", "split", "sc_conv", "spp", "ppm", "adaptive_context") for s in MAPS]
    out += [Case("bam", {}, s, **equal, target_both=2.0) for s in MAPS]
    out += [Case("position", {}, MAPS[0], floor_both=1.8, floor_memory=10.0), Case("position", {}, MAPS[1], **equal)]
    heads = {"out_channels": 19, "dropout": 0.0}
    out += [Case("dual", {**heads, "hidden_channels": 64}, MAPS[0], floor_both=1.8, floor_memory=10.0)]
    out += [Case("dual", {**heads, "hidden_channels": 256}, MAPS[1], **equal)]
    out += [Case("sagan", {}, s, **equal, target_both=1.5) for s in MAPS]
    out += [Case("double", {}, s, **equal, target_both=2.0) for s in MAPS]
    out += [Case("cgnl", {"zero_init": False}, s, **equal, target_both=2.0) for s in MAPS]
    out += [Case("cgnl", {"zero_init": False, "kernel": "rbf"}, s, **equal) for s in MAPS]
    out += [Case("glore", {"zero_init": False, "normalize": True}, s, **equal) for s in MAPS]
    out += [Case("spygr", {"hidden_channels": 16}, s, **equal) for s in MAPS]
    out += [Case("asymmetric_non_local", {"zero_init": False, "dropout": 0.0}, s, **equal) for s in MAPS]
    out += [Case("generalized", {}, s, **equal) for s in MAPS]
    out += [Case("channel_affinity", {}, s, **equal) for s in MAPS]
    out += [Case("sparse", {**tokens, "stride": 64}, (2, 4096, 256), floor_both=4.0), Case("sparse", {**tokens, "stride": 64}, (2, 1024, 256))]
    local = {**tokens, "pattern": "local", "stride": 128}
    out += [Case("sparse", local, (2, n, 256), target_both=2.0) for n in (1024, 4096, 8192)]
    out += [Case("multi_head", tokens, (2, 1024, 256), training=False)]
    out += [Case("multi_head", tokens, (2, 4096, 256), floor_forward=2.0, floor_memory_forward=20.0, training=False)]
    lara = {"num_landmarks": 64, "proposal": "adaptive-1d", "noise_std": 0.0}  # without noise outputs can be compared in training
    linear = (("luna", {"memory_len": 128}), ("performer", {"eps": 1e-4}), ("lara", lara), ("mra", {"block_size": 32}))
    for id, extra in linear:
        out += [Case(id, {**tokens, **extra}, (2, 1024, 256), **equal)]
        out += [Case(id, {**tokens, **extra}, (2, n, 256), **equal, target_both=2.0) for n in (4096, 8192)]
    out += [Case("efficient", tokens, (2, n, 256), **equal) for n in (1024, 4096, 8192)]
    out += [Case("gau", {"dim": 256, "rel_pos": "t5"}, (2, 1024, 256), floor_both=1.0, target_both=1.6)]
    out += [Case("gau", {"dim": 256, "rel_pos": "t5"}, (2, 4096, 256), floor_forward=2.5, floor_memory_forward=8.0, floor_both=1.0)]
    out += [Case("mixed_chunk", {"dim": 256}, (2, n, 256), **equal) for n in (1024, 4096, 8192)]
    out += [Case("hypercube", tokens, (2, n, 256), **equal) for n in (1024, 4096)]
    out += [Case("randomized", {**tokens, "num_samples": -1, "noise_std": 0.0}, (2, n, 256), **equal) for n in (1024, 2048)]
    out += [Case("probabilistic", tokens, (2, 1024, 256), **equal)]
    adapted = {"magnitude_priors": False, "alpha": 0.2, "key_adaptation_iters": 2, "key_prior_precision": 1.0}
    out += [Case("probabilistic", {**tokens, **adapted}, (2, 1024, 256), **equal)]
    out += [Case("coda", tokens, (2, n, 256), **equal) for n in (512, 1024)]
    out += [Case("synthesizer", {**tokens, "max_len": 1024, "mode": m}, (2, 1024, 256), **equal) for m in ("dense", "random", "factorized_random")]
    for n, grid in ((1024, (32, 32)), (4096, (64, 64))):
        out += [Case("masked_linear", {**tokens, "max_len": n}, (1, n, 256), **equal)]
        out += [Case("ripple", {**tokens, "grid_size": grid}, (1, n, 256), **equal)]
        out += [Case("vars", {**tokens, "variant": "d"}, (2, n, 256), **equal)]
        out += [Case("context_pool", {"dim": 256}, (1, n, 256), **equal)]
    causal = (("luna", {"memory_len": 16, "causal": True}), ("performer", {"causal": True}))
    out += [Case(id, {**tokens, **extra}, (2, n, 256), **equal) for id, extra in causal for n in (1024, 4096)]
    out += [Case(id, {"dim": 256}, (2, 1024, 256), **equal) for id in ("luong_global", "luong_local")]
    out += [Case("luong_global", {"dim": 256, "score": "concat"}, (2, 256, 256), **equal)]
    out += [Case("ban", {"v_dim": 2048, "q_dim": 512, "glimpses": 4, "dropout": (0.0, 0.0)}, (8, 36, 2048), **equal, others=((8, 14, 512),))]
    out += [Case("cross_attention_few_shot", {}, (2, 5, 512, 6, 6), **equal, others=((2, 15, 512, 6, 6),))]
    out += [Case("feature_bank", {"dim": 2048, "dropout": 0.0}, (8, 4, 2048), floor_forward=1.0, **equal, others=((8, 300, 2048),))]
    out += [Case("context_transformer", {"dim": 60, "num_novel": 20}, (1, 11620, 60), floor_forward=1.0, **equal, others=((1, 1500, 60),))]
    caption = {"context_dim": 512, "query_dim": 512}
    for id, extra in (("soft_attention", {"activation": "relu", "gate": "vector"}), ("soft_attention", {}), ("hard_attention", {})):
        out += [Case(id, {**caption, **extra}, (8, 20, 512), **equal, training=id == "soft_attention", others=((8, 196, 512),))]
    cell = {"input_size": 256, "hidden_size": 256}
    out += [Case("rnn_cell", {**cell, "nonlinearity": a}, (8, 256, 256), floor_forward=1.0, **equal) for a in ("tanh", "relu")]
    out += [Case(id, cell, (8, 256, 256), floor_forward=1.0, **equal) for id in ("gru_cell", "lstm_cell")]
    edges, msa = (1, 128, 128, 128), (1, 64, 128, 256)
    triangle = {"floor_forward": 1.2, "floor_memory_forward": 2.0, **equal}
    out += [Case("evoformer", {"part": "triangle_attention", "mode": m}, edges, **triangle) for m in ("starting", "ending")]
    out += [Case("evoformer", {"part": p}, edges, **equal) for p in ("triangle_multiplication", "pair_transition")]
    out += [Case("evoformer", {"part": p}, msa, **equal) for p in ("msa_column", "outer_product_mean", "msa_transition")]
    out += [Case("evoformer", {"part": "msa_row"}, msa, **equal, others=(edges,))]
    return out


@dataclass(frozen=True)
class Row:
    """What one comparison of one pass gave."""

    id: str
    options: str
    peer: str
    size: str
    run: str
    ours_ms: float
    peer_ms: float
    faster: float
    ours_mb: float
    peer_mb: float
    leaner: float
    largest_mb: float  # the largest single buffer of ours
    floor: str
    held: str
    machine: str
    day: str
    gflops: float  # matrix products of the run
    load: float  # of the machine before the case


def first(result: object) -> Tensor:
    return result if isinstance(result, Tensor) else first(result[0])  # type: ignore[index]


def measure(case: Case, seconds: float, machine: str, gflops: float) -> Iterator[Row]:
    torch.manual_seed(0)
    maps, load, day = regard.card(case.id).layout == "map", os.getloadavg()[0], time.strftime("%Y-%m-%d", time.gmtime())
    ours = regard.create(case.id, **({"channels": case.shape[1]} if maps else {}), **case.options)
    for parameter in ours.parameters():  # a zero gain would hide a difference
        if parameter.numel() == 1:
            parameter.data.fill_(0.5)
    x = torch.randn(case.shape)
    if case.id == "channel_affinity":
        x = 0.1 * x  # its scores are unscaled sums over all positions: unit inputs leave one weight of 1 and only rounding to compare
    inputs = (x, *(torch.randn(shape) for shape in case.others))
    for name, build in PEERS[case.id].items():
        peer = build(ours)
        if peer is None:
            continue
        peer = as_public(peer)
        models = (ours.train(case.training), peer.train(case.training))
        outputs = [first(model(*inputs)) for model in models]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5 * outputs[1].abs().max().item())
        cotangent = torch.randn_like(outputs[0])
        del outputs
        passes: dict[str, Callable[[nn.Module], None]] = {"forward": lambda model: forward(model, inputs)}
        if case.training:
            passes["forward+backward"] = lambda model, cotangent=cotangent: both(model, inputs, cotangent)
        for run, call in passes.items():
            times = interleaved([lambda model=model, call=call: call(model) for model in models], seconds)
            peaks = [peak_bytes(lambda model=model, call=call: call(model), x.device) / 1e6 for model in models]
            faster, leaner = times[1] / times[0], peaks[1] / peaks[0]
            floor = case.floor_forward if run == "forward" else case.floor_both
            memory = case.floor_memory_forward if run == "forward" else case.floor_memory
            wanted = [f"{floor:g}x" if floor else "", f"memory {memory:g}x" if memory else ""]
            wanted.append(f"target {case.target_both:g}x" if case.target_both and run != "forward" else "")
            held = faster >= EQUAL * (floor or 0) and leaner >= EQUAL * (memory or 0)
            met = "" if not (floor or memory) else "yes" if held else "no"
            size = " ".join("x".join(map(str, shape)) for shape in (case.shape, *case.others))
            largest = max(allocations(lambda call=call, mine=models[0]: call(mine))) / 1e6
            given = " ".join(f"{k}={v}" for k, v in case.options.items())
            figures = (times[0], times[1], faster, peaks[0], peaks[1], leaner, largest)
            yield Row(case.id, given, name, size, run, *figures, ", ".join(filter(None, wanted)), met, machine, day, gflops, load)


def as_public(peer: nn.Module) -> nn.Module:
    """A copy with torch's own linear layers in place of ours."""
    peer = copy.deepcopy(peer)
    for module in peer.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear
    return peer


def forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        model(*inputs)


def both(model: nn.Module, inputs: tuple[Tensor, ...], cotangent: Tensor) -> None:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    wanted = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(first(model(*inputs)), [*inputs, *wanted], cotangent, allow_unused=True)


def interleaved(calls: list[Callable[[], None]], seconds: float) -> list[float]:
    """Median milliseconds of each call."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    start = time.perf_counter()
    while len(times[0]) < 7 or (time.perf_counter() - start < seconds and len(times[0]) < 400):
        for call, found in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(found) for found in times]


def merged(rows: list[Row]) -> list[Row]:
    """The rows of the last file, those of the ids measured now replaced; in the order of `cases`."""
    path, new = MEASURED / "floors.csv", {row.id for row in rows}
    kinds = {f.name: f.type for f in fields(Row)}
    with path.open(newline="") as file:
        old = [Row(**{k: float(v) if kinds[k] is float else v for k, v in line.items()}) for line in csv.DictReader(file) if line["id"] not in new]
    order = list(dict.fromkeys(case.id for case in cases()))
    return sorted([row for row in old + rows if row.id in order], key=lambda row: order.index(row.id))


def write(rows: list[Row]) -> None:
    MEASURED.mkdir(parents=True, exist_ok=True)
    temporary = MEASURED / "floors.csv.tmp"
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(Row)])
        for row in rows:
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else v for v in asdict(row).values()])
    os.replace(temporary, MEASURED / "floors.csv")
    head = "id | options | beside | size | pass | ours ms | its ms | faster | ours MB | its MB | leaner | largest MB | floor | held"
    lines = [f"| {head} |", "| --- " * (head.count("|") + 1) + "|"]
    for r in rows:
        cells = (r.id, r.options, r.peer, r.size, r.run, f"{r.ours_ms:.3g}", f"{r.peer_ms:.3g}", f"**{r.faster:.2f}x**")
        memory = (f"{r.ours_mb:.3g}", f"{r.peer_mb:.3g}", f"{r.leaner:.2f}x", f"{r.largest_mb:.3g}")
        lines.append("| " + " | ".join((*cells, *memory, r.floor, r.held)) + " |")
    text = (MEASURED / "floors.head.md").read_text() if (MEASURED / "floors.head.md").exists() else "# Measured\n"
    runs = sorted({(r.machine, r.day) for r in rows})
    about = "; ".join(f"{machine}, {day}" for machine, day in runs)
    about += f"; matrix products {min(r.gflops for r in rows):.0f} to {max(r.gflops for r in rows):.0f} GFLOP/s"
    about += f", load before a case at most {max(r.load for r in rows):.1f}"
    temporary = MEASURED / "README.tmp"
    temporary.write_text(f"{text}\n`python benchmarks/floors.py` on {about}.\n\n" + "\n".join(lines) + "\n")
    os.replace(temporary, MEASURED / "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ids", nargs="*", help="ids to measure; all if none")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each pass of each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = calibrate(torch.device("cpu"))
    machine = f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}"
    print(f"{machine}: matrix products {rates.gflops:.0f} GFLOP/s, copies {rates.gbytes:.0f} GB/s, load {os.getloadavg()[0]:.1f}")
    rows = []
    for case in cases():
        if options.ids and case.id not in options.ids:
            continue
        for row in measure(case, options.seconds, machine, rates.gflops):
            rows.append(row)
            print(
                f"{row.id:12} {row.options:24} {row.peer:22} {row.size:12} {row.run:17} {row.ours_ms:9.3f} {row.peer_ms:9.3f} ms {row.faster:6.2f}x"
                f" {row.ours_mb:8.1f} {row.peer_mb:8.1f} MB {row.leaner:6.2f}x  {row.largest_mb:6.1f}  {row.floor:24} {row.held}",
                flush=True,
            )
    if not options.dry:
        write(merged(rows) if options.ids else rows)


if __name__ == "__main__":
    main()
