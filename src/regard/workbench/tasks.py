"""The tasks of the workbench: each connects data to a host and says how its metric is read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import digits as digits_data
from ..data import listops as listops_data
from ..data import mqar as mqar_data
from ..data import shapes as shapes_data
from ..data import source as source_data
from ..data.batch import IGNORE, Batch, Data
from ..errors import RegardError, require
from ..hosts.maps import ResNet, SegmentationNet
from ..hosts.slot import Slot
from ..hosts.tokens import CausalLM, TokenEncoder
from .config import split_name

TOKEN_OPTIONS = {"dim": 64, "depth": 2, "num_heads": 4}
MAP_OPTIONS = {"width": 32, "num_heads": 4}


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        hosts: kinds of host it can use: "tokens", "map"; the first is the default.
        lengths: default training lengths by kind of host.
        fixed: the data have one length only, the default.
        options: names and defaults of its options.
        data: (length, kind of host, options) -> Data.
        host: (slot, kind of host, options) -> the network; its output has the classes on axis 1 for maps and last for tokens.
        probe: (batch, length, kind of host, generator) -> inputs for measuring costs at any length.
        chance: of a predictor that learned nothing, from the data.
    """

    name: str
    title: str
    description: str
    source: str
    metric: str
    metric_definition: str
    higher_is_better: bool
    hosts: tuple[str, ...]
    lengths: Mapping[str, tuple[int, ...]]
    batch: int
    learning_rate: float
    data: Callable[[int, str, Mapping[str, Any]], Data]
    host: Callable[[Slot, str, Mapping[str, Any]], nn.Module]
    probe: Callable[[int, int, str, torch.Generator], Batch]
    chance: Callable[[Data], float]
    host_text: Callable[[str, Mapping[str, Any]], str]
    options: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    fixed: bool = False
    cost_batch: int = 4


def _tokens(vocabulary: int, *, masked: bool = False) -> Callable[[int, int, str, torch.Generator], Batch]:
    def probe(batch: int, length: int, host: str, generator: torch.Generator) -> Batch:
        x = torch.randint(vocabulary, (batch, length), generator=generator)
        return Batch(x, x[:, 0], torch.ones_like(x, dtype=torch.bool) if masked else None)

    return probe


def _maps(channels: int) -> Callable[[int, int, str, torch.Generator], Batch]:
    def probe(batch: int, length: int, host: str, generator: torch.Generator) -> Batch:
        x = torch.rand(batch, channels, length, length, generator=generator)
        return Batch(x, torch.zeros(batch, dtype=torch.long))

    return probe


def _digits_probe(batch: int, length: int, host: str, generator: torch.Generator) -> Batch:
    return (_maps(1) if host == "map" else _tokens(digits_data.VOCABULARY))(batch, length, host, generator)


def _encoder(vocabulary: int, classes: int) -> Callable[[Slot, str, Mapping[str, Any]], nn.Module]:
    return lambda slot, host, o: TokenEncoder(vocabulary, classes, slot, dim=o["dim"], depth=o["depth"])


def _digits_host(slot: Slot, host: str, o: Mapping[str, Any]) -> nn.Module:
    if host == "tokens":
        return TokenEncoder(digits_data.VOCABULARY, 10, slot, dim=o["dim"], depth=o["depth"])
    return ResNet(1, 10, slot, widths=(o["width"], 2 * o["width"]))


def _token_text(kind: str) -> Callable[[str, Mapping[str, Any]], str]:
    return lambda host, o: f"{kind}, {o['depth']} blocks of width {o['dim']}, {o['num_heads']} heads where a mechanism has heads"


def _digits_text(host: str, o: Mapping[str, Any]) -> str:
    if host == "tokens":
        return _token_text("token encoder pooled by mean plus maximum")(host, o)
    return f"residual network, 2 blocks of {o['width']} and {2 * o['width']} channels, the slot before each addition"


def _majority(data: Data) -> float:
    """Accuracy of always giving the most frequent answer of the held-out examples."""
    y = data.test.y[data.test.y != IGNORE]
    return float(y.bincount().max() / y.numel())


