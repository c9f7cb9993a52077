"""The slot of a host: where an attention mechanism sits. Hosts know its layout by how it is called, never by its name."""

import copy
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import require

# A builder from a width to a module; a ready module, of which every slot gets a copy; None for no attention at all.
Slot = Callable[[int], nn.Module | None] | nn.Module | None


def build(slot: Slot, width: int) -> nn.Module | None:
    """The module for one slot.

    Its parameters are drawn from a generator state of its own, so that the rest of the host starts from the same weights whatever the slot draws.
    """
    seed = int(torch.randint(2**31, ()))
    if slot is None:
        return None
    if isinstance(slot, nn.Module):
        return copy.deepcopy(slot)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return slot(width)


class TokenSlot(nn.Module):
    """Calls a mechanism on tokens (B, N, width), whether it is of layout sequence, set or recurrent, and gives back the tokens alone.

    Args:
        module: takes `x`, and `key_mask` or `mask` if it has one; a tuple's first entry is the output.
    """

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        known = inspect.signature(module.forward).parameters
        can = getattr(getattr(module, "card", None), "can", None)
        self.mask_name = next((name for name in ("key_mask", "mask") if name in known and (can is None or name in can)), None)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        masked = {} if key_mask is None or self.mask_name is None else {self.mask_name: key_mask}
        out = first(self.module(x, **masked))
        return _same_shape(out, x, self.module)


class MapSlot(nn.Module):
    """Calls a mechanism on a map (B, channels, height, width) and gives back the map alone."""

    module: nn.Module

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out = first(self.module(x))
        return _same_shape(out, x, self.module)


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a mechanism that may also return weights or a state."""
    return out[0] if isinstance(out, tuple) else out


def _same_shape(out: Tensor, x: Tensor, module: nn.Module) -> Tensor:
    fits = out.shape == x.shape
    require(fits, "{} turns {} into {}; a slot needs the same shape", type(module).__name__, tuple(x.shape), tuple(out.shape))
    return out
