"""Costs, counted: the card's formula and growth exponents against torch's FLOP counter."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..subject import Inputs, Size, Subject
from ..suite import NotApplicable, check, expect


def count_flops(module: torch.nn.Module, inputs: Inputs) -> int:
    """Matrix-product FLOPs of one forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return counter.get_total_flops()


def sizes_of(subject: Subject, inputs: Inputs) -> dict[str, int]:
    """What B, N, M, H, W of a cost formula stand for. In a pair N and M are the positions of a and b."""
    x = inputs[subject.main]
    if subject.layout == "pair" and x.ndim == 3:
        return {"B": x.shape[0], "N": x.shape[1], "M": inputs[subject.names[1]].shape[1]}
    if subject.layout == "pair" and x.ndim == 5:  # sets of maps
        return {"B": x.shape[0], "N": x.shape[1], "M": inputs[subject.names[1]].shape[1], "C": x.shape[2]}
    if subject.layout in ("map", "pair"):
        n = x.shape[2:].numel()
        other = inputs["b"].shape[2:].numel() if "b" in inputs else n
        return {"B": x.shape[0], "N": n, "M": other, "H": x.shape[2], "W": x.shape[-1]}
    keys = inputs["context"].shape[1] if "context" in inputs else x.shape[1]
    return {"B": x.shape[0], "N": x.shape[1], "M": keys}


def size_of(subject: Subject, n: int) -> Size:
    """A size of n positions, a power of two from 2^8 up."""
    if subject.layout in ("map", "pair"):
        return {1: (n,), 2: (2**7, n // 2**7), 3: (2**4, 2**4, n // 2**8)}[subject.dims]
    return n


def on_meta(subject: Subject, size: Size) -> tuple[torch.nn.Module, Inputs]:
    """The module and inputs of this size without data, to be counted."""
    module = subject.build(shuffle=False).to("meta")
    small = subject.inputs(subject.size(), batch=2)
    grown: Inputs = {}
    base = subject.size()
    for name, t in small.items():
        if isinstance(base, tuple):
            assert isinstance(size, tuple)
            shape = (*t.shape[:2], *size) if t.ndim == len(size) + 2 else subject.inputs(size, batch=1)[name].shape
        else:
            assert isinstance(size, int)
            shape = tuple(size if s == base else s for s in t.shape)
        grown[name] = torch.empty(shape, device="meta", dtype=t.dtype)
    return module, grown


@check(needs_card=True)
def cost_formula_is_what_is_counted(subject: Subject) -> None:
    """The FLOPs formula on the card equals the counted FLOPs within 5 %."""
    card = subject.card
    assert card is not None
    module = subject.build()
    sizes: list[Size] = [{1: (40,), 2: (7, 9), 3: (3, 4, 5)}[subject.dims], {1: (96,), 2: (16, 16), 3: (4, 6, 8)}[subject.dims]]
    if subject.layout not in ("map", "pair"):
        sizes = [48, 96, 130 if subject.layout == "structure" else 700]  # its inputs are squares of that
    for size in sizes:
        inputs = subject.inputs(size)
        counted, stated = count_flops(module, inputs), card.cost(module, **sizes_of(subject, inputs))
        off = abs(stated - counted) / max(counted, 1)
        expect(off <= 0.05, "at size {} the card's formula gives {:.4g} FLOPs, {:.4g} were counted", size, stated, counted)


@check(needs_card=True)
def growth_is_what_is_counted(subject: Subject) -> None:
    """The counted FLOPs of the example grow with the exponents on the card; an option may bind what grows."""
    card = subject.card
    assert card is not None
    if subject.lenient:
        raise NotApplicable("growth is stated for the example")
    for axis, exponent in card.grows.items():
        expect(axis == "N", "growth in {!r} is declared; only N is measured", axis)
        counts = []
        for n in (2**14, 2**15):
            module, inputs = on_meta(subject, size_of(subject, n))
            counts.append(count_flops(module, inputs))
        measured = math.log2(counts[1] / counts[0])
        expect(abs(measured - exponent) <= 0.1, "the card says FLOPs grow as N^{:g}, counted is N^{:.2f}", exponent, measured)
