"""The README keeps its promises: its tour runs, its table is the cards'."""

import doctest
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tour_runs() -> None:
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert results.attempted > 8
    assert results.failed == 0


def test_table_is_up_to_date() -> None:
    module = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    text = (ROOT / "README.md").read_text()
    assert text == module["updated"](text), "run: python docs/tables.py"


def test_package_docstring_runs() -> None:
    import regard

    assert doctest.testmod(regard).failed == 0
