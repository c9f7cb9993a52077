"""Order: causality, permutations, steps, weights."""

import inspect
import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ...errors import RegardError
from ...rows import attend_rows
from ..subject import Subject, tensors
from ..suite import NotApplicable, check, expect
from ._common import close, forward, gradients
from .cost import on_meta, size_of


def _causal(subject: Subject) -> torch.nn.Module:
    if "causal" in inspect.signature(subject.kind).parameters:
        subject = subject.with_options(causal=True)
    return subject.build()


@check(needs=("causal",), layouts=("sequence", "recurrent"))
def no_gradient_from_the_future(subject: Subject) -> None:
    """The causal form passes no gradient from output t to inputs after t."""
    module, x = _causal(subject), subject.inputs(11)["x"].requires_grad_()
    out = forward(module, {"x": x})
    for t in (0, 4, 9):
        (gradient,) = torch.autograd.grad(out[:, t].square().sum(), x, retain_graph=True)
        leak = gradient[:, t + 1 :].abs().max().item()
        own = gradient[:, : t + 1].abs().max().item()
        expect(
            leak <= subject.bound("no_gradient_from_the_future", 0.0, module) * own,
            "output {} depends on later inputs (gradient {:.1e} against {:.1e} from the past)",
            t,
            leak,
            own,
        )


@check(needs=("causal",), layouts=("sequence", "recurrent"))
def prefix_property(subject: Subject) -> None:
    """The causal form gives a prefix what it gives the whole: out(x)[:, :t] = out(x[:, :t])."""
    module, x = _causal(subject), subject.inputs(13)["x"]
    with torch.no_grad():
        whole = forward(module, {"x": x})
        for t in (1, 5, 12):
            close(forward(module, {"x": x[:, :t]}), whole[:, :t], subject.bound("prefix_property", 1e-5, module), f"prefix of {t}")


@check(needs=("step",))
def steps_equal_the_whole(subject: Subject) -> None:
    """Position by position gives what the whole sequence gives."""
    module: Any = _causal(subject)
    x = subject.inputs(9)["x"]
    with torch.no_grad():
        whole = forward(module, {"x": x})
        state, steps = module.init_state(x.shape[0]), []
        for t in range(x.shape[1]):
            out, state = module.step(x[:, t], state)[:2]
            steps.append(out)
        close(torch.stack(steps, 1), whole, subject.bound("steps_equal_the_whole", 1e-5, module), "step by step")


@check(needs=("permutation_equivariant",))
def permutation_equivariance(subject: Subject) -> None:
    """Permuting the positions permutes the output."""
    inputs, out, back = _permuted(subject)
    module = subject.build()
    with torch.no_grad():
        close(back(forward(module, out)), forward(module, inputs), 1e-5, "permuted positions")


@check(needs=("permutation_invariant",))
def permutation_invariance(subject: Subject) -> None:
    """Permuting the elements leaves the output as it is."""
    inputs, out, _ = _permuted(subject)
    module = subject.build()
    with torch.no_grad():
        close(forward(module, out), forward(module, inputs), 1e-5, "permuted elements")


def _permuted(subject: Subject):
    inputs, x = subject.inputs(), subject.inputs()["x"]
    generator = torch.Generator().manual_seed(4)
    if subject.layout == "map":
        order = torch.randperm(x.shape[2:].numel(), generator=generator)
        shape = x.shape[2:]
        return inputs, {"x": x.flatten(2)[:, :, order].unflatten(2, shape)}, lambda y: y.flatten(2)[:, :, order.argsort()].unflatten(2, shape)
    order = torch.randperm(x.shape[1], generator=generator)
    moved = {"x": x[:, order]}
    if "adjacency" in inputs:
        moved["adjacency"] = inputs["adjacency"][:, order][:, :, order]
    return inputs, moved, lambda y: y[:, order.argsort()]


@check(needs=("cross",), layouts=("sequence", "set"))
def cross_attention(subject: Subject) -> None:
    """Queries and keys may differ in number; the output follows the queries, and depends on both."""
    module = subject.build()
    width = getattr(module, "context_dim", subject.width)
    for m in (1, 5, 17):
        x = subject.inputs()["x"]
        context = torch.randn(2, m, width, generator=torch.Generator().manual_seed(m))
        out, found = gradients(module, {"x": x, "context": context})
        expect(out.shape[:2] == x.shape[:2], "{} queries and {} keys give an output of {}", x.shape[1], m, tuple(out.shape))
        expect("context" in found and found["context"].abs().max().item() > 0, "the output does not depend on the context")
        if m > 1:
            expect(found["x"].abs().max().item() > 0, "the output does not depend on the queries")


@check(needs=("weights",))
def weights_come_beside_the_same_output(subject: Subject) -> None:
    """return_weights=True changes nothing but adds the weights."""
    module, inputs = subject.build(), subject.inputs()
    with torch.no_grad():
        plain, both = module(**inputs), module(**inputs, return_weights=True)
    expect(isinstance(both, tuple), "return_weights=True gave {} instead of (output, weights)", type(both).__name__)
    close(tensors(both)[0], tensors(plain)[0], 1e-5, "the output beside its weights")
    expect(len(tensors(both)) > len(tensors(plain)), "return_weights=True returned no weights")


@check(needs=("row_stochastic", "weights"))
def weights_sum_to_one(subject: Subject) -> None:
    """The weights are non-negative and sum to one over the last axis."""
    module = subject.build()
    with torch.no_grad():
        plain = len(tensors(module(**subject.inputs())))
        found = tensors(module(**subject.inputs(), return_weights=True))[plain:]
    if not found:
        raise NotApplicable("these options have no weights")
    for weights in found:
        expect(weights.min().item() >= 0, "a weight is {:.1e}", weights.min().item())
        off = (weights.sum(-1) - 1).abs().max().item()
        expect(off < 1e-4, "a row of weights misses the sum of 1 by {:.1e}", off)


