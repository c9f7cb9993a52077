"""Public forms of our mechanisms, re-expressed for timing: `PEERS[id][whose] (our module) -> a module with the same weights`, or None."""

from collections.abc import Callable, Mapping

from torch import nn

from . import blocks, channel, context, local, luong, sequence

PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module | None]]] = {
    **blocks.PEERS,
    **channel.PEERS,
    **context.PEERS,
    **local.PEERS,
    **luong.PEERS,
    **sequence.PEERS,
}
