r"""The pieces of AlphaFold 2: an alignment and a map of pairs refine each other, pairs by the triangles they close, frames by invariant points.

    triangle attention:       z_ij <- sum_k softmax_k(q_ij . k_ik / sqrt(d) + b_jk) v_ik
    triangle multiplication:  z_ij <- sum_k a_ik b_jk            outer product mean:  z_ij <- W mean_s a_si b_sj^T
    invariant points:         scores - w/2 sum_p |T_i q_ip - T_j k_jp|^2,   T a residue's frame

Jumper et al., "Highly accurate protein structure prediction with AlphaFold", Nature 596, 2021, supplement, algorithms 6-15, 19 and 22. Where
paper and DeepMind's code differ we follow the code, but for the mask of the transitions (OpenFold's; `mask_transition=False` leaves it out) and for
masked keys, whose weight is exactly zero.
B batch, N residues, M sequences; msa (B, M, N, msa_dim), pair (B, N, N, pair_dim), single (B, N, single_dim).
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, rename
from ...parts import evoformer as parts
from ...validate import check_option

Part = Literal[
    "block",
    "msa_row",
    "msa_column",
    "msa_column_global",
    "outer_product_mean",
    "triangle_multiplication",
    "triangle_attention",
    "pair_transition",
    "msa_transition",
    "ipa",
]

KINDS: Mapping[str, type[torch.nn.Module]] = {
    "block": parts.Block,
    "msa_row": parts.MSARowAttention,
    "msa_column": parts.MSAColumnAttention,
    "msa_column_global": parts.MSAColumnGlobalAttention,
    "outer_product_mean": parts.OuterProductMean,
    "triangle_multiplication": parts.TriangleMultiplication,
    "triangle_attention": parts.TriangleAttention,
    "pair_transition": parts.PairTransition,
    "msa_transition": parts.MSATransition,
    "ipa": parts.InvariantPointAttention,
}


def _arguments(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "dd")]


# What a part's forward takes: what it needs, and its masks. What its constructor takes: widths, and options with the values of AlphaFold 2.
TAKES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    part: tuple(tuple(p.name for p in _arguments(kind.forward) if (p.default is p.empty) is needed) for needed in (True, False))  # type: ignore[misc]
    for part, kind in KINDS.items()
}
WIDTHS = {part: [p.name for p in _arguments(kind.__init__) if p.default is p.empty] for part, kind in KINDS.items()}
OPTIONS = {part: {p.name: p.default for p in _arguments(kind.__init__) if p.default is not p.empty} for part, kind in KINDS.items()}
UNWEIGHTED = ("block", "outer_product_mean", "triangle_multiplication", "pair_transition", "msa_transition")


def _attention(rows: str, length: str, dim: str, heads: str, width: str) -> str:
    return f"(10*B*{rows}*{length}*{dim} + 4*B*{rows}*{length}**2)*{heads}*{width}"


def _row(heads: str, width: str) -> str:
    return f"{_attention('M', 'N', 'msa_dim', heads, width)} + 2*B*N**2*pair_dim*{heads}"


def _triangle(heads: str, width: str) -> str:
    return f"{_attention('N', 'N', 'pair_dim', heads, width)} + 2*B*N**2*pair_dim*{heads}"


def _outer(hidden: str) -> str:
    return f"4*B*M*N*msa_dim*{hidden} + 2*B*N**2*{hidden}**2*(M + pair_dim)"


def _product(hidden: str) -> str:
    return f"10*B*N**2*pair_dim*{hidden} + 2*B*N**3*{hidden} + 2*B*N**2*pair_dim**2"


COSTS = {
    "msa_row": _row("num_heads", "head_dim"),
    "msa_column": _attention("N", "M", "msa_dim", "num_heads", "head_dim"),
    "msa_column_global": "2*B*N*num_heads*head_dim*(msa_dim + 2*M*msa_dim + 2*M) + 4*B*M*N*msa_dim*head_dim",
    "outer_product_mean": _outer("hidden_dim"),
    "triangle_multiplication": _product("hidden_dim"),
    "triangle_attention": _triangle("num_heads", "head_dim"),
    "pair_transition": "4*B*N**2*pair_dim**2*factor",
    "msa_transition": "4*B*M*N*msa_dim**2*factor",
    "ipa": "2*B*N*num_heads*(single_dim*(4*head_dim + 6*num_qk_points + 7*num_v_points + pair_dim) + 18*(num_qk_points + num_v_points))"
    " + 2*B*N**2*num_heads*(2*head_dim + 3*num_qk_points + 3*num_v_points + 2*pair_dim)",
    "block": f"{_row('msa_heads', 'msa_head_dim')} + ({_attention('N', 'M', 'msa_dim', 'msa_heads', 'msa_head_dim')} if column_attention else 0)"
    f" + {_outer('opm_hidden_dim')} + 2*({_product('triangle_hidden_dim')}) + 2*({_triangle('pair_heads', 'pair_head_dim')})"
    " + 4*B*(M*N*msa_dim**2 + N**2*pair_dim**2)*factor",
}


def _joined(kind: str, name: str) -> Rule:
    """OpenFold's fused projections of triangle multiplication: the rows of a first."""
    return Rule(
        (f"*linear_ab_{kind}.{name}",),
        (f"body.*linear_a_{kind}.{name}", f"body.*linear_b_{kind}.{name}"),
        lambda tensors, module: list(tensors[0].chunk(2)),
        lambda tensors, module: [torch.cat(tensors)],
    )


