"""Samples of a batch are strangers to each other; a module leaves its input and its state alone."""

import torch

from ...errors import RegardError
from ..subject import Subject, tensors
from ..suite import check, expect
from ._common import close, forward, rows


@torch.no_grad()
def _first_of(subject: Subject, companions: int) -> torch.Tensor:
    mine, others = subject.inputs(batch=1, seed=1), subject.inputs(batch=3, seed=10 + companions)
    inputs = {name: torch.cat((mine[name], others[name][:companions])) for name in mine}
    return forward(subject.build(), inputs)[:1]


@check()
def same_sample_in_another_batch(subject: Subject) -> None:
    """A sample's output does not depend on what else is in the batch (softmax over the batch is the classic fault)."""
    alone = _first_of(subject, 0)
    for companions in (1, 3):
        close(_first_of(subject, companions), alone, 1e-5, f"first sample with {companions} companions")


@check()
def batch_permutation(subject: Subject) -> None:
    """Permuting the batch permutes the output."""
    module, inputs, order = subject.build(), subject.inputs(batch=4), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        close(forward(module, rows(inputs, order)), forward(module, inputs)[order], 1e-5, "permuted batch")


@check()
def empty_batch_stays_empty(subject: Subject) -> None:
    """A batch of none, as a loader's last shard may be, gives an output of none and gradients of zero."""
    module, inputs = subject.build().eval(), subject.inputs()
    whole = forward(module, inputs)
    empty = {name: t[:0].requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    out = forward(module, empty)
    expect(out.shape == (0, *whole.shape[1:]), "an empty batch gives {}, others {}", tuple(out.shape), tuple(whole.shape))
    if out.requires_grad:
        out.sum().backward()
    left = [name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.ne(0).any())]
    expect(not left, "an empty batch leaves gradients that are not zero, or not finite: {}", left)


@check()
def batch_of_one_in_training(subject: Subject) -> None:
    """Training with a batch of one works, or a RegardError says the way out."""
    for size in (subject.size(), 1 if isinstance(subject.size(), int) else tuple(1 for _ in subject.size())):  # type: ignore[union-attr]
        module, inputs = subject.build().train(), subject.inputs(size, batch=1)
        try:
            result = tensors(module(**inputs))[0]
        except RegardError as error:
            ways = ("eval()", "batch", "norm=", "size", "divisible", "multiple", "axis")
            expect(any(way in str(error) for way in ways), "a batch of one in training is refused without a way out: {}", error)
            continue
        expect(bool(result.isfinite().all()), "a batch of one in training gives values that are not finite")


@check()
def input_not_modified(subject: Subject) -> None:
    """The caller's tensors are left as they were, in eval and in training."""
    for training in (False, True):
        module, inputs = subject.build().train(training), subject.inputs()
        before = {name: t.clone() for name, t in inputs.items()}
        with torch.no_grad():
            module(**inputs)
        for name, t in inputs.items():
            expect(torch.equal(t, before[name]), "{} was changed in place in {} mode", name, "training" if training else "eval")


@check()
def eval_is_deterministic(subject: Subject) -> None:
    """In eval two calls give the same bits, and no parameter or buffer moves."""
    module, inputs = subject.build(), subject.inputs()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with torch.no_grad():
        first, second = forward(module, inputs), forward(module, inputs)
    expect(torch.equal(first, second), "two calls in eval differ by {:.1e}", (first - second).abs().max().item())
    moved = [name for name, t in module.state_dict().items() if not torch.equal(t, before[name])]
    expect(not moved, "state drifts in eval: {}", moved)


@check()
def training_is_reproducible(subject: Subject) -> None:
    """The same torch seed gives the same training step."""
    results = []
    for _ in range(2):
        module, inputs = subject.build().train(), subject.inputs(batch=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            results.append(forward(module, inputs).detach())
    expect(torch.equal(*results), "two training steps with one seed differ by {:.1e}", (results[0] - results[1]).abs().max().item())
