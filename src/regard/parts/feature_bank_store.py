"""The bank itself: features of a video by time step, read back a window at a time."""

import torch
from torch import Tensor

from ..errors import require, require_type
from ..validate import check_floating


class FeatureBank:
    """Features collected step by step, to be looked into by the mechanism "feature_bank".

    >>> import torch
    >>> bank = FeatureBank(max_per_step=5)
    >>> bank.add(0, torch.ones(2, 8))
    >>> features, mask = bank.window(center=0, size=60)
    >>> features.shape, int(mask.sum())
    (torch.Size([300, 8]), 2)

    Args:
        max_per_step: how many features of one step a window holds at most.
    """

    def __init__(self, max_per_step: int) -> None:
        require(max_per_step > 0, "max_per_step={} must be at least 1", max_per_step)
        self.max_per_step = max_per_step
        self._steps: dict[int, list[Tensor]] = {}
        self._like: Tensor | None = None

    def add(self, step: int, features: Tensor) -> None:
        """Put more features (count, dim) to a step, without their graph."""
        _check_step(step, "step")
        check_floating(features, "features")
        require(features.ndim == 2, "features must be (count, dim), got {} axes: {}", features.ndim, tuple(features.shape))
        like = features if self._like is None else self._like
        fits = features.shape[1] == like.shape[1] and features.dtype == like.dtype and features.device == like.device
        given, held = ((t.shape[1], t.dtype, str(t.device)) for t in (features, like))
        require(fits, "features are of width, type and device {}, those in the bank {}", given, held)
        self._like = like[:0].detach()
        self._steps.setdefault(step, []).append(features.detach())

    def window(self, center: int, size: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The features of the steps center - size // 2, ..., `size` of them, in the order of time.

        Args:
            generator: draws which features of a step are taken where there are more than max_per_step; the first ones if None.

        Returns:
            (size * max_per_step, dim), the features first and zeros after them, and its mask: True = a feature.
        """
        _check_step(center, "center")
        require(size > 0, "size={} must be at least 1", size)
        require(self._like is not None, "the bank is empty; add(step, features) comes first")
        assert self._like is not None
        start = center - size // 2
        held = [torch.cat(self._steps[step]) for step in range(start, start + size) if step in self._steps]
        found = torch.cat([self._like, *(self._taken(features, generator) for features in held)])
        length = size * self.max_per_step
        out = found.new_zeros(length, found.shape[1])
        out[: len(found)] = found
        return out, torch.arange(length, device=found.device) < len(found)

    def _taken(self, features: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or len(features) <= self.max_per_step:
            return features[: self.max_per_step]
        order = torch.randperm(len(features), generator=generator, device=generator.device)
        return features[order[: self.max_per_step].to(features.device)]


def _check_step(step: object, name: str) -> None:
    require_type(isinstance(step, int) and not isinstance(step, bool), "{} must be a whole number, got {!r}", name, step)