@check(needs=("weights", "rows"))
def chosen_rows_are_those_of_the_weights(subject: Subject) -> None:
    """attend_rows gives the rows of the weights, under masks too."""
    module: Any = subject.build()
    inputs = subject.inputs()
    if "key_mask" in subject.can:
        inputs["key_mask"] = torch.arange(inputs["x"].shape[1]) < torch.tensor([[9], [inputs["x"].shape[1]]])
    chosen = torch.tensor([5, 0, 7])
    with torch.no_grad():
        plain = len(tensors(module(**inputs)))
        whole = tensors(module(**inputs, return_weights=True))[plain]
        close(attend_rows(module, queries=chosen, **inputs), whole[..., chosen, :], 1e-5, "rows 5, 0 and 7 of the weights")


@check(needs=("rows",))
def rows_cost_is_linear(subject: Subject) -> None:
    """The counted FLOPs of three rows of weights grow no faster than the number of keys, and no buffer holds all pairs."""
    counts = []
    module: Any
    for n in (2**13, 2**14):
        module, inputs = on_meta(subject, size_of(subject, n))
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter, LargestBuffer() as largest:
                attend_rows(module, queries=[5, 0, 7], **inputs)
        except RegardError as error:
            expect(subject.lenient, "{} positions are refused: {}", n, error)
            raise NotApplicable(f"an option bounds the size: {error}") from None
        counts.append(counter.get_total_flops())
        expect(largest.elements < n * n / 8, "three rows for {} positions make a buffer of {} elements", n, largest.elements)
    growth = math.log2(max(counts[1], 1) / max(counts[0], 1))
    expect(growth <= 1.1, "three rows cost as N^{:.2f}", growth)


class LargestBuffer(TorchDispatchMode):
    """Watches how many elements the largest result of any operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tensors(result))])
        return result


_PROJECTIONS = (("q_proj", "k_proj", "v_proj", "out_proj"), ("queries", "keys", "values", "reprojection"), ("q", "k", "v", "out"))


@check(needs=("qkv_core",))
def core_is_what_the_module_computes(subject: Subject) -> None:
    """attend(q, k, v) turns the module's queries, keys and values into what its output projection gets; a mask hides keys from it."""
    module: Any = subject.build()
    names = next((names for names in _PROJECTIONS if all(isinstance(getattr(module, n, None), torch.nn.Linear) for n in names)), None)
    seen: dict[str, torch.Tensor] = {}
    if names is not None:
        for name in names[:3]:
            getattr(module, name).register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out))
        getattr(module, names[3]).register_forward_hook(lambda _, args, out: seen.__setitem__("merged", args[0]))
    with torch.no_grad():
        torch.manual_seed(0)
        module(**subject.inputs())
        turned = any(getattr(module, option, None) for option in ("rope", "qk_norm", "normalize_qk", "rel_pos_bias", "alibi"))
        if names is not None and len(seen) == 4 and not turned:
            q, k, v = (_heads(seen[name], module) for name in names[:3])
            torch.manual_seed(0)
            close(module.attend(q, k, v).transpose(1, 2).flatten(2), seen["merged"], 1e-5, "attend(q, k, v)")
        else:
            width = getattr(module, "head_dim", 8)
            q, k, v = torch.randn(3, 2, getattr(module, "num_heads", 2), subject.inputs()["x"].shape[1], width).unbind()
        out = module.attend(q, k, v)
        expect(out.shape == (*q.shape[:3], v.shape[3]), "attend gave {} for queries {} and values {}", *(tuple(t.shape) for t in (out, q, v)))
        if "key_mask" in subject.can:
            real = torch.arange(k.shape[2]) < k.shape[2] - 3
            changed = [torch.where(real[:, None], t, 1e2 * torch.ones_like(t)) for t in (k, v)]
            torch.manual_seed(0)
            one = module.attend(q, k, v, key_mask=real.expand(len(q), -1))[:, :, real]
            torch.manual_seed(0)
            two = module.attend(q, *changed, key_mask=real.expand(len(q), -1))[:, :, real]
            close(two, one, 1e-5, "attend after masked keys and values were changed")


def _heads(t: torch.Tensor, module: Any) -> torch.Tensor:
    return t.unflatten(-1, (getattr(module, "num_heads", 1), -1)).transpose(1, 2)


@check(needs=("identity_start",))
def starts_as_identity(subject: Subject) -> None:
    """A fresh module, made with init="identity" where there is that option, returns its input bit for bit, and can leave it."""
    if "init" in inspect.signature(subject.kind).parameters:
        subject = subject.with_options(init="identity")
    module, inputs = subject.build(shuffle=False), subject.inputs()
    x = inputs[subject.main]
    for mode in ("eval", "training"):
        with torch.no_grad():
            out = forward(module.train(mode == "training"), inputs)
        expect(torch.equal(out, x), "a fresh module in {} mode changes its input by up to {:.1e}", mode, (out - x).abs().max().item())
    (forward(module, inputs) * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
    moves = any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    expect(moves, "at its start no parameter gets a gradient: it would stay the identity")


@check(needs=("gate",), layouts=("map",))
def gate_alone_equals_the_module(subject: Subject) -> None:
    """x * gate(x) is the module, so that the gate can be fused into a residual addition."""
    module: Any = subject.build()
    inputs = subject.inputs()
    with torch.no_grad():
        close(inputs["x"] * module.gate(inputs["x"]), forward(module, inputs), 1e-5, "x * gate(x)")
