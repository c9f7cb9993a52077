"""The pages keep their promises: what they show runs, and what is made from the cards is up to date."""

import doctest
import inspect
import re
import runpy
from pathlib import Path

import pytest

import regard
from regard import registry

ROOT = Path(__file__).parents[1]


def test_tour_runs() -> None:
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted > 8
    assert results.failed == 0


def test_table_is_up_to_date() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    text = (ROOT / "README.md").read_text()
    assert text == module["updated"](text), "run: python docs/tables.py"


def test_the_choice_promises_what_the_cards_claim() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "choosing.py"))
    assert module["unmet"]() == []
    assert (ROOT / "docs" / "choosing.md").read_text() == module["text"](), "run: python docs/choosing.py"


@pytest.mark.parametrize(("page", "least"), [("questions", 50), ("map-attention", 8)])
def test_page_runs(page: str, least: int) -> None:
    results = doctest.testfile(str(ROOT / "docs" / f"{page}.md"), module_relative=False)
    assert results.attempted > least
    assert results.failed == 0


def test_three_moves_are_up_to_date() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "three_moves.py"))
    text, picture = (ROOT / "docs" / f"map-attention.{form}" for form in ("md", "svg"))
    assert text.read_text() == module["updated"](text.read_text()), "run: python docs/three_moves.py"
    drawn = set(re.findall(r'<g id="(\w+)">', picture.read_text()))
    assert {moves.id for moves in module["built"]()} <= drawn, "run: python docs/three_moves.py"


def test_identity_start_is_everywhere_the_page_says() -> None:
    built = runpy.run_path(str(ROOT / "docs" / "three_moves.py"))["built"]()
    assert all("init" in inspect.signature(registry.get(moves.id)).parameters for moves in built if moves.id != "spp")


def test_package_docstring_runs() -> None:
    assert doctest.testmod(regard).failed == 0
