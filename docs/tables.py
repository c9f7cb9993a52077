"""Write the README's table of mechanisms from the cards: `python docs/tables.py` (`--check` only says whether it is up to date)."""

import os
import sys
from pathlib import Path

from regard import registry
from regard.cli import BADGES

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- table: made by docs/tables.py -->", "<!-- end of table -->"


def table() -> str:
    """The mechanisms by family, one row each."""
    rows = ["| id | paper | what it is | grows | checked against |", "| --- | --- | --- | --- | --- |"]
    for id in sorted(registry.ids(), key=lambda id: (registry.family_of(id), id)):
        card = registry.card(id)
        link = f"[{card.paper.title}](https://arxiv.org/abs/{card.paper.arxiv})" if card.paper.arxiv else card.paper.title
        exponent = card.grows.get("N", 0)
        growth = {0: "1", 1: "N"}.get(exponent, f"N^{exponent:g}")
        rows.append(f"| `{id}` | {link}, {card.paper.year} | {card.summary} | {growth} | {BADGES[card.checked_against]} |")
    return "\n".join(rows)


def updated(text: str) -> str:
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    text = README.read_text()
    if "--check" in sys.argv:
        sys.exit(text != updated(text))
    temporary = README.with_suffix(".tmp")
    temporary.write_text(updated(text))
    os.replace(temporary, README)
