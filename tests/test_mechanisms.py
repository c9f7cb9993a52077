"""Every mechanism of the registry through every check that applies to it, and through its golden files."""

import json
from pathlib import Path

import pytest

import regard
from regard import registry
from regard.testing import CHECKS, Subject, run
from regard.testing.goldens import SUFFIX, verify_file
from regard.testing.subject import subjects_of

HERE = Path(__file__).parent
GOLDENS = sorted((HERE / "goldens").rglob("*" + SUFFIX))
PAIRS = [(s, name) for id in regard.ids() for s in subjects_of(id) for name, c in CHECKS.items() if c.applies(s)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("subject", "check"), PAIRS, ids=[f"{s.name}-{name}" for s, name in PAIRS])
def test_check(subject: Subject, check: str) -> None:
    (outcome,) = run(subject, [check])
    if outcome.status == "skip":
        pytest.skip(outcome.message)
    assert outcome.status == "pass", outcome.message


@pytest.mark.parametrize("path", GOLDENS, ids=[f"{p.parent.name}-{p.stem}" for p in GOLDENS])
def test_golden(path: Path) -> None:
    verdict = verify_file(path)
    assert verdict.ok and not verdict.skipped, verdict.error


def test_every_mechanism_has_a_golden() -> None:
    assert sorted(set(regard.ids()) - {p.parent.name for p in GOLDENS}) == []


@pytest.mark.parametrize("id", regard.ids())
def test_parameter_names_are_pinned(id: str) -> None:
    """A rename breaks users' checkpoints: it must be meant, and recorded by `python tests/pin_parameters.py`."""
    pinned = json.loads((HERE / "params" / f"{id}.json").read_text())
    module = registry.create(id, **registry.card(id).example)
    assert {name: list(t.shape) for name, t in module.state_dict().items()} == pinned


@pytest.mark.parametrize("id", regard.ids())
def test_card_is_complete(id: str) -> None:
    card = regard.card(id)
    assert card.id == id
    assert card.summary.endswith(".") and card.when.endswith(".") and card.source
    assert card.paper.title and card.paper.authors and card.paper.year > 1980
    assert card.checked_against != "reconstruction" or card.uncertain
    assert card.layout != "map" or card.place
    assert registry.family_of(id) == registry.get(id).__module__.split(".")[-2]