def _background_only(data: Data) -> float:
    y = data.test.y
    return float((y == 0).float().mean()) / len(shapes_data.CLASSES)


def _pick(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names}


ACCURACY = "share of held-out examples whose class is predicted"
PYTHON_SOURCE = "Python source of the standard library that runs this; every fourth file is held out, no file is on both sides"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="source",
            title="Which package is this source from?",
            description="A window of bytes of Python source; the class is the package it was cut from.",
            source=PYTHON_SOURCE,
            metric="accuracy",
            metric_definition=ACCURACY,
            higher_is_better=True,
            hosts=("tokens",),
            lengths={"tokens": (256,)},
            batch=16,
            learning_rate=3e-3,
            options=TOKEN_OPTIONS,
            data=lambda n, host, o: source_data.SourceWindows(n),
            host=lambda slot, host, o: _encoder(source_data.VOCABULARY, len(source_data.corpus().classes))(slot, host, o),
            probe=_tokens(source_data.VOCABULARY),
            chance=lambda data: 1 / len(source_data.corpus().classes),
            host_text=_token_text("token encoder pooled by mean plus maximum"),
        ),
        Task(
            name="source_lm",
            title="Next byte of Python source",
            description="A causal model of the bytes of Python source.",
            source=PYTHON_SOURCE,
            metric="bits per byte",
            metric_definition="mean -log2 of the probability given to each next byte of held-out files",
            higher_is_better=False,
            hosts=("tokens",),
            lengths={"tokens": (256,)},
            batch=16,
            learning_rate=3e-3,
            options=TOKEN_OPTIONS,
            data=lambda n, host, o: source_data.SourceWindows(n, test_per_class=32, language_model=True),
            host=lambda slot, host, o: CausalLM(source_data.VOCABULARY, slot, dim=o["dim"], depth=o["depth"]),
            probe=_tokens(source_data.VOCABULARY),
            chance=lambda data: 8.0,
            host_text=_token_text("causal language model"),
            causal=True,
        ),
        Task(
            name="digits",
            title="Handwritten digits",
            description="Real handwritten digits of 8 x 8 pixels, as a map or as a sequence of 64 ink levels.",
            source="scikit-learn's copy of the UCI handwritten digits; a quarter of each class is held out",
            metric="accuracy",
            metric_definition=ACCURACY,
            higher_is_better=True,
            hosts=("map", "tokens"),
            lengths={"map": (digits_data.SIDE,), "tokens": (digits_data.SIDE**2,)},
            batch=64,
            learning_rate=3e-3,
            options={**TOKEN_OPTIONS, **MAP_OPTIONS, "layout": None},
            data=lambda n, host, o: digits_data.digits(tokens=host == "tokens"),
            host=_digits_host,
            probe=_digits_probe,
            chance=_majority,
            host_text=_digits_text,
            fixed=True,
            cost_batch=16,
        ),
        Task(
            name="listops",
            title="ListOps",
            description="Nested MAX, MIN, MED and sum-modulo-10 over digits; the answer is a digit.",
            source="exact generator, rule of Long Range Arena with the closing brackets kept; lengths from a quarter of the longest",
            metric="accuracy",
            metric_definition=ACCURACY,
            higher_is_better=True,
            hosts=("tokens",),
            lengths={"tokens": (128,)},
            batch=32,
            learning_rate=2e-3,
            options={**TOKEN_OPTIONS, "shortest": None, "train": 8000, "test": 1000},
            data=lambda n, host, o: listops_data.listops(n, **_pick(o, "shortest", "train", "test")),
            host=_encoder(listops_data.VOCABULARY, 10),
            probe=_tokens(listops_data.VOCABULARY, masked=True),
            chance=_majority,
            host_text=_token_text("token encoder pooled by mean plus maximum"),
        ),
        Task(
            name="mqar",
            title="Multi-query associative recall",
            description="Key-value pairs, then the keys again: say the value of each.",
            source="exact generator after zoology's",
            metric="accuracy",
            metric_definition="share of queried keys whose value is predicted, on held-out sequences",
            higher_is_better=True,
            hosts=("tokens",),
            lengths={"tokens": (64,)},
            batch=64,
            learning_rate=3e-3,
            options={**TOKEN_OPTIONS, "pairs": 8, "vocabulary": 64, "train": 20_000, "test": 1000},
            data=lambda n, host, o: mqar_data.mqar(n, **_pick(o, "pairs", "vocabulary", "train", "test")),
            host=lambda slot, host, o: CausalLM(o["vocabulary"], slot, dim=o["dim"], depth=o["depth"]),
            probe=_tokens(3),
            chance=_majority,
            host_text=_token_text("causal language model"),
            causal=True,
        ),
        Task(
            name="shapes",
            title="Segmentation of sprites on photographs",
            description="Five outlines, filled with one real photograph, on another; a class for every pixel.",
            source="exact masks on scikit-image's photographs; other photographs in training than in test",
            metric="mIoU",
            metric_definition="intersection over union, mean over background and five shapes, over all held-out pixels",
            higher_is_better=True,
            hosts=("map",),
            lengths={"map": (32,)},
            batch=16,
            learning_rate=3e-3,
            options={**MAP_OPTIONS, "sprites": 3, "depth": 2, "train": 2000, "test": 200},
            data=lambda n, host, o: shapes_data.shapes(n, **_pick(o, "sprites", "train", "test")),
            host=lambda slot, host, o: SegmentationNet(3, len(shapes_data.CLASSES), slot, width=o["width"], depth=o["depth"]),
            probe=_maps(3),
            chance=_background_only,
            host_text=lambda host, o: f"segmentation network, {o['depth']} blocks of {o['width']} channels at half the side",
            cost_batch=4,
        ),
    )
}


