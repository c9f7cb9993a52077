"""What a forward pass costs: counted FLOPs, counted peak memory, time over interleaved rounds, and the least time the machine allows."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from ..ops import _flops  # noqa: F401  (the fused CPU kernel is counted)

MIB = 2**20


@dataclass(frozen=True)
class Counted:
    """FLOPs and peak bytes of one pass, and the bytes that must move at least: inputs, parameters and outputs once each."""

    flops: float
    peak_bytes: int
    least_bytes: int


@dataclass(frozen=True)
class Rates:
    """What this machine reaches: matrix products in 10^9 FLOP/s, copies in 10^9 bytes/s read and written."""

    gflops: float
    gbytes: float

    def floor_ms(self, counted: Counted) -> float:
        """The least time for these FLOPs and bytes, in milliseconds."""
        return 1e-6 * max(counted.flops / self.gflops, counted.least_bytes / self.gbytes)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes alive at most at a time during the call beyond what was there before, by the allocator's events: scratch inside operators counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    live = most = 0
    for size in allocations(call):
        live += size
        most = max(most, live)
    return most


def allocations(call: Callable[[], object]) -> list[int]:
    """What the CPU's allocator gave (positive) and took back (negative) during the call, in bytes and in order; the result is kept till the end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    del kept
    return [e.nbytes() for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())]


def count(model: nn.Module, inputs: Sequence[Tensor]) -> Counted:
    """FLOPs (2mnk a product, element-wise work not counted) and peak bytes beyond inputs and parameters of one pass without gradients."""
    known = [*model.parameters(), *model.buffers(), *inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(*inputs)
    with torch.no_grad():
        peak = peak_bytes(lambda: model(*inputs), inputs[0].device)
    outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
    return Counted(float(counter.get_total_flops()), peak, sum(t.numel() * t.element_size() for t in (*known, *outputs)))


def latencies(
    passes: Mapping[str, Callable[[], object]], *, seconds: float, device: torch.device, rounds: tuple[int, int] = (5, 60)
) -> dict[str, list[float]]:
    """Milliseconds of each pass in each round; in a round every pass runs once, so that a slow moment of the machine meets all of them.

    Args:
        passes: by name.
        seconds: to spend; between rounds[0] and rounds[1] rounds are run.
    """
    found: dict[str, list[float]] = {name: [] for name in passes}
    with torch.no_grad():
        for run in passes.values():
            timed(run, device)
        start = time.perf_counter()
        for done in range(rounds[1]):
            if done >= rounds[0] and time.perf_counter() - start > seconds:
                break
            for name, run in passes.items():
                found[name].append(1e3 * timed(run, device))
    return found


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call, including the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def calibrate(device: torch.device) -> Rates:
    """The best of several products of 1024 x 1024 (4096 on CUDA) and of several copies of 64 MiB, single precision."""
    side = 4096 if device.type == "cuda" else 1024
    with torch.no_grad():
        a, b, out = (torch.ones(side, side, device=device) for _ in range(3))
        source, target = (torch.zeros(16 * MIB, device=device) for _ in range(2))
        product = min(timed(lambda: torch.mm(a, b, out=out), device) for _ in range(12))
        copy = min(timed(lambda: target.copy_(source), device) for _ in range(12))
    return Rates(2e-9 * side**3 / product, 2e-9 * source.numel() * 4 / copy)


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """Physical memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return 0.0
