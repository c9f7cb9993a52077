"""What a forward pass costs: counted FLOPs, counted peak memory, time over interleaved rounds, and the least time the machine allows."""

import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

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


class PeakMemory(TorchDispatchMode):
    """Counts the live bytes of storages that appear while it is on: `peak` is their largest sum, `live` the present one.

    A storage counts once however many views it has, and until it is freed. Storages of `known` tensors (inputs, parameters) do not
    count, nor
    does scratch space inside an operator that never becomes a tensor.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watch: dict[int, Any] = {}
        # Held, so that no address of a known storage is given to a new one.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._ids = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:
            return
        key = storage._cdata
        if key in self._ids:
            return
        size = storage.nbytes()
        if key not in self._sizes:
            self._watch[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._watch.pop(key, None)


def _cpu_flash_flops(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """2mnk for the scores and for the mixing; torch counts the other kernels of the same attention so, but not this one."""
    batch, heads, rows, width = q
    return 2 * batch * heads * rows * k[2] * (width + v[3])


def count(model: nn.Module, inputs: Sequence[Tensor]) -> Counted:
    """FLOPs (2mnk a product, element-wise work not counted) and peak bytes beyond inputs and parameters of one pass without gradients."""
    known = [*model.parameters(), *model.buffers(), *inputs]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={flash: _cpu_flash_flops})
    with torch.no_grad(), counter:
        model(*inputs)
    memory = PeakMemory(known)
    with torch.no_grad(), memory:
        out = model(*inputs)
    outputs = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)]
    return Counted(float(counter.get_total_flops()), memory.peak, sum(t.numel() * t.element_size() for t in (*known, *outputs)))


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
