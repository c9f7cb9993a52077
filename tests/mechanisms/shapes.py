"""What a module forms on the way."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Shapes(TorchDispatchMode):
    """The shapes of all results of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)}
        return out
