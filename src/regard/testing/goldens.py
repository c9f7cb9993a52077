"""Replay of golden files: outputs, gradients and running statistics of the authors' code, against ours.

A file is safetensors with string metadata `id`, `case`, `kwargs` (JSON), `mode`, `source`, `note` and tensors `state.*`, `input.*`, `output` or
`output.*`, `cotangent[.*]`, `grad.*`, `grad_state.*`, `after.*` or `state_after.*`; names after `state.`, `grad_state.` and these are the authors'.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .. import registry
from ..errors import RegardError, require
from ..official import load_official, naming_of, to_official

OUTPUT_BOUND, GRADIENT_BOUND = 2e-5, 1e-4
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Golden:
    """One file, read."""

    path: Path
    id: str
    case: str
    kwargs: dict[str, Any]
    mode: str
    note: str
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors named `prefix.*`, under what follows; one named `prefix` alone is called ""."""
        out = {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}
        return out | ({"": self.tensors[prefix]} if prefix in self.tensors else {})


@dataclass(frozen=True)
class Verdict:
    """What replaying one file gave: the largest error of each kind relative to the largest entry, or why it could not be replayed.

    `skipped`: the file is of a system around the mechanism, which nothing here is to be compared with; it is no failure and no proof.
    """

    path: str
    id: str
    case: str
    ok: bool
    outputs: float | None = None
    gradients: float | None = None
    statistics: float | None = None
    worst: str = ""
    error: str = ""
    skipped: bool = False


def find(paths: Iterable[str | Path]) -> list[Path]:
    """All golden files among files and folders, sorted."""
    found: list[Path] = []
    for path in map(Path, paths):
        require(path.exists(), "{} does not exist", path)
        files = sorted(path.rglob("*" + SUFFIX)) if path.is_dir() else [path]
        require(bool(files), "{} holds no {} file", path, SUFFIX)
        found += files
    return list(dict.fromkeys(found))


