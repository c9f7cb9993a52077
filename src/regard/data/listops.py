"""ListOps after the rule of Long Range Arena: nested MAX, MIN, MED and SM (sum modulo 10) over digits; the answer is a digit.

A node is an operator with probability 0.25 and otherwise a digit, a digit at depth 10, an operator has 2 to 10 arguments. The tokens are ten
digits, four operators and the closing bracket: the brackets of the binary tree form are left out, the closing one of the list is kept, because
without it the tree cannot be read back.
"""

import random

import torch

from ..errors import require
from .batch import Batch, FixedData

PAD = 0
OPERATORS = ("MIN", "MAX", "MED", "SM")
CLOSE = 15
VOCABULARY = 16  # padding, digits 1..10 for 0..9, operators 11..14, close 15
MAX_DEPTH, MAX_ARGS, OPERATOR_SHARE = 10, 10, 0.25


def listops(length: int, *, train: int = 8000, test: int = 1000, shortest: int | None = None, seed: int = 0) -> FixedData:
    """Expressions of `shortest` to `length` tokens, padded to `length`, no expression twice: `x` (B, length), `y` (B,) the answer,
    `key_mask`.

    Args:
        length: longest expression, in tokens.
        train, test: numbers of expressions.
        shortest: shortest expression; a quarter of `length` by default, as in Long Range Arena (500 to 2000).
        seed: of the expressions.
    """
    shortest = max(length // 4, 5) if shortest is None else shortest
    require(5 <= shortest <= length, "listops: expressions of {} to {} tokens; use 5 <= shortest <= length", shortest, length)
    draw = random.Random(seed)
    found: dict[tuple[int, ...], int] = {}
    tries = 0
    while len(found) < train + test:
        tries += 1
        require(tries < 1000 * (train + test), "listops: too few different expressions of {} to {} tokens; widen the range", shortest, length)
        tokens: list[int] = []
        answer = _grow(draw, tokens, length, depth=1, root=True)
        if answer is not None and shortest <= len(tokens) <= length:
            found.setdefault(tuple(tokens), answer)
    x = torch.full((len(found), length), PAD)
    mask = torch.zeros(len(found), length, dtype=torch.bool)
    for row, tokens_of in enumerate(found):
        x[row, : len(tokens_of)] = torch.tensor(tokens_of)
        mask[row, : len(tokens_of)] = True
    whole = Batch(x, torch.tensor(list(found.values())), mask)
    return FixedData(whole.pick(slice(0, train)), whole.pick(slice(train, None)))


def _grow(draw: random.Random, tokens: list[int], limit: int, *, depth: int, root: bool = False) -> int | None:
    """Append one node to `tokens` and return its value; None as soon as the expression is longer than `limit`."""
    if len(tokens) > limit:
        return None
    if not root and (depth >= MAX_DEPTH or draw.random() > OPERATOR_SHARE):
        value = draw.randrange(10)
        tokens.append(1 + value)
        return value
    operator = draw.randrange(len(OPERATORS))
    tokens.append(11 + operator)
    values: list[int] = []
    for _ in range(draw.randint(2, MAX_ARGS)):
        value = _grow(draw, tokens, limit, depth=depth + 1)
        if value is None:
            return None
        values.append(value)
    tokens.append(CLOSE)
    return apply(OPERATORS[operator], values)


def apply(operator: str, values: list[int]) -> int:
    """The value of one operator; the median of an even number of values is the mean of the middle two, rounded down."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    match operator:
        case "MIN":
            return ordered[0]
        case "MAX":
            return ordered[-1]
        case "MED":
            return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
        case _:
            return sum(values) % 10


def spell(tokens: list[int]) -> str:
    """The expression as text, for people: `[MAX 3 [SM 4 5 ] ]`."""
    words = {PAD: "", CLOSE: "]"} | {1 + d: str(d) for d in range(10)} | {11 + i: f"[{name}" for i, name in enumerate(OPERATORS)}
    return " ".join(words[token] for token in tokens if token != PAD)
