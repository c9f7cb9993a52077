"""One training: the same host, optimiser, data order and seed for every candidate."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batch import Batch, Data
from ..errors import RegardError, require
from ..hosts.slot import MapSlot, TokenSlot
from .candidates import Candidate, Setting, causal_ids
from .summary import CurvePoint
from .tasks import Task, loss, score

CURVE_POINTS = 5
CURVE_SHARE = 4  # the curve is read on every fourth held-out example, the final metric on all
PICTURE_SIDE = 64


@dataclass(frozen=True)
class Trial:
    """What one training is: everything that its figures depend on."""

    task: Task
    options: Mapping[str, Any]
    candidate: Candidate
    host: str
    length: int
    longest: int
    seed: int
    batch: int
    learning_rate: float
    device: torch.device

    def setting(self) -> Setting:
        return Setting(self.host, self.task.causal, int(self.options["num_heads"]), self.longest)


@dataclass(frozen=True)
class Outcome:
    """What one training found. `metric` on all held-out examples, `seconds` of training alone."""

    metric: float
    steps: int
    seconds: float
    examples_per_second: float
    parameters: int
    curve: tuple[CurvePoint, ...]
    picture: dict[str, Any] | None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def network(trial: Trial) -> nn.Module:
    """The host with the candidate in its slots, the same weights outside the slots for every candidate of this seed."""
    torch.manual_seed(trial.seed)
    setting = trial.setting()
    return trial.task.host(lambda width: trial.candidate.make(width, setting), trial.host, trial.options)


class Run:
    """A network in training. The rate rises over the first tenth of the steps and falls to zero as a cosine."""

    def __init__(self, trial: Trial, data: Data, steps: int) -> None:
        self.trial, self.data, self.steps = trial, data, steps
        self.model = network(trial).to(trial.device)
        self.model.train()
        self.order = torch.Generator().manual_seed(trial.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=trial.learning_rate, weight_decay=0.01)
        self.done = 0
        # What a mechanism draws during training must not depend on how much its constructor drew.
        torch.manual_seed(trial.seed + 1)

    def step(self) -> float:
        """One update; the loss before it."""
        warm = max(1, self.steps // 10)
        share = min(1.0, (self.done - warm) / max(1, self.steps - warm))
        factor = (self.done + 1) / (warm + 1) if self.done < warm else 0.5 * (1 + math.cos(math.pi * share))
        for group in self.optimizer.param_groups:
            group["lr"] = self.trial.learning_rate * factor
        batch = self.data.draw(self.trial.batch, self.order).to(self.trial.device)
        value = loss(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.done += 1
        number = value.item()
        if not math.isfinite(number):
            raise RegardError(f"the training loss became {number} at step {self.done} of {self.steps}")
        return number


def train(trial: Trial, data: Data, steps: int, *, picture: bool, report: Callable[[int, float, float | None], None]) -> Outcome:
    """Train for this many steps, read the metric along the way and at the end.

    Args:
        picture: also take the attention weights on one held-out example, where the mechanism has them.
        report: called with (step, loss, metric or None) now and then.
    """
    run = Run(trial, data, steps)
    test = data.test.to(trial.device)
    few = test.pick(slice(0, max(1, len(test) // CURVE_SHARE)))
    marks = {max(1, round(steps * (i + 1) / CURVE_POINTS)) for i in range(CURVE_POINTS)}
    curve: list[CurvePoint] = []
    seconds, said = 0.0, 0.0
    recent: list[float] = []
    for step in range(1, steps + 1):
        start = time.perf_counter()
        recent.append(run.step())
        seconds += time.perf_counter() - start
        if step in marks:
            metric = score(trial.task, run.model, few)
            curve.append(CurvePoint(step, step * trial.batch, seconds, statistics.fmean(recent), metric))
            report(step, recent[-1], metric)
            recent = []
        elif seconds - said > 0.2:
            said = seconds
            report(step, recent[-1], None)
    return Outcome(
        metric=score(trial.task, run.model, test),
        steps=steps,
        seconds=seconds,
        examples_per_second=steps * trial.batch / seconds,
        parameters=sum(p.numel() for p in run.model.parameters()),
        curve=tuple(curve),
        picture=attention_picture(trial, run.model, test.pick(slice(0, 1))) if picture else None,
    )


def seconds_per_step(trial: Trial, data: Data, *, budget: float) -> float:
    """The median time of a step after warm-up, from a share of the budget: what turns seconds into steps."""
    run = Run(trial, data, steps=100)
    for _ in range(3):
        run.step()
    spend = min(2.0, max(0.3, 0.1 * budget))
    times: list[float] = []
    while len(times) < 5 or (sum(times) < spend and len(times) < 200):
        start = time.perf_counter()
        run.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def check_shapes(trial: Trial) -> nn.Module:
    """Build the network and send two examples through; what a slot cannot hold shows here. A causal host is searched for leaks of the
    future."""
    model = network(trial).eval()
    probe = trial.task.probe(2, min(trial.length, 64), trial.host, torch.Generator().manual_seed(0))
    inputs = (probe.x,) if probe.key_mask is None else (probe.x, probe.key_mask)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model(*inputs)
        declared = trial.candidate.card is not None and "causal" in trial.candidate.card.can
        # A card's word is checked by `regard check`; some declared ones differ by rounding, through a stabiliser over all keys.
        if trial.task.causal and not declared:
            half = probe.x.shape[1] // 2
            changed = probe.x.clone()
            changed[:, half:] = (changed[:, half:] + 1) % 3
            torch.manual_seed(0)
            after = model(changed)
            require(
                torch.allclose(out[:, :half], after[:, :half], rtol=1e-4, atol=1e-4),
                "it lets later tokens change earlier outputs, but task {!r} needs a causal mechanism; choose one of {}, or "
                "give your class an option causal",
                trial.task.name,
                ", ".join(causal_ids()),
            )
    return model


def attention_picture(trial: Trial, model: nn.Module, example: Batch) -> dict[str, Any] | None:
    """Weights of the last slot on one example, mean over heads: {"weights": rows in 0..1, "image": rows or None, "caption": text}."""
    card = trial.candidate.card
    slots = [m.module for m in model.modules() if isinstance(m, TokenSlot | MapSlot)]
    if card is None or "weights" not in card.can or not slots:
        return None
    taken: list[Any] = []

    def ask(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "return_weights": True}

    def take(_: nn.Module, args: Any, out: Any) -> Any:
        taken.append(out[-1])
        return out[0]

    hooks = [slots[-1].register_forward_pre_hook(ask, with_kwargs=True), slots[-1].register_forward_hook(take)]
    try:
        score(trial.task, model, example)
    finally:
        for hook in hooks:
            hook.remove()
    matrix = to_matrix(taken[0])
    if matrix is None:
        return None
    image = example.x[0].float().mean(0) if trial.host == "map" else None
    if trial.host == "tokens":
        axes = "mean over heads; rows: queries, columns: what they attend to"
    else:
        axes = "the gate of each channel" if len(matrix) == 1 else "over the places of the map"
    return {
        "caption": f"{trial.candidate.name}, last block, {axes}",
        "weights": shrink(matrix).tolist(),
        "image": None if image is None else shrink(image).tolist(),
    }


def to_matrix(weights: Any) -> Tensor | None:
    """The first tensor's first example as a matrix, scaled to 0..1: a gate per channel is one row, everything before two axes is
    averaged over."""
    while isinstance(weights, tuple | list):
        # Later entries come later in the mechanism; of CBAM's two gates the second is the one over places.
        weights = next((w for w in reversed(weights) if w is not None), None)
    if not isinstance(weights, Tensor):
        return None
    one = weights[0].detach().float().cpu()
    if one.ndim >= 2 and one.shape[-2:] == (1, 1):
        one = one.flatten()
    if one.ndim < 2:
        one = one.reshape(1, -1)
    one = one.flatten(0, -3).mean(0) if one.ndim > 2 else one
    return (one / one.abs().max().clamp(min=1e-12)).clamp(0, 1)


def shrink(matrix: Tensor) -> Tensor:
    """At most 64 x 64, by the means of cells."""
    rows, columns = (min(PICTURE_SIDE, side) for side in matrix.shape)
    small = F.adaptive_avg_pool2d(matrix.cpu()[None, None], (rows, columns))[0, 0]
    return (small / small.max().clamp(min=1e-12)).clamp(0, 1)
