"""Public forms of our mechanisms, re-expressed for timing: `PEERS[id][whose] (our module) -> a module with the same weights`, or None.

Every file of this folder adds its own.
"""

import importlib
import pkgutil
from collections.abc import Callable

from torch import nn

PEERS: dict[str, dict[str, Callable[[nn.Module], nn.Module | None]]] = {}
for _file in pkgutil.iter_modules(__path__):
    PEERS |= importlib.import_module(f"{__name__}.{_file.name}").PEERS
