"""A card: the facts about one mechanism, as frozen data. Lists, docs, checks and reports are generated from it."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from .errors import RegardError, require

Layout = Literal["sequence", "set", "graph", "map", "pair", "recurrent", "structure", "system"]
Checked = Literal["authors", "public", "equations", "reconstruction"]

CAPABILITIES: Mapping[str, str] = MappingProxyType(
    {
        "causal": "has a causal mode: `causal=True`, or always causal",
        "cross": "attends from `x` to another sequence `context`",
        "key_mask": "takes `key_mask` (batch, keys), True = may be attended",
        "attn_mask": "takes `attn_mask` (queries, keys) or (batch, heads, queries, keys), True = may be attended",
        "mask": "takes `mask` (batch, elements), True = a real element",
        "weights": "returns its attention weights: `return_weights=True`",
        "rows": "`regard.attend_rows` gives the weights of chosen positions at a cost linear in the number of keys",
        "row_stochastic": "the returned weights are non-negative and sum to one over the last axis",
        "linear": "time and memory grow linearly in the number of positions",
        "step": "runs one position at a time: `init_state` and `step`",
        "qkv_core": "`attend(q, k, v)` is the mechanism as a function of queries, keys and values",
        "any_dims": "maps of one, two or three spatial axes",
        "permutation_equivariant": "permuting the positions permutes the output",
        "permutation_invariant": "permuting the elements leaves the output unchanged",
        "identity_start": "a fresh module made with `init='identity'` returns its input unchanged",
        "gate": "`gate(x)` gives the multiplicative gate alone, to be fused into a residual addition",
        "batch_statistics": "its BatchNorm needs more than one value per channel in training",
        "upsamples": "the output map is larger than the input map",
        "elementwise": "scales its input: no output depends on another position, and no query is asked",
    }
)


PLACES: Mapping[str, str] = MappingProxyType(
    {
        "A": "after the last norm of a residual branch, before the addition",
        "B": "instead of the 3x3 convolution of a bottleneck, with its norm and activation",
        "C": "a residual unit of its own between blocks",
        "D": "between stages",
        "E": "a head on a backbone, or an upsampler between feature levels",
    }
)


@dataclass(frozen=True)
class Paper:
    """Where a mechanism was published. `arxiv` is the identifier alone, for example "1706.03762"."""

    title: str
    authors: str
    venue: str
    year: int
    arxiv: str | None = None

    def bibtex(self, key: str) -> str:
        names = [name.strip() for name in self.authors.replace(" and ", ", ").split(",")]
        rows = [f"title = {{{self.title}}}", f"author = {{{' and '.join(n for n in names if n)}}}"]
        rows += [f"booktitle = {{{self.venue}}}", f"year = {{{self.year}}}"]
        if self.arxiv:
            rows += [f"eprint = {{{self.arxiv}}}", "archiveprefix = {arXiv}"]
        return f"@inproceedings{{{key},\n  " + ",\n  ".join(rows) + "\n}"


@dataclass(frozen=True)
class Card:
    """The facts about one mechanism.

    Args:
        id: the name given to `regard.create`; equals the file's name.
        layout: what it works on. `also` lists further layouts of the same mechanism.
        paper, source: the publication, and the code it was compared with.
        summary, when: what it is, and when to choose it; one sentence each.
        flops: matrix-product FLOPs of one forward pass (2mnk a product, element-wise work not counted), as an expression in `B` (batch), `N`
            (queries, positions or elements), `M` (keys), `H`, `W` (a map's sides) and any attribute of the module. Compared with a count.
        grows: exponent of the counted FLOPs in each size, for large sizes: {"N": 2.0}. Measured by counting.
        can: capabilities, keys of `CAPABILITIES`; they decide which checks apply.
        unless: the options that take a capability away, as conditions on the module's attributes: {"cross": "causal or alibi"}.
        example: constructor arguments of a small instance.
        checked_against: "authors" (their code), "public" (a trusted public implementation), "equations" (of the paper), "reconstruction".
        uncertain: what is not certain about that, in one line.
        returns: names of the outputs in order, as golden files name them.
        place: where it belongs in a residual network, a key of `PLACES`; maps only.
        bounds: wider tolerances that the definition forces, by check name or "golden.<case>", each with the condition on the module's attributes
            under which it holds: {"prefix_property": (0.2, "feature_map == 'favor+'")}. The reason stands in the file.
        variants: further constructor arguments of small instances that the checks also run on.
    """

    id: str
    layout: Layout
    paper: Paper
    source: str
    summary: str
    when: str
    flops: str
    grows: Mapping[str, float]
    can: frozenset[str]
    example: Mapping[str, Any]
    checked_against: Checked = "authors"
    uncertain: str = ""
    also: tuple[Layout, ...] = ()
    returns: tuple[str, ...] = ("out", "weights")
    place: str = ""
    variants: tuple[Mapping[str, Any], ...] = field(default=())
    unless: Mapping[str, str] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.layout in get_args(Layout), "card of {}: layout={!r} is not one of {}", self.id, self.layout, get_args(Layout))
        require(self.place in ("", *PLACES), "card of {}: place={!r} is not one of {}", self.id, self.place, tuple(PLACES))
        unknown = sorted(set(self.can) - set(CAPABILITIES))
        require(not unknown, "card of {}: unknown capabilities {}; known are {}", self.id, unknown, sorted(CAPABILITIES))
        loose = sorted(set(self.unless) - set(self.can))
        require(not loose, "card of {}: `unless` names {}, which `can` does not claim", self.id, loose)

    def cost(self, module: object, **sizes: int) -> float:
        """FLOPs of one forward pass of `module` on inputs of these sizes, by the card's formula."""
        return float(evaluate(self.flops, lambda name: sizes[name] if name in sizes else getattr(module, name)))

    def bound(self, check: str, usual: float, module: object) -> float:
        """The tolerance of a check for this instance: `usual`, or the card's where its condition holds."""
        wider, condition = self.bounds.get(check, (usual, "False"))
        return wider if evaluate(condition, lambda attribute: getattr(module, attribute)) else usual

    def capabilities(self, module: object) -> frozenset[str]:
        """What this instance can do: `can`, less what its options take away. A causal module respects no permutation."""
        lost = {name for name, condition in self.unless.items() if evaluate(condition, lambda attribute: getattr(module, attribute))}
        causal = getattr(module, "causal", "causal" in self.can)
        return self.can - lost - ({"permutation_equivariant", "permutation_invariant"} if causal else set())


_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda item, group: item in group,
    ast.NotIn: lambda item, group: item not in group,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor, "sqrt": math.sqrt, "log2": math.log2}


def evaluate(formula: str, value_of: Callable[[str], Any]) -> Any:
    """Evaluate an expression on a card: + - * / // % **, comparisons, and or not, `a if b else c`, min max ceil floor sqrt log2, tuples.

    `value_of` gives the value of a name.
    """

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return walk(body)
            case ast.Constant(value=value):
                return value
            case ast.Tuple(elts=items):
                return tuple(walk(item) for item in items)
            case ast.BoolOp(op=ast.And(), values=values):
                return all(walk(value) for value in values)
            case ast.BoolOp(op=ast.Or(), values=values):
                return any(walk(value) for value in values)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](walk(left), walk(right))
            case ast.Name(id=name):
                try:
                    return value_of(name)
                except (KeyError, AttributeError):
                    raise RegardError(f"card expression {formula!r}: {name!r} is neither a size nor an attribute of the module") from None
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](walk(left), walk(right))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](walk(operand))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return walk(body) if walk(test) else walk(orelse)
            case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*(walk(arg) for arg in args))
        raise RegardError(f"card expression {formula!r}: cannot evaluate {ast.unparse(node)!r}")

    return walk(ast.parse(formula, mode="eval"))
