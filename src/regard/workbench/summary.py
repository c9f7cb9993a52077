"""What a comparison found, as plain data: made from the records by `compare`, written to `summary.json`, drawn by `report`."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskFacts:
    """The task and its metric. `higher_is_better` tells the direction; `chance` is the metric of a predictor that learned nothing."""

    name: str
    title: str
    description: str
    source: str
    metric: str
    metric_definition: str
    higher_is_better: bool
    chance: float | None
    host: str
    length_name: str = "length"  # what the lengths are: "length" of a sequence, "side" of a map


@dataclass(frozen=True)
class Machine:
    """Where and with what it ran; `gflops` and `gbytes` are the calibrated matrix-product and copy rates of this run (10^9 a second)."""

    cpu: str
    cores: int
    threads: int
    memory_gib: float
    device: str
    python: str
    torch: str
    regard: str
    git: str | None
    gflops: float
    gbytes: float


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds with the half-width of its 95 % interval (Student's t); None with a single seed."""

    mean: float
    half_width: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation during training: step, examples seen, seconds of training so far, training loss, metric on held-out data."""

    step: int
    examples: int
    seconds: float
    loss: float
    metric: float


@dataclass(frozen=True)
class TrialResult:
    """One training: a candidate at one length with one seed."""

    candidate: str
    length: int
    seed: int
    status: str  # "ok" or "failed"
    reason: str  # why it failed; empty when ok
    metric: float | None
    steps: int
    examples_per_second: float | None
    curve: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What one forward pass of the whole network costs at one length, and of the mechanism alone.

    Latency in milliseconds for a batch of `batch` (median and quartiles over rounds). FLOPs and peak bytes are counted, not timed. `floor_ms` is
    the least time the machine's calibrated rates allow for the counted FLOPs and the bytes that must move; `over_floor` = latency / floor.
    """

    candidate: str
    length: int
    batch: int
    latency_ms: float
    latency_q25: float
    latency_q75: float
    flops: float
    peak_bytes: int
    floor_ms: float
    over_floor: float
    reason: str = ""  # why there is no figure at this length (then the figures are NaN)


@dataclass(frozen=True)
class CandidateSummary:
    """Everything about one candidate. `score` is by length; growth exponents are fitted over the cost lengths on log axes."""

    name: str  # as typed: "luna:memory_len=32", "none", "my_package:MyAttention"
    id: str | None
    title: str
    paper: str
    checked_against: str
    options: dict[str, object]
    parameters: int
    score: dict[int, Estimate]
    examples_per_second: dict[int, Estimate]
    costs: tuple[Cost, ...]
    time_exponent: float | None
    memory_exponent: float | None
    flops_exponent: float | None
    crossover_length: int | None  # shortest measured length from which on it is faster than multi_head; None = not seen
    cannot: tuple[str, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True)
class AttentionPicture:
    """Attention weights of one trained candidate on one held-out example: (rows, columns) in 0..1, with what the axes are."""

    candidate: str
    caption: str
    weights: tuple[tuple[float, ...], ...]
    image: tuple[tuple[float, ...], ...] | None = None  # the input itself when it is a map, grey 0..1


@dataclass(frozen=True)
class Summary:
    """A whole comparison."""

    title: str
    command: str
    started: str  # ISO 8601, UTC
    seconds: float
    task: TaskFacts
    machine: Machine
    lengths: tuple[int, ...]
    cost_lengths: tuple[int, ...]
    seeds: tuple[int, ...]
    budget: str
    candidates: tuple[CandidateSummary, ...]
    trials: tuple[TrialResult, ...]
    pictures: tuple[AttentionPicture, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
