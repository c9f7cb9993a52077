"""Wrong attention modules, one for each check, to prove that the checks can fail.

Each mutant is a correct little module (`_base.py`) with one fault, most of them found in public code. `fails` names the check that must catch it.
"""

from torch import nn

from . import _base, maps, tokens

CORRECT: tuple[type[nn.Module], ...] = (_base.Tokens, _base.Pool, _base.Nodes, _base.Gate)


def mutants() -> dict[str, type[nn.Module]]:
    """ "package.module:Class" -> class, for every mutant."""
    found = {}
    for module in (tokens, maps):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, nn.Module) and "fails" in vars(kind):
                found[f"{module.__name__}:{name}"] = kind
    return found
