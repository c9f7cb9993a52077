"""A comparison, checked and spelled out before any work: what is trained, on what, at which lengths."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RegardError, require
from . import candidates as candidates_module
from . import tasks
from .candidates import Candidate, Setting
from .config import Budget, CompareConfig, check, parse_budget
from .train import Trial, check_shapes


@dataclass(frozen=True)
class Plan:
    """A configuration with every choice made; what `compare` carries out."""

    config: CompareConfig
    task: tasks.Task
    options: dict[str, Any]
    host: str
    candidates: tuple[Candidate, ...]
    lengths: tuple[int, ...]
    cost_lengths: tuple[int, ...]
    budget: Budget
    batch: int
    learning_rate: float
    threads: int
    device: str

    @property
    def longest(self) -> int:
        return max(*self.lengths, *self.cost_lengths)

    def trial(self, candidate: Candidate, length: int) -> Trial:
        device = torch.device("cpu")
        return Trial(self.task, self.options, candidate, self.host, length, self.longest, 0, self.batch, self.learning_rate, device)

    def conditions(self) -> dict[str, Any]:
        """What must be the same for results to stand beside each other."""
        return {
            "task": self.task.name,
            "task options": {k: v for k, v in self.options.items() if k != "layout"},
            "host": self.host,
            "lengths": list(self.lengths),
            "budget": f"{self.budget.amount:g}{self.budget.unit}",
            "batch_size": self.batch,
            "learning_rate": self.learning_rate,
            "threads": self.threads,
            "device": self.device,
        }


def plan(config: CompareConfig) -> Plan:
    """Make every choice and check everything that can be checked before any work."""
    check(config)
    task, options = tasks.parse(config.task)
    members = tuple(candidates_module.parse(name) for name in config.candidates)
    host = _host(task, options, members)
    lengths = tuple(sorted(config.lengths or task.lengths[host]))
    if task.fixed:
        require(
            lengths == task.lengths[host],
            "lengths={}: the task {!r} has the length {} only; leave it out",
            lengths,
            task.name,
            task.lengths[host],
        )
    cost_lengths = tuple(sorted(config.cost_lengths or {n * 2**k for n in lengths for k in range(3) if n * 2**k <= 4 * max(lengths)}))
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    made = Plan(
        config=config,
        task=task,
        options=options,
        host=host,
        candidates=members,
        lengths=lengths,
        cost_lengths=cost_lengths,
        budget=parse_budget(config.budget),
        batch=config.batch_size or task.batch,
        learning_rate=config.learning_rate or task.learning_rate,
        threads=config.threads or torch.get_num_threads(),
        device=device,
    )
    for length in lengths:
        _check_length(made, length)
    for candidate in members:
        parameters(made, candidate)
    return made


def _check_length(made: Plan, length: int) -> None:
    """Build the data of generators whose rules depend on the length, the smallest possible."""
    small = {key: 1 for key in ("train", "test") if key in made.options}
    made.task.data(length, made.host, {**made.options, **small})


def _host(task: tasks.Task, options: dict[str, Any], members: Sequence[Candidate]) -> str:
    """The kind of host in which every candidate can sit."""
    asked = options.get("layout")
    kinds = {"map": "map", "sequence": "tokens", None: None}
    require(asked in kinds, "task {}: layout={!r} is unknown; use map or sequence", task.name, asked)
    possible = [kinds[asked]] if asked is not None else list(task.hosts)
    for host in possible:
        assert host is not None
        if all(candidate.fits(host) for candidate in members):
            return host
    for host in possible:
        assert host is not None
        wrong = [f"{c.name} ({c.card.layout})" for c in members if c.card is not None and not c.fits(host)]
        if len(wrong) < len(members) or len(possible) == 1 or host == possible[-1]:
            raise RegardError(
                f"task {task.name!r} puts candidates into a network over {'maps' if host == 'map' else 'tokens'}; "
                f"{', '.join(wrong)} cannot sit "
                f"there; these can: none, {', '.join(candidates_module.ids_that_fit(Setting(host, False, 4, 64)))}"
            )
    raise AssertionError("unreachable")


def parameters(made: Plan, candidate: Candidate) -> int:
    """Build the network once: a wrong option, a changed shape or a leak of the future shows here, before any training."""
    try:
        model: nn.Module = check_shapes(made.trial(candidate, made.lengths[0]))
    except RegardError as error:
        raise RegardError(f"candidate {candidate.name!r}: {error}") from error
    except Exception:
        # Not a wrong call but a module that fails; that is recorded with its reason, and the other candidates go on.
        return 0
    return sum(p.numel() for p in model.parameters())
