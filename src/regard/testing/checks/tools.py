"""PyTorch's tools work on the module: compile, export, vmap, checkpoint, copies, files, devices, memory formats."""

import copy
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...errors import RegardError
from ...ops._dispatch import use_impl
from ..subject import Subject, tensors
from ..suite import NotApplicable, check, expect
from ._common import close, forward, gradients


@check(compiles=True)
def compiles_whole(subject: Subject) -> None:
    """torch.compile(fullgraph=True) traces forward and backward without a break, for free sizes too, and gives the same numbers."""
    for dynamic in (False, True):
        torch._dynamo.reset()
        module = subject.build()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        sizes = [subject.size()] if not dynamic else [subject.size(), _larger(subject.size())]
        for size in sizes:
            inputs = subject.inputs(size)
            out, found = gradients(module, inputs)
            out2, found2 = gradients(compiled, inputs)  # type: ignore[arg-type]
            close(out2, out, 1e-5, f"compiled output (dynamic={dynamic}, size {size})")
            for name, value in found.items():
                twin = found2.get(name, found2.get(name.replace("param.", "param._orig_mod.")))
                expect(twin is not None, "compiled, {} gets no gradient", name)
                assert twin is not None
                scale = max(v.abs().max().item() for v in found.values())
                off = (twin - value).abs().max().item()
                expect(off <= 1e-4 * scale, "compiled, the gradient of {} is off by {:.1e}", name, off)
    torch._dynamo.reset()


def _larger(size: Any) -> Any:
    return size + 8 if isinstance(size, int) else tuple(s + 4 for s in size)


@check(compiles=True)
def exports_with_free_sizes(subject: Subject) -> None:
    """torch.export takes the module with a free length (or height and width), and the program gives the same numbers at another size."""
    if subject.layout in ("pair", "structure"):
        raise NotApplicable("inputs of their own sizes")
    module, inputs = subject.build(), subject.inputs()
    auto = torch.export.Dim.AUTO
    axes = range(2, inputs[subject.main].ndim) if subject.layout == "map" else (1,)
    shapes: dict[str, Any] = {name: dict.fromkeys(axes, auto) for name in inputs}
    if "adjacency" in inputs:
        shapes["adjacency"] = {1: auto, 2: auto}
    program = torch.export.export(module, (), inputs, dynamic_shapes=shapes, strict=False)
    for size in (subject.size(), _larger(subject.size())):
        other = subject.inputs(size)
        with torch.no_grad():
            try:
                found = tensors(program.module()(**other))[0]
            except (AssertionError, RuntimeError) as error:
                expect(subject.lenient, "the exported program is bound to one size: {}", str(error).splitlines()[0])
                raise NotApplicable("an option binds the size") from None
            close(found, forward(module, other), 1e-5, f"exported program at size {size}")


@check()
def vmap_over_weights(subject: Subject) -> None:
    """torch.func.vmap over stacked weights runs an ensemble, equal to its members one by one."""
    members = [subject.build(seed=s) for s in (0, 1, 2)]
    if not members[0].state_dict():
        raise NotApplicable("has no weights")
    params, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    inputs = subject.inputs()
    base = copy.deepcopy(members[0]).to("meta")

    def one(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return tensors(torch.func.functional_call(base, (p, b), (), inputs))[0]

    with torch.no_grad(), warnings.catch_warnings():
        # Fused kernels have no batching rule and run member by member: slower, and as exact.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        together = torch.func.vmap(one, randomness="same")(params, buffers)
        close(together, torch.stack([forward(m, inputs) for m in members]), 1e-5, "vmap over weights")


@check()
def checkpointing_equals(subject: Subject) -> None:
    """Recomputing activations in the backward pass changes no gradient."""
    module, inputs = subject.build(), subject.inputs()
    _, plain = gradients(module, inputs)

    class Recomputed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, **kwargs: Any) -> Any:
            return checkpoint(self.inner, use_reentrant=False, **kwargs)

    _, again = gradients(Recomputed(), inputs)
    for name, value in plain.items():
        twin = again[name.replace("param.", "param.inner.")]
        scale = max(v.abs().max().item() for v in plain.values())
        expect((twin - value).abs().max().item() <= 1e-5 * scale, "checkpointing changes the gradient of {}", name)


@check()
def copies_and_pickles(subject: Subject) -> None:
    """deepcopy and pickle give a module with the same output."""
    module, inputs = subject.build(), subject.inputs()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = forward(module, inputs)
        close(forward(copy.deepcopy(module), inputs), expected, 0.0, "a deep copy")
        # The bytes were written four lines above by this process.
        close(forward(torch.load(buffer, weights_only=False), inputs), expected, 0.0, "a pickled copy")


@check()
def state_survives_a_file(subject: Subject) -> None:
    """The state dict through a safetensors file gives the same output in a fresh module."""
    module, inputs = subject.build(), subject.inputs()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_file({n: t.contiguous() for n, t in module.state_dict().items()}, path)
        other = subject.build(seed=9)
        other.load_state_dict(load_file(path))
    with torch.no_grad():
        close(forward(other, inputs), forward(module, inputs), 0.0, "the module read back")


@check()
def builds_on_meta(subject: Subject) -> None:
    """The module builds and runs on the meta device, so that models can be made before memory is taken."""
    with torch.device("meta"):
        module = subject.build(shuffle=False)
    strays = [n for n, t in module.state_dict().items() if t.device.type != "meta"]
    expect(not strays, "parameters made elsewhere than on the current device: {}", strays)
    inputs = {n: t.to("meta") for n, t in subject.inputs().items()}
    real = forward(subject.build(), subject.inputs())
    expect(forward(module, inputs).shape == real.shape, "the meta output has another shape than the real one")


@check(layouts=("map", "pair"))
def channels_last_is_the_same(subject: Subject) -> None:
    """channels_last inputs give the same numbers."""
    module, inputs = subject.build(), subject.inputs()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if inputs[subject.main].ndim not in formats:
        raise NotApplicable("no channels_last for this rank")
    last = {n: t.contiguous(memory_format=formats[t.ndim]) for n, t in inputs.items()}
    out, found = gradients(module, inputs)
    out2, found2 = gradients(module, last)
    close(out2, out, 1e-5, "channels_last output")
    close(found2[subject.main], found[subject.main], 1e-4, "channels_last gradient")


@check()
def strided_input_is_the_same(subject: Subject) -> None:
    """Non-contiguous inputs give the same numbers."""
    module, inputs = subject.build(), subject.inputs()
    strided = {n: torch.stack((t, t), -1)[..., 0] for n, t in inputs.items()}
    with torch.no_grad():
        close(forward(module, strided), forward(module, inputs), 1e-5, "a strided input")


@check()
def fast_paths_equal_the_reference(subject: Subject) -> None:
    """Every fast path equals the reference in value and gradient."""
    module = subject.build()
    large = 100 if subject.layout == "structure" else 300
    for size in (subject.size(), large if isinstance(subject.size(), int) else tuple(3 * s for s in subject.size())):  # type: ignore[union-attr]
        try:
            inputs = subject.inputs(size)
            out, found = gradients(module, inputs)
        except RegardError:
            continue
        with use_impl("reference"):
            out2, found2 = gradients(module, inputs)
        close(out, out2, 2e-5, f"fast path at size {size}")
        scale = max(v.abs().max().item() for v in found2.values())
        for name, value in found2.items():
            off = (found[name] - value).abs().max().item()
            expect(off <= 1e-4 * scale, "at size {} the fast gradient of {} is off by {:.1e} of {:.1e}", size, name, off, scale)
