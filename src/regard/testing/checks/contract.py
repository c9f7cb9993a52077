"""The contract with the caller: wrong calls are answered, options are documented, authors' names go both ways."""

import inspect
import re

import torch

from ... import registry
from ...errors import RegardError
from ...mechanism import Mechanism
from ...official import load_official, to_official
from ..subject import Inputs, Subject
from ..suite import NotApplicable, check, expect
from ._common import close, forward


def _refused(subject: Subject, inputs: Inputs, what: str, *mentions: object) -> None:
    module = subject.build()
    answers: tuple[type[Exception], ...] = (RegardError,) if subject.card else (ValueError, TypeError)
    try:
        with torch.no_grad():
            module(**inputs)
    except answers as error:
        absent = [str(m) for m in mentions if str(m) not in str(error)]
        expect(not absent, "{} is refused without naming {}: {}", what, absent, error)
        return
    except Exception as error:
        expect(False, "{} ends in {} from the depths instead of a RegardError: {}", what, type(error).__name__, str(error).splitlines()[0])
    expect(False, "{} is accepted", what)


@check()
def wrong_calls_are_answered(subject: Subject) -> None:
    """A wrong rank, width or kind of input raises RegardError naming the value."""
    name, inputs = subject.main, subject.inputs()
    x = inputs[name]
    _refused(subject, {**inputs, name: x[0]}, f"{name} without its batch axis", name)
    wide = subject.channel_axis(x)
    wider = torch.cat((x, x.narrow(wide, 0, 1)), wide)
    _refused(subject, {**inputs, name: wider}, f"{name} one channel too wide", name, x.shape[wide] + 1, x.shape[wide])
    _refused(subject, {**inputs, name: x.long()}, f"an integer {name}", name, "int64")


@check()
def wrong_masks_are_answered(subject: Subject) -> None:
    """A mask that is not boolean, or of the wrong shape, raises RegardError."""
    name = subject.mask_name()
    if name is None:
        raise NotApplicable("takes no mask")
    inputs = subject.inputs()
    n = inputs[subject.hidden].shape[1]
    _refused(subject, {**inputs, name: torch.ones(2, n)}, f"a float {name}", name, "float32")
    _refused(subject, {**inputs, name: torch.ones(2, n, dtype=torch.long)}, f"an integer {name}", name, "int64")
    _refused(subject, {**inputs, name: torch.ones(2, n + 1, dtype=torch.bool)}, f"a {name} one element too long", name, n + 1)


@check(needs_card=True)
def wrong_options_are_answered(subject: Subject) -> None:
    """An unknown option is a RegardError that lists the options; a number of heads that does not divide the width, or is zero, is one too."""
    card = subject.card
    assert card is not None
    if card.id in registry.ids():
        try:
            registry.create(card.id, **{**card.example, "no_such_option": 1})
        except RegardError as error:
            expect("no_such_option" in str(error), "an unknown option is refused without being named: {}", error)
        else:
            expect(False, "an unknown option is accepted")
    if subject.lenient:
        return  # a variant may set the option that another one overrides
    for option in ("num_heads", "reduction", "block_size", "stride", "num_inducing", "num_seeds", "scale_factor", "kernel_size"):
        if option in inspect.signature(subject.kind).parameters:
            for value in (0, -1):
                try:
                    subject.build(shuffle=False, **{option: value})
                except RegardError as error:
                    expect(option in str(error), "{}={} is refused without naming it: {}", option, value, error)
                except Exception as error:
                    expect(False, "{}={} ends in {}: {}", option, value, type(error).__name__, str(error).splitlines()[0])
                else:
                    expect(False, "{}={} is accepted", option, value)


@check(needs_card=True)
def options_are_documented_and_shown(subject: Subject) -> None:
    """Every constructor option stands in the class's docstring and in `print(module)`."""
    parameters = [p for p in inspect.signature(subject.kind.__init__).parameters if p not in ("self", "device", "dtype")]  # type: ignore[misc]
    text = inspect.getdoc(subject.kind) or ""
    silent = [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    expect(not silent, "options without a word in the docstring: {}", silent)
    module = subject.build()
    hidden = [p for p in parameters if not hasattr(module, p)]
    expect(not hidden, "options that the module does not keep as attributes: {}", hidden)


@check(needs_card=True)
def official_names_round_trip(subject: Subject) -> None:
    """Written under each of its authors' namings and loaded back, a module gives the same bits; a missing key is named and nothing is loaded."""
    module, inputs = subject.build(), subject.inputs()
    assert isinstance(module, Mechanism)
    written = 0
    with torch.no_grad():
        expected = forward(module, inputs)
    for naming in [keymap.name for keymap in module.key_maps()]:
        try:
            state = to_official(module, naming)
        except RegardError:
            continue  # these options have no such checkpoint
        written += 1
        other = load_official(subject.build(seed=5), state)
        with torch.no_grad():
            bound = subject.bound("official_names_round_trip", 0.0, module)
            close(forward(other, inputs), expected, bound, f"through the naming {naming!r}")
    expect(written > 0 or not module.key_maps(), "none of the namings {} can be written with these options", [k.name for k in module.key_maps()])
    state = to_official(module)
    needed = [name for name in state if not name.endswith("num_batches_tracked")]
    if needed:
        lost = needed[0]
        other = subject.build(seed=6)
        before = {n: t.clone() for n, t in other.state_dict().items()}
        try:
            load_official(other, {**{n: t for n, t in state.items() if n != lost}, "stray.weight": torch.zeros(1)})
        except RegardError as error:
            expect("stray.weight" in str(error), "an unknown key is not named: {}", error)
        else:
            expect(False, "a state with an unknown key is accepted")
        expect(all(torch.equal(t, before[n]) for n, t in other.state_dict().items()), "a refused state was loaded by halves")