class Evoformer(Mechanism):
    """Args:
    part: what to build. "block" takes (msa, pair, msa_mask, pair_mask) and returns both, updated; all others return the update alone. "msa_row"
        takes (msa, pair, msa_mask); "msa_column", "msa_column_global", "outer_product_mean" and "msa_transition" (msa, msa_mask);
        "triangle_multiplication", "triangle_attention" and "pair_transition" (pair, pair_mask); "ipa" (single, pair, rotations, translations, mask).
    msa_dim, pair_dim: widths of the alignment and of the pairs.
    msa_head_dim, msa_heads, pair_head_dim, pair_heads: width and number of the heads of a block's attention (32, 8, 32, 4).
    opm_hidden_dim, triangle_hidden_dim: widths inside a block's outer product mean and triangle multiplication (32, 128).
    factor: how much wider transitions are inside (4).
    msa_dropout, pair_dropout: of a block in training, shared along rows or columns (0.15, 0.25).
    column_attention, opm_first, mask_transition: whether a block has column attention (True), begins with the outer product mean (False), and
        masks its transitions (True).
    head_dim, num_heads: of a single attention part.
    hidden_dim: inside a single outer product mean or triangle multiplication.
    mode: "outgoing" or "incoming" edges of triangle multiplication, "starting" or "ending" node of triangle attention.
    single_dim, num_qk_points, num_v_points: width of single, and the points of a head of ipa (384, 4, 8).

    None takes AlphaFold 2's value, in brackets; options of another part are refused.
    """

    card: ClassVar = Card(
        id="evoformer",
        layout="structure",
        paper=Paper(
            title="Highly accurate protein structure prediction with AlphaFold",
            authors="John Jumper, Richard Evans, Alexander Pritzel, Tim Green, Michael Figurnov, Olaf Ronneberger, Kathryn Tunyasuvunakool"
            ", Russ Bates, Augustin Žídek, Anna Potapenko, Alex Bridgland, Clemens Meyer, Simon A. A. Kohl, Andrew J. Ballard, Andrew Cowie"
            ", Bernardino Romera-Paredes, Stanislav Nikolov, Rishub Jain, Jonas Adler, Trevor Back, Stig Petersen, David Reiman, Ellen Clancy"
            ", Michal Zielinski, Martin Steinegger, Michalina Pacholska, Tamas Berghammer, Sebastian Bodenstein, David Silver, Oriol Vinyals"
            ", Andrew W. Senior, Koray Kavukcuoglu, Pushmeet Kohli, Demis Hassabis",
            venue="Nature",
            year=2021,
        ),
        source="aqlaboratory/openfold@ce0029e (Apache-2.0)",
        summary="An alignment and a map of pairs refine each other; pairs by the triangles they close, frames by attention to invariant points.",
        when="A map of edges whose entries must agree around triangles, with or without an alignment that speaks of them.",
        flops=" else ".join(f"{cost} if part == '{part}'" for part, cost in COSTS.items()) + " else 0",
        grows={"N": 3.0},
        can=frozenset({"weights", "row_stochastic", "identity_start"}),
        unless={**dict.fromkeys(("weights", "row_stochastic"), f"part in {UNWEIGHTED}"), "identity_start": "part != 'block'"},
        checked_against="public",
        uncertain="The global column attention was checked against the equations alone; growth is stated for as many sequences as residues.",
        example={
            "part": "block",
            "msa_dim": 10,
            "pair_dim": 8,
            "msa_head_dim": 4,
            "opm_hidden_dim": 3,
            "triangle_hidden_dim": 6,
            "pair_head_dim": 4,
            "msa_heads": 2,
            "pair_heads": 2,
            "factor": 2,
        },
        variants=(
            {"part": "msa_row", "msa_dim": 10, "pair_dim": 8, "head_dim": 4, "num_heads": 2},
            {"part": "msa_column_global", "msa_dim": 10, "head_dim": 4, "num_heads": 2},
            {"part": "outer_product_mean", "msa_dim": 10, "pair_dim": 8, "hidden_dim": 3},
            {"part": "triangle_attention", "pair_dim": 8, "head_dim": 4, "num_heads": 2, "mode": "ending"},
            {"part": "triangle_multiplication", "pair_dim": 8, "hidden_dim": 6, "mode": "incoming"},
            {"part": "ipa", "single_dim": 10, "pair_dim": 8, "head_dim": 4, "num_heads": 2, "num_qk_points": 2, "num_v_points": 3},
        ),
        returns=("msa", "pair"),
    )
    official: ClassVar = (
        KeyMap("OpenFold", (rename("*", "body.*"),)),
        KeyMap("OpenFold, fused", (*(_joined(kind, name) for kind in "pg" for name in ("weight", "bias")), rename("*", "body.*"))),
    )

    def __init__(
        self,
        part: Part = "block",
        msa_dim: int = 256,
        pair_dim: int = 128,
        *,
        msa_head_dim: int | None = None,
        opm_hidden_dim: int | None = None,
        triangle_hidden_dim: int | None = None,
        pair_head_dim: int | None = None,
        msa_heads: int | None = None,
        pair_heads: int | None = None,
        factor: int | None = None,
        msa_dropout: float | None = None,
        pair_dropout: float | None = None,
        column_attention: bool | None = None,
        opm_first: bool | None = None,
        mask_transition: bool | None = None,
        head_dim: int | None = None,
        num_heads: int | None = None,
        hidden_dim: int | None = None,
        mode: Literal["outgoing", "incoming", "starting", "ending"] | None = None,
        single_dim: int | None = None,
        num_qk_points: int | None = None,
        num_v_points: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(part, tuple(KINDS), "part")
        self.part, self.msa_dim, self.pair_dim = part, msa_dim, pair_dim
        own, widths = OPTIONS[part], {"msa_dim": msa_dim, "pair_dim": pair_dim}
        given = {
            "msa_head_dim": msa_head_dim,
            "opm_hidden_dim": opm_hidden_dim,
            "triangle_hidden_dim": triangle_hidden_dim,
            "pair_head_dim": pair_head_dim,
            "msa_heads": msa_heads,
            "pair_heads": pair_heads,
            "factor": factor,
            "msa_dropout": msa_dropout,
            "pair_dropout": pair_dropout,
            "column_attention": column_attention,
            "opm_first": opm_first,
            "mask_transition": mask_transition,
            "head_dim": head_dim,
            "num_heads": num_heads,
            "hidden_dim": hidden_dim,
            "mode": mode,
            "single_dim": single_dim,
            "num_qk_points": num_qk_points,
            "num_v_points": num_v_points,
        }
        for name, value in given.items():
            require(value is None or name in own, "{}={!r} is no option of part={!r}, which takes {}", name, value, part, list(own))
            setattr(self, name, own.get(name) if value is None else value)
        self.body: Any = KINDS[part](
            **{name: widths[name] for name in WIDTHS[part]}, **{name: getattr(self, name) for name in own}, device=device, dtype=dtype
        )

    def forward(self, *inputs: Tensor | None, return_weights: bool = False, **named: Tensor | None) -> Any:
        """The part's inputs, in its order or by name. With return_weights, attention parts return (update, weights), as `weights` gives them."""
        given = self._given(inputs, named)
        require(not return_weights or self.part not in UNWEIGHTED, "part={!r} has no weights to return", self.part)
        out = self.body(**given)
        return (out, self.body.weights(**given)) if return_weights else out

    def weights(self, *inputs: Tensor | None, queries: Tensor | None = None, **named: Tensor | None) -> Tensor:
        """The weights of an attention part: msa_row (B, M, H, N, N), msa_column (B, N, H, M, M), msa_column_global (B, N, H, M), triangle_attention
        (B, N, H, N, N), ipa (B, H, N, N). Of chosen queries alone (the axis before the last) where they are given.
        """
        require(self.part not in UNWEIGHTED, "part={!r} has no weights to return", self.part)
        require(queries is None or self.part != "msa_column_global", "msa_column_global has one query a column: leave queries out")
        return self.body.weights(**self._given(inputs, named), **({} if queries is None else {"queries": queries}))

    def _given(self, inputs: tuple[Tensor | None, ...], named: Mapping[str, Tensor | None]) -> dict[str, Any]:
        needed, masks = TAKES[self.part]
        names = (*needed, *masks)
        twice = [name for name in names[: len(inputs)] if name in named]
        fits = len(inputs) <= len(names) and not twice and all(name in names for name in named)
        require(fits, "part={!r} takes {}, got {} inputs in order and {} by name", self.part, ", ".join(names), len(inputs), list(named))
        given = {**dict(zip(names, inputs, strict=False)), **named}
        missing = [name for name in needed if given.get(name) is None]
        require(not missing, "part={!r} needs {}; it takes {}", self.part, ", ".join(missing), ", ".join(names))
        return given

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What the checks call it with: `size` residues, and as many sequences."""

        def noise(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator)

        frames, _ = torch.linalg.qr(noise(size, 3, 3))
        shapes = {"msa": (size, size, options.get("msa_dim", 256)), "pair": (size, size, options.get("pair_dim", 128))}
        shapes |= {"single": (size, options.get("single_dim", 384)), "translations": (size, 3)}
        needed = TAKES[options.get("part", "block")][0]
        needed = needed[::-1] if options.get("part") == "msa_row" else needed  # sequences do not see one another there, but all see the pairs
        return {name: frames if name == "rotations" else noise(*shapes[name]) for name in needed}


def _builder(part: Any) -> Any:
    return lambda **options: Evoformer(part, **options)


# Golden files name a part beside its options.
Evoformer.parts = {part: _builder(part) for part in KINDS}