def names() -> list[str]:
    """The tasks there are."""
    return list(TASKS)


def parse(text: str) -> tuple[Task, dict[str, Any]]:
    """ "digits:width=16" -> the task and all its options."""
    name, given = split_name(text)
    if name not in TASKS:
        raise RegardError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    task = TASKS[name]
    unknown = sorted(set(given) - set(task.options))
    require(not unknown, "task {}: unknown options {}; it has {}", name, unknown, sorted(task.options))
    for key, value in given.items():
        default = task.options[key]
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        require(not isinstance(default, int) or whole, "task {}: {}={!r} must be a whole number from 1", name, key, value)
    return task, {**task.options, **given}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the targets that count."""
    return F.cross_entropy(*_flat(model, batch), ignore_index=IGNORE)


def score(task: Task, model: nn.Module, batch: Batch, *, at_once: int = 128) -> float:
    """The task's metric on these examples, `at_once` examples a pass. The model is left in the mode it was in."""
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [_flat(model, batch.pick(slice(start, start + at_once))) for start in range(0, len(batch), at_once)]
    model.train(training)
    if task.metric == "mIoU":
        return _mean_iou(parts)
    total, count = 0.0, 0
    for logits, y in parts:
        real = y != IGNORE
        logits, y = logits[real], y[real]
        count += y.numel()
        if task.metric == "accuracy":
            total += int((logits.argmax(1) == y).sum())
        else:
            total += float(F.cross_entropy(logits.double(), y, reduction="sum")) / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    return total / count


def _flat(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores (targets, classes) and targets (targets,)."""
    out = model(batch.x) if batch.key_mask is None else model(batch.x, batch.key_mask)
    if out.ndim == 4:
        out = out.movedim(1, -1)
    return out.reshape(-1, out.shape[-1]), batch.y.reshape(-1)


def _mean_iou(parts: list[tuple[Tensor, Tensor]]) -> float:
    classes = parts[0][0].shape[1]
    table = torch.zeros(classes, classes, dtype=torch.long)
    for logits, y in parts:
        table += (y * classes + logits.argmax(1)).bincount(minlength=classes**2).view(classes, classes).cpu()
    hit = table.diagonal().double()
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return float((hit / union.clamp(min=1))[union > 0].mean())