def read(path: Path) -> Golden:
    """Read one file.

    Raises:
        RegardError: it is not safetensors, or lacks the metadata of a golden file.
    """
    try:
        with safe_open(str(path), "pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise RegardError(f"{path} is not a readable safetensors file: {error}") from None
    missing = [name for name in ("id", "case", "kwargs", "mode") if name not in meta]
    require(not missing, "{} is no golden file: its metadata lacks {}", path, missing)
    return Golden(path, meta["id"], meta["case"], json.loads(meta["kwargs"]), meta["mode"], meta.get("note", ""), tensors)


def verify(paths: Iterable[str | Path]) -> Iterator[Verdict]:
    """Replay every golden file found under `paths`, one verdict each."""
    for path in find(paths):
        yield verify_file(path)


def verify_file(path: Path) -> Verdict:
    """Replay one file. Never raises for what is in the file: a file that does not apply is a verdict with `ok=False` and the reason."""
    ident, case = path.parent.name, path.name.removesuffix(SUFFIX)
    try:
        golden = read(path)
        ident, case = golden.id, golden.case
        if "component" in golden.kwargs:
            what = golden.kwargs["component"]
            return Verdict(str(path), ident, case, ok=True, skipped=True, error=f"{what!r} is a part of a system around {ident}")
        return _compare(golden)
    except Exception as error:  # any fault of a replay belongs in the table, beside the other files
        text = str(error) if isinstance(error, RegardError) else f"{type(error).__name__}: {error}"
        return Verdict(str(path), ident, case, ok=False, error=text.splitlines()[0] if text else type(error).__name__)


def _compare(golden: Golden) -> Verdict:
    module, call = _build(golden)
    inputs = {name: t.clone().requires_grad_(name in golden.group("grad")) for name, t in golden.group("input").items()}
    expected = golden.group("output")
    require(bool(expected), "{} holds no output", golden.path)
    actual = call(inputs, set(expected))
    missing = sorted(set(expected) - set(actual))
    require(not missing, "the module returned no {}; it returned {}", missing, sorted(actual))

    gradients: dict[str, tuple[Tensor, Tensor]] = {}
    cotangents = golden.group("cotangent")
    if not cotangents and golden.group("grad"):  # a loss: the gradient is that of what the function returns first
        cotangents = {next(iter(actual)): torch.ones(())}
    if cotangents:
        gradients = _gradients(golden, module, inputs, [(actual[n], c) for n, c in cotangents.items() if n in actual])
    statistics: dict[str, tuple[Tensor, Tensor]] = {}
    after = golden.group("after") or golden.group("state_after")
    if after:
        written = to_official(module, naming_of(module, after))
        statistics = {name: (written[name], t) for name, t in after.items()}

    outputs = {name: (actual[name], t) for name, t in expected.items()}
    errors = {"output": _errors(outputs), "grad": _errors(gradients), "after": _errors(statistics)}
    outer = registry.card(golden.id).bound(f"golden.{golden.case}", OUTPUT_BOUND, module)
    limits = {"output": outer, "grad": GRADIENT_BOUND, "after": outer}
    over = [(error / limits[kind], f"{kind}.{name}".rstrip("."), error) for kind, rows in errors.items() for name, error in rows.items()]
    worst = max(over)
    largest = {kind: max(rows.values()) if rows else None for kind, rows in errors.items()}
    return Verdict(
        str(golden.path),
        golden.id,
        golden.case,
        ok=worst[0] <= 1,
        outputs=largest["output"],
        gradients=largest["grad"],
        statistics=largest["after"],
        worst=worst[1],
        error="" if worst[0] <= 1 else f"{worst[1]} is off by {worst[2]:.1e} of its largest entry",
    )


def _build(golden: Golden) -> tuple[nn.Module, Any]:
    """The module under test with the file's state, and a call (inputs, wanted outputs) -> named outputs."""
    kwargs = dict(golden.kwargs)
    part, function = kwargs.pop("part", None), kwargs.pop("function", None)
    kind = registry.get(golden.id)
    if kwargs.pop("primitive", False):  # functions, one for each output, on those of the inputs and arguments that they take

        def call(inputs: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
            takes = {name: inspect.signature(kind.functions[name]).parameters for name in wanted}
            return {name: kind.functions[name](**{k: v for k, v in {**inputs, **kwargs}.items() if k in takes[name]}) for name in wanted}

        return nn.Module(), call
    if function is None and part is None and not golden.group("state"):
        function = _function_for(kind, {*golden.group("input"), *kwargs})
    if function is not None:
        require(function in kind.functions, "{} has no function {!r}; it has {}", golden.id, function, sorted(kind.functions))
        return nn.Module(), lambda inputs, wanted: _named(kind.functions[function](**inputs, **kwargs), (), wanted)
    if part is not None:
        require(part in kind.parts, "{} has no part {!r}; it has {}", golden.id, part, sorted(kind.parts))
        module: nn.Module = kind.parts[part](**kwargs)
    else:
        module = registry.create(golden.id, **{k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()})
    load_official(module, golden.group("state"))
    module.train(golden.mode == "train")
    names = getattr(module, "returns", kind.card.returns)
    flags = _flags(golden.note) if "mode" in inspect.signature(module.forward).parameters else {}
    return module, lambda inputs, wanted: _replay(module, {**inputs, **flags}, wanted, names)


def _function_for(kind: Any, names: set[str]) -> str | None:
    """The function of `kind` that takes all of `names`, for a file that has no state and none of the constructor's arguments."""
    if names & set(inspect.signature(kind).parameters):
        return None
    return next((name for name, function in kind.functions.items() if names <= set(inspect.signature(function).parameters)), None)


def _flags(note: str) -> dict[str, str]:
    """The mode in which a note says that the forward pass was run: `forward(..., mode="expected")`."""
    found = re.search(r'forward\(\.\.\., mode="(\w+)"', note)
    return {"mode": found[1]} if found else {}


def _replay(module: nn.Module, inputs: dict[str, Any], wanted: set[str], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Call the module, asking by `return_*` flags for what the file holds."""
    parameters = inspect.signature(module.forward).parameters
    inputs = dict(inputs)
    if "h0" in inputs and "state" in parameters:
        h, c = inputs.pop("h0"), inputs.pop("c0", None)
        inputs["state"] = h if c is None else (h, c)  # type: ignore[assignment]
    flags = {name: _flag(name) for name in names if _flag(name) in parameters}
    asked = {flag for flag in flags.values() if any(_flag(want) == flag for want in wanted)}
    result = module(**inputs, **dict.fromkeys(asked, True))
    present = tuple(name for name in names if name not in flags or flags[name] in asked)
    # What a file holds beside the outputs of the forward pass, a layout for example.
    beside = {name: function(module, **inputs) for name, function in getattr(module, "functions", {}).items() if name in wanted}
    return {**_named(result, present, wanted), **beside}


def _flag(name: str) -> str:
    """The keyword that asks for an output: "weights_a" and "weights" by return_weights, "gates.i" by return_gates."""
    return "return_" + name.split(".")[0].split("_")[0]


def _named(result: Any, names: tuple[str, ...], wanted: set[str]) -> dict[str, Tensor]:
    """Name the tensors of a nested result: dictionaries name their own, the others are named in order."""
    if isinstance(result, Tensor) and wanted == {""}:
        return {"": result}
    out: dict[str, Tensor] = {}
    order = iter(names)

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            out[next(order, f"output {len(out)}")] = value
        elif isinstance(value, Mapping):
            prefix = next(order, "")
            for key, item in value.items():
                out[f"{prefix}.{key}" if prefix else key] = item
        elif isinstance(value, tuple | list):
            for item in value:
                walk(item)
        elif isinstance(value, int | float):
            out[next(order, f"output {len(out)}")] = torch.tensor(value)

    walk(result)
    return {"": next(iter(out.values())), **out} if "" in wanted and out else out


def _gradients(golden: Golden, module: nn.Module, inputs: dict[str, Tensor], pairs: list[tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    module.zero_grad()
    loss = torch.stack([(actual * cotangent).sum() for actual, cotangent in pairs]).sum()
    loss.backward()
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for name, expected in golden.group("grad").items():
        gradient = inputs[name].grad
        out[name] = (torch.zeros_like(expected) if gradient is None else gradient, expected)
    known = golden.group("state")
    wanted = {name if name in known else name.removeprefix("p."): t for name, t in golden.group("grad_state").items()}
    if wanted:
        ours = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}
        buffers = {name: torch.zeros_like(b) for name, b in module.named_buffers()}
        theirs = to_official(module, naming_of(module, wanted), state={**buffers, **ours})
        out |= {f"state.{name}": (theirs[name], expected) for name, expected in wanted.items()}
    return out


def _errors(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Largest difference of each pair over the largest entry expected.

    What is zero in exact arithmetic is measured against the largest entry of all pairs: its own largest entry is rounding noise.
    """
    sizes = {name: expected.abs().max().item() if expected.numel() else 0.0 for name, (_, expected) in pairs.items()}
    overall = max(sizes.values(), default=0.0)
    out = {}
    for name, (actual, expected) in pairs.items():
        require(actual.shape == expected.shape, "{} has shape {}, the file has {}", name or "the output", tuple(actual.shape), tuple(expected.shape))
        size = sizes[name] if sizes[name] > 1e-6 * overall else overall
        difference = (actual.detach().double() - expected.double()).abs().max().item() if expected.numel() else 0.0
        out[name] = float("inf") if difference != difference else difference / size if size else difference
    return out
