"""Public forms of the neighbourhood mechanisms, re-expressed for timing: the same operations in the same order, on the same weights.

Each takes one of our modules and copies its weights through `regard.official.to_official`, so outputs must be equal.
`python benchmarks/peers/local.py` prints both, medians of interleaved rounds, with peak bytes as the allocator saw them. On a machine with other
work use `OMP_WAIT_POLICY=PASSIVE python benchmarks/peers/local.py --cpu`: CPU seconds of a thread in place of wall seconds.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.official import to_official


class TimmHalo(nn.Module):
    """timm HaloAttn: kv projection, padded map cut by `unfold` views, weights stored, relative logits by pad and reshape."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.heads, self.d, self.dv, self.block, self.halo = ours.num_heads, ours.qk_head_dim, ours.v_head_dim, ours.block_size, ours.halo_size
        self.win, self.scale = ours.window, ours.scale
        self.q = nn.Conv2d(ours.channels, self.heads * self.d, 1, bias=False)
        self.kv = nn.Conv2d(ours.channels, self.heads * (self.d + self.dv), 1, bias=False)
        self.pos_embed = nn.ParameterDict({name: torch.empty(2 * self.win - 1, self.d) for name in ("height_rel", "width_rel")})
        self.load_state_dict(to_official(ours, "timm"))

    def _relative(self, q: Tensor, table: Tensor, order: tuple[int, ...]) -> Tensor:
        n, high, wide, _ = q.shape
        size = table.shape[0]
        x = (q @ table.transpose(-1, -2)).reshape(-1, wide, size)
        x = F.pad(F.pad(x, [0, 1]).flatten(1), [0, size - wide]).reshape(-1, wide + 1, size)[:, :wide, self.win - 1 :]
        return x.reshape(n, high, 1, wide, self.win).expand(-1, -1, self.win, -1, -1).permute(order)

    def _positions(self, q: Tensor) -> Tensor:
        batch, blocks = q.shape[:2]
        q = q.reshape(-1, self.block, self.block, self.d)
        wide = self._relative(q, self.pos_embed["width_rel"], (0, 1, 3, 2, 4))
        high = self._relative(q.transpose(1, 2), self.pos_embed["height_rel"], (0, 3, 1, 4, 2))
        return (high + wide).reshape(batch, blocks, self.block**2, self.win**2)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        b, rows, columns = self.block, height // self.block, width // self.block
        q = self.q(x).reshape(-1, self.d, rows, b, columns, b).permute(0, 1, 3, 5, 2, 4)
        q = q.reshape(batch * self.heads, self.d, -1, rows * columns).transpose(1, 3)
        kv = F.pad(self.kv(x), [self.halo] * 4)
        kv = kv.unfold(2, self.win, b).unfold(3, self.win, b).reshape(batch * self.heads, self.d + self.dv, rows * columns, -1).permute(0, 2, 3, 1)
        k, v = kv.split([self.d, self.dv], -1)
        weights = ((q @ k.transpose(-1, -2)) * self.scale + self._positions(q)).softmax(-1)
        out = (weights @ v).transpose(1, 3).reshape(-1, b, b, rows, columns)
        return out.permute(0, 3, 1, 4, 2).contiguous().view(batch, self.heads * self.dv, height, width)


class UnfoldCarafe(nn.Module):
    """XiaLiPKU CARAFE with mmcv's layers: nearest upsampling, then an unfold of dilation s, then one einsum over the k^2 copies."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.k, self.s = ours.up_kernel, ours.scale_factor
        self.channel_compressor = nn.Conv2d(ours.channels, ours.compressed_channels, 1)
        self.content_encoder = nn.Conv2d(ours.compressed_channels, (self.k * self.s) ** 2, ours.encoder_kernel, padding=ours.encoder_kernel // 2)
        self.load_state_dict(to_official(ours, "mmcv"))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weights = F.pixel_shuffle(self.content_encoder(self.channel_compressor(x)), self.s).softmax(1)
        x = F.interpolate(x, scale_factor=self.s, mode="nearest")
        x = F.unfold(x, self.k, dilation=self.s, padding=self.k // 2 * self.s)
        return torch.einsum("bkhw,bckhw->bchw", weights, x.view(batch, channels, -1, height * self.s, width * self.s))


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {"halo": {"timm": TimmHalo}, "carafe": {"unfold": UnfoldCarafe}}


def _peak(run: Callable[[], object]) -> float:
    """MB that live at most at a time during `run`, by the allocator's events: temporaries inside operators count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = most = 0
    results: Any = getattr(profiler.profiler, "kineto_results")  # noqa: B009
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most / 1e6


def main() -> None:
    import regard

    torch.set_num_threads(2)
    clock = (lambda: time.process_time() / 2) if "--cpu" in sys.argv else time.perf_counter
    print(f"{'case':34}{'forward ms':>24}{'with backward ms':>26}{'MB forward':>20}{'MB with backward':>22}")
    cases = [("halo", {"num_heads": heads, "block_size": 7, "halo_size": 3}, size) for size in ((64, 56), (256, 28)) for heads in (4, 8)]
    cases += [("carafe", {}, size) for size in ((64, 56), (256, 28))]
    for name, options, (channels, side) in cases:
        ours = regard.create(name, channels, **options)
        ((peer_name, build),) = PEERS[name].items()
        models = [ours, build(ours)]
        x = torch.randn(4, channels, side, side)
        torch.testing.assert_close(models[0](x), models[1](x))
        g = torch.randn_like(ours(x))

        def forward(model: nn.Module, x: Tensor = x) -> None:
            with torch.no_grad():
                model(x)

        def both(model: nn.Module, x: Tensor = x, g: Tensor = g) -> None:
            torch.autograd.grad(model(x.requires_grad_()), [x, *model.parameters()], g)

        cells = []
        for run in (forward, both):
            times: list[list[float]] = [[], []]
            for turn in range(9):
                for at, model in enumerate(models):
                    start = clock()
                    run(model)
                    if turn > 1:
                        times[at].append(1e3 * (clock() - start))
            cells.append([statistics.median(t) for t in times])
        cells += [[_peak(lambda run=run, model=model: run(model)) for model in models] for run in (forward, both)]
        label = f"{name} {options.get('num_heads', '')} B4 C{channels} {side}x{side} / {peer_name}"
        print(f"{label:34}" + "".join(f"{a:9.1f} /{b:8.1f} {b / a:5.1f}x" for a, b in cells), flush=True)


if __name__ == "__main__":
    main()
