"""Numbers: sizes, magnitudes, precisions, gradients."""

import math
from typing import Any

import torch

from ...errors import RegardError
from ..subject import Size, Subject, tensors
from ..suite import NotApplicable, check, expect
from ._common import close, forward, gradients


def _sizes(subject: Subject) -> list[Size]:
    if subject.layout in ("map", "pair"):
        return {1: [(1,), (2,), (13,), (31,)], 2: [(1, 1), (5, 3), (7, 11), (13, 8), (1, 6)], 3: [(1, 1, 1), (3, 2, 5)]}[subject.dims]
    return [1, 2, 7, 13, 31, 67]


@check()
def any_size(subject: Subject) -> None:
    """Prime, odd, non-square and tiny sizes work, forward and backward."""
    module = subject.build()
    for size in _sizes(subject):
        try:
            out, found = gradients(module, subject.inputs(size))
        except RegardError as error:
            expect(subject.lenient, "size {} is refused: {}", size, error)
            continue
        expect(bool(out.isfinite().all()), "size {} gives values that are not finite", size)
        bad = [name for name, value in found.items() if not value.isfinite().all()]
        expect(not bad, "size {} gives gradients that are not finite: {}", size, bad)


@check()
def constant_input_is_finite(subject: Subject) -> None:
    """An input of zeros and one of ones give finite values and gradients."""
    for value in (0.0, 1.0):
        inputs = {n: torch.full_like(t, value) if n in subject.operands else t for n, t in subject.inputs().items()}
        out, found = gradients(subject.build(), inputs)
        bad = [name for name, gradient in found.items() if not gradient.isfinite().all()]
        expect(bool(out.isfinite().all()) and not bad, "a constant input of {:g} gives values or gradients that are not finite {}", value, bad)


@check()
def finite_at_a_thousand(subject: Subject) -> None:
    """No overflow, no NaN at |x| = 1000, forward and backward."""
    out, found = gradients(subject.build(), subject.inputs(scale=1e3))
    expect(bool(out.isfinite().all()), "inputs of size 1000 give values that are not finite")
    bad = [name for name, value in found.items() if not value.isfinite().all()]
    expect(not bad, "inputs of size 1000 give gradients that are not finite: {}", bad)


@check()
def gradcheck_in_float64(subject: Subject) -> None:
    """The gradients are those of the function, by finite differences in float64."""
    module = subject.build().double()
    if subject.bound("gradcheck_in_float64", 0.0, module) > 0:
        raise NotApplicable("by its definition no gradient flows through a part of the function")
    size = {1: (5,), 2: (3, 4), 3: (2, 2, 3)}[subject.dims] if subject.layout in ("map", "pair") else 4
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in subject.inputs(size, batch=2).items()}
    leaves = list(subject.operands)

    def function(*values: torch.Tensor) -> torch.Tensor:
        return forward(module, {**inputs, **dict(zip(leaves, values, strict=True))})

    values = [inputs[n].requires_grad_() for n in leaves]
    try:
        function(*values)
    except RegardError as error:
        raise NotApplicable(f"refuses so small a size: {error}") from None
    ok = torch.autograd.gradcheck(function, values, fast_mode=True, raise_exception=False, atol=1e-6)
    expect(ok, "the gradient of the input is not the derivative of the output")
    names = [name for name, _ in module.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]
    if not parameters:
        return

    def of_parameters(*values: torch.Tensor) -> torch.Tensor:
        plain = {n: t.detach() for n, t in inputs.items()}
        return tensors(torch.func.functional_call(module, dict(zip(names, values, strict=True)), (), plain))[0]

    ok = torch.autograd.gradcheck(of_parameters, parameters, fast_mode=True, raise_exception=False, atol=1e-6)
    expect(ok, "the gradient of the parameters is not the derivative of the output")


