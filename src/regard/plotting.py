"""Pictures of what a mechanism returns, and of what it may look at. Needs matplotlib, imported when a picture is drawn."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import RegardError, require, require_type
from .files import write_whole


def plot_gates(gates: Mapping[str, Tensor], path: str | Path, *, sample: int = 0) -> Path:
    """Draw the gates of a recurrent cell: one panel a gate, time on x, unit on y, colour 0 to 1 (-1 to 1 for what can be negative).

    Args:
        gates: name -> (batch, time, hidden), as `cell(x, return_gates=True)` gives them.
        path: the PNG to write; it is there whole or not at all.
        sample: which sample of the batch.

    Raises:
        RegardError: matplotlib is not installed, or `gates` are not gates.
    """
    require_type(isinstance(gates, Mapping), "gates must map names to tensors, got {}", type(gates).__name__)
    require(len(gates) > 0, "gates is empty; this cell has none to draw")
    for name, gate in gates.items():
        require(isinstance(gate, Tensor) and gate.ndim == 3, "gates[{!r}] must be (batch, time, hidden), got {}", name, getattr(gate, "shape", gate))
        require(-len(gate) <= sample < len(gate), "sample={} is not in a batch of {}", sample, len(gate))
    figure = _figure("plot_gates", 8, 0.6 + 1.6 * len(gates))
    for axis, (name, gate) in zip(figure.subplots(len(gates), 1, sharex=True, squeeze=False)[:, 0], gates.items(), strict=True):
        values = gate[sample].detach().float().cpu().numpy().T
        signed = bool((values < 0).any())
        bounds = (-1, 1, "RdBu_r") if signed else (0, 1, "viridis")
        picture = axis.imshow(values, aspect="auto", origin="lower", interpolation="nearest", vmin=bounds[0], vmax=bounds[1], cmap=bounds[2])
        axis.set_ylabel(f"{name}: unit")
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(picture, ax=axis)
    axis.set_xlabel("time")
    return _write(figure, Path(path))


def plot_pattern(pattern: Any, n: int, path: str | Path, *, num_heads: int = 1) -> Path:
    """Draw which pairs attention allows: queries down, keys across, allowed pairs dark; one panel for heads that see the same.

    Args:
        pattern: a mechanism that has a pattern (`sparse`, `hypercube`), or the pattern itself.
        n: number of positions.
        path: the PNG to write; it is there whole or not at all.
        num_heads: heads of a pattern that is given itself; a mechanism has its own number.

    Raises:
        RegardError: matplotlib is not installed, or there is no pattern to draw.
    """
    allowed = getattr(pattern, "allowed", pattern)
    require(hasattr(allowed, "allows"), "{} has no pattern to draw; sparse and hypercube have", type(pattern).__name__)
    require(n >= 1, "n={} must be at least 1", n)
    masks = allowed.mask(n, getattr(pattern, "num_heads", num_heads)).cpu()
    panels: list[tuple[Tensor, list[int]]] = []
    for head, mask in enumerate(masks):
        same = next((heads for drawn, heads in panels if drawn.equal(mask)), None)
        if same is None:
            panels.append((mask, [head]))
        else:
            same.append(head)
    figure = _figure("plot_pattern", 0.4 + 3.6 * len(panels), 4)
    for axis, (mask, heads) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.imshow(mask.numpy(), interpolation="nearest", vmin=0, vmax=1, cmap="Blues")
        every = f"{100 * mask.float().mean().item():.2g} % of pairs"
        axis.set_title(every if len(panels) == 1 else f"heads {', '.join(map(str, heads))}: {every}")
        axis.set_xlabel("key")
        axis.set_ylabel("query")
    return _write(figure, Path(path))


def _figure(name: str, width: float, height: float) -> Any:
    """An empty figure without a window."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RegardError(f"{name} needs matplotlib: pip install 'regard[bench]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())
    return path
