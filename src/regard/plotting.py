"""Pictures of what a mechanism returns. Needs matplotlib, imported when a picture is drawn."""

import io
from collections.abc import Mapping
from pathlib import Path

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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RegardError("plot_gates needs matplotlib: pip install 'regard[bench]'") from None
    figure = Figure(figsize=(8, 0.6 + 1.6 * len(gates)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, gate) in zip(figure.subplots(len(gates), 1, sharex=True, squeeze=False)[:, 0], gates.items(), strict=True):
        values = gate[sample].detach().float().cpu().numpy().T
        signed = bool((values < 0).any())
        bounds = (-1, 1, "RdBu_r") if signed else (0, 1, "viridis")
        picture = axis.imshow(values, aspect="auto", origin="lower", interpolation="nearest", vmin=bounds[0], vmax=bounds[1], cmap=bounds[2])
        axis.set_ylabel(f"{name}: unit")
        axis.yaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(picture, ax=axis)
    axis.set_xlabel("time")
    path = Path(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())
    return path