@check()
def float64_agrees(subject: Subject) -> None:
    """float32 gives what float64 gives."""
    module, inputs = subject.build(), subject.inputs()
    with torch.no_grad():
        single = forward(module, inputs)
        double = forward(module.double(), {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
    expect(double.dtype == torch.float64, "a float64 module on a float64 input returns {}", double.dtype)
    close(single, double, 2e-5, "float32 against float64")


@check()
def bfloat16_is_close(subject: Subject) -> None:
    """bfloat16 is finite, close to float32, and stays bfloat16."""
    module, inputs = subject.build(), subject.inputs()
    with torch.no_grad():
        exact = forward(module, inputs)
        half = forward(module.bfloat16(), {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()})
    expect(half.dtype == torch.bfloat16, "a bfloat16 module on a bfloat16 input returns {}", half.dtype)
    close(half.float(), exact, subject.bound("bfloat16_is_close", 6e-2, module), "bfloat16 against float32")


@check()
def autocast_trains(subject: Subject) -> None:
    """Under autocast to bfloat16 forward and backward run and stay close."""
    module, inputs = subject.build(), subject.inputs()
    exact = forward(module, inputs).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = forward(module, inputs)
    if out.requires_grad:  # without parameters there is nothing to train
        out.float().square().mean().backward()
    close(out.detach().float(), exact, subject.bound("autocast_trains", 6e-2, module), "autocast against float32")
    bad = [n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    expect(not bad, "autocast gives gradients that are not finite: {}", bad)


@check()
def parameters_are_registered_and_learn(subject: Subject) -> None:
    """Every parameter is registered and gets a gradient, and every weight matrix a gradient that is not zero."""
    module = subject.build().train()
    hidden = _unregistered(module)
    expect(not hidden, "parameters kept where .parameters() cannot see them: {}", hidden)
    inputs = subject.inputs(batch=3)
    if "cross" in subject.can:  # some parameters speak only where the context is another sequence
        inputs["context"] = torch.randn(3, 7, getattr(module, "context_dim", subject.width), generator=torch.Generator().manual_seed(2))
    _, found = gradients(module, inputs)
    learning = {name for name, p in module.named_parameters() if p.requires_grad}
    without = sorted(name for name in learning if f"param.{name}" not in found)
    expect(not without, "parameters without a gradient: {}", without)
    largest = max((value.abs().max().item() for name, value in found.items() if name.startswith("param.")), default=0.0)
    dead = [n for n, p in module.named_parameters() if n in learning and p.ndim > 1 and found[f"param.{n}"].abs().max().item() <= 1e-9 * largest]
    expect(not dead, "weights whose gradient is zero, so that they do nothing: {}", dead)


def _unregistered(module: torch.nn.Module) -> list[str]:
    """Attributes that hold parameters or modules in plain lists, tuples or dictionaries."""

    def hides(value: Any) -> bool:
        if isinstance(value, torch.nn.Parameter | torch.nn.Module):
            return True
        if isinstance(value, torch.Tensor):
            return value.requires_grad
        if isinstance(value, list | tuple | set):
            return any(hides(item) for item in value)
        return isinstance(value, dict) and any(hides(item) for item in value.values())

    found = []
    for name, child in module.named_modules():
        own = {key: value for key, value in vars(child).items() if key not in ("_parameters", "_buffers", "_modules")}
        found += [f"{name}.{key}".lstrip(".") for key, value in own.items() if hides(value)]
    return found


@check()
def heads_and_groups_matter(subject: Subject) -> None:
    """With the same weights, another number of heads or groups gives another result."""
    tried = False
    for option in ("num_heads", "groups", "num_groups", "up_group"):
        if not isinstance(subject.options.get(option), int):
            continue
        base = subject.build()
        for other in (1, 2, 4, 3):
            if other == subject.options[option]:
                continue
            try:
                changed = subject.with_options(**{option: other}).build()
            except RegardError:
                continue
            shapes = {n: p.shape for n, p in changed.state_dict().items()}
            if shapes != {n: p.shape for n, p in base.state_dict().items()}:
                continue
            changed.load_state_dict(base.state_dict())
            tried = True
            with torch.no_grad():
                a, b = forward(base, subject.inputs()), forward(changed, subject.inputs())
            expect(
                a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-6),
                "{}={} gives what {} gives: it has no effect",
                option,
                other,
                subject.options[option],
            )
            break
    if not tried:
        raise NotApplicable("no number of heads or groups that keeps the parameters' shapes")


@check()
def queries_matter(subject: Subject) -> None:
    """A position's output depends on what stands at other positions, and on what asks: no constant map, no plain mean."""
    module = subject.build()
    inputs = subject.inputs()
    x = inputs[subject.main].clone().requires_grad_()
    if "permutation_invariant" in subject.can:
        raise NotApplicable("pools to a fixed number of vectors")
    if "elementwise" in subject.can:
        raise NotApplicable("scales its input, and asks nothing")
    second = subject.operands[-1]
    other = inputs[second].requires_grad_() if second != subject.main else x
    out = forward(module, {**inputs, subject.main: x})
    if out.ndim < x.ndim:
        raise NotApplicable("pools to a vector")
    index = (0, 0) if subject.channel_axis(x) > 1 else (0, slice(None), *(0 for _ in range(x.ndim - 2)))
    if "causal" in subject.can:
        index = (0, -1)
    gradient, elsewhere = torch.autograd.grad(out[index].square().sum(), (x, other))
    own = gradient[index].abs().sum().item()
    rest = elsewhere[0].abs().sum().item() - (own if other is x else 0.0)
    expect(rest > 1e-7 * max(own, 1e-12), "an output position depends on no other position")
    expect(math.isfinite(own), "the gradient is not finite")
    if "weights" in subject.can and "row_stochastic" in subject.can:
        plain = len(tensors(module(**inputs)))
        for weights in tensors(module(**inputs, return_weights=True))[plain:]:
            if weights.ndim >= 3 and weights.shape[-2] > 1:
                spread = (weights - weights.mean(-2, keepdim=True)).abs().max().item()
                expect(spread > 1e-6, "all queries have the same weights: the queries are ignored")
