"""Public forms of our mechanisms, re-expressed for timing: `PEERS[id][whose] (our module) -> a module with the same weights`."""

from collections.abc import Callable, Mapping

from torch import nn

from . import channel, context, local, sequence

PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {**channel.PEERS, **context.PEERS, **local.PEERS, **sequence.PEERS}
