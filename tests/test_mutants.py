"""The checks can fail: each mutant is caught by the check it names, and the correct modules pass them all."""

import pytest

from regard.testing import CHECKS, CheckFailed, check, resolve, run
from regard.testing.mutants import CORRECT, mutants

MUTANTS = mutants()


@pytest.mark.parametrize("target", MUTANTS)
def test_mutant_is_caught(target: str) -> None:
    name = MUTANTS[target].fails
    outcomes = [o for s in resolve(target) for o in run(s, [name])]
    assert [o.status for o in outcomes] == ["fail"]


@pytest.mark.parametrize("kind", CORRECT, ids=lambda kind: kind.__name__)
def test_correct_module_passes(kind: type) -> None:
    check(kind)


def test_every_check_has_a_mutant() -> None:
    assert sorted(set(CHECKS) - {kind.fails for kind in MUTANTS.values()}) == []


def test_check_lists_the_faults() -> None:
    with pytest.raises(CheckFailed, match="padding_invariance: 1 padded"):
        check("regard.testing.mutants.tokens:MasksValuesOnly", only=["padding_invariance"])
