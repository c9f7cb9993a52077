"""Masks: True = may be attended; what is masked has no value, no gradient, no weight."""

import torch
from torch import Tensor

from ..subject import Inputs, Subject, tensors
from ..suite import NotApplicable, check, expect
from ._common import close, forward, gradients


def _masked(subject: Subject, *, padding: int, fill: float) -> tuple[str, Inputs, Inputs, int]:
    """The mask's name, inputs of n elements, and the same with `padding` more that hold `fill` times noise and are masked."""
    name = subject.mask_name()
    if name is None:
        raise NotApplicable("takes no mask")
    n = subject.size()
    assert isinstance(n, int)
    short = subject.inputs(n)
    noise = subject.inputs(n + padding, seed=77)
    long: Inputs = {}
    for key, value in noise.items():
        long[key] = fill * value if key == subject.hidden else value.clone()
        index = tuple(slice(0, size) for size in short[key].shape)
        long[key][index] = short[key]
        if key == "adjacency":  # edges to padded nodes must not matter
            long[key][:, n:, :] = long[key][:, :, n:] = 1.0
    mask = torch.zeros(2, n + padding, dtype=torch.bool)
    mask[:, :n] = True
    return name, short, {**long, name: mask}, n


def _valid(out: Tensor, n: int, padded: int) -> Tensor:
    """The rows of real elements; a pooled output has no such rows and is compared whole."""
    return out[:, :n] if out.shape[1] == padded else out


@check(needs=("key_mask",), layouts=("sequence", "set"))
def padding_invariance(subject: Subject) -> None:
    """A padded and masked batch gives what the sequences give alone."""
    _padding(subject)


@check(needs=("mask",))
def padding_invariance_of_elements(subject: Subject) -> None:
    """A padded and masked set or sequence gives what it gives alone."""
    _padding(subject)


@check(layouts=("graph",))
def padding_invariance_of_nodes(subject: Subject) -> None:
    """A padded and masked graph gives what it gives alone."""
    _padding(subject)


def _padding(subject: Subject) -> None:
    module = subject.build()
    for padding, fill in ((1, 1.0), (5, 1.0), (3, 100.0)):
        _, short, long, n = _masked(subject, padding=padding, fill=fill)
        with torch.no_grad():
            close(_valid(forward(module, long), n, n + padding), forward(module, short), 1e-5, f"{padding} padded elements of size {fill:g}")


@check()
def masked_elements_are_silent(subject: Subject) -> None:
    """No value and no gradient passes from masked elements to real ones."""
    name, _, long, n = _masked(subject, padding=4, fill=1.0)
    module = subject.build()
    x = long[subject.hidden].clone().requires_grad_()
    out = _valid(forward(module, {**long, subject.hidden: x}), n, n + 4)
    out.square().sum().backward()
    assert x.grad is not None
    leak = x.grad[:, n:].abs().max().item()
    expect(leak == 0, "the gradient of real outputs reaches masked elements ({:.1e}): {} is ignored somewhere", leak, name)
    changed = long[subject.hidden].clone()
    changed[:, n:] = 1e4
    with torch.no_grad():
        close(_valid(forward(module, {**long, subject.hidden: changed}), n, n + 4), out, 1e-5, "real outputs after masked elements were set to 1e4")


@check()
def full_mask_changes_nothing(subject: Subject) -> None:
    """A mask that is True everywhere equals no mask, and masking one element changes something: True = may be attended."""
    name = subject.mask_name()
    if name is None:
        raise NotApplicable("takes no mask")
    module, inputs = subject.build(), subject.inputs()
    mask = torch.ones(2, inputs[subject.hidden].shape[1], dtype=torch.bool)
    with torch.no_grad():
        plain, full = forward(module, inputs), forward(module, {**inputs, name: mask})
        close(full, plain, 1e-5, f"{name} True everywhere")
        one = mask.clone()
        one[:, 0] = False
        less = forward(module, {**inputs, name: one})
        rest = slice(1, None) if less.shape[1] == mask.shape[1] else slice(None)
        moved = (less - plain)[:, rest].abs().max().item()
    expect(moved > 1e-6, "masking element 0 changes nothing for the others: {} is ignored, or inverted", name)


@check()
def fully_masked_is_finite(subject: Subject) -> None:
    """A sample whose mask is False everywhere gives finite values and finite gradients."""
    name = subject.mask_name()
    if name is None:
        raise NotApplicable("takes no mask")
    inputs = subject.inputs()
    mask = torch.ones(2, inputs[subject.hidden].shape[1], dtype=torch.bool)
    mask[0] = False
    out, found = gradients(subject.build(), {**inputs, name: mask})
    expect(bool(out.isfinite().all()), "a fully masked sample gives values that are not finite")
    bad = [key for key, value in found.items() if not value.isfinite().all()]
    expect(not bad, "a fully masked sample gives gradients that are not finite: {}", bad)


@check(needs=("attn_mask",), layouts=("sequence",))
def attn_mask_hides_pairs(subject: Subject) -> None:
    """attn_mask[i, j] = False takes key j from query i alone, and an empty row is finite."""
    module, inputs = subject.build(), subject.inputs()
    n = inputs["x"].shape[1]
    mask = torch.ones(n, n, dtype=torch.bool)
    mask[3, 1] = False
    with torch.no_grad():
        plain, hidden = forward(module, inputs), forward(module, inputs, attn_mask=mask)
        moved = (hidden - plain).abs().amax((0, 2))
    expect(moved[3].item() > 1e-6, "hiding key 1 from query 3 does not change query 3")
    expect(bool((moved[torch.arange(n) != 3] < 1e-5).all()), "hiding key 1 from query 3 changes other queries")
    mask[2] = False
    x = inputs["x"].clone().requires_grad_()
    out = forward(module, {"x": x}, attn_mask=mask)
    out.sum().backward()
    assert x.grad is not None
    expect(bool(out.isfinite().all() and x.grad.isfinite().all()), "a query with no allowed key gives values or gradients that are not finite")


@check(needs=("weights", "key_mask"), layouts=("sequence", "set"))
def masked_keys_weigh_nothing(subject: Subject) -> None:
    """The returned weights of masked keys are zero."""
    _, _, long, n = _masked(subject, padding=3, fill=1.0)
    with torch.no_grad():
        weights = [t for t in tensors(subject.build()(**long, return_weights=True)) if t.ndim > 2][-1]
    if weights.shape[-1] != n + 3:
        raise NotApplicable("the weights are not over the keys")
    worst = weights[..., n:].abs().max().item()
    expect(worst == 0, "masked keys have weights up to {:.1e}", worst)
