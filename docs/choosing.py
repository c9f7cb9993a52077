"""Writes choosing.md: a decision tree whose leaves are checked against the cards, then a table made from cards and measured figures.

python docs/choosing.py
"""

import csv
from pathlib import Path

import regard
from regard.files import write_whole

HERE = Path(__file__).parent
# A question; its answers; under each either another question or the ids to look at, in the order to try them. `needs` is what the cards must claim.
Leaf = tuple[tuple[str, ...], tuple[str, ...], str]

TREE: list[tuple[str, list[tuple[str, Leaf]]]] = [
    (
        "Up to about two thousand positions: all pairs are affordable",
        [
            ("the baseline, every mask, exact weights", (("multi_head",), ("key_mask", "attn_mask", "weights"), "")),
            ("attention and feed-forward layer in one, one cheap head", (("gau",), ("causal", "key_mask"), "")),
            ("values should be subtracted as well as added", (("coda",), ("weights", "key_mask"), "")),
            (
                "is comparing tokens needed at all? weights from position or query alone",
                (("synthesizer",), ("weights", "causal"), "needs a longest length"),
            ),
            ("some outputs are known and should spread to the others", (("probabilistic",), ("weights",), "")),
            ("an unbiased random estimate of softmax, as a tool of research", (("randomized",), ("weights", "attn_mask"), "")),
            ("phrases before words: each token first becomes a mean of its neighbourhood", (("context_pool",), ("key_mask",), "")),
        ],
    ),
    (
        "Longer, causal",
        [
            ("exact softmax over chosen pairs; masks of pairs", (("sparse",), ("causal", "attn_mask"), "")),
            (
                "a bounded state, one position at a time",
                (("mixed_chunk", "luna", "performer", "efficient", "masked_linear"), ("causal", "step"), "masked_linear with mask='none'"),
            ),
            ("weights that depend on the distance", (("masked_linear",), ("causal",), "mask='toeplitz'")),
        ],
    ),
    (
        "Longer, both directions",
        [
            ("in place of softmax in a trained model, without training", (("mra",), ("key_mask",), "random features are far off: errors below")),
            ("exact softmax over chosen pairs; masks of pairs", (("hypercube", "sparse"), ("attn_mask", "weights"), "")),
            ("linear, on tokens in a row", (("luna", "efficient", "performer", "lara"), ("linear", "key_mask"), "lara with proposal='adaptive-1d'")),
            ("linear, on the patches of an image, near ones first", (("ripple", "masked_linear", "lara"), ("key_mask",), "grid_size")),
            ("robust features of an image", (("vars",), ("linear",), "variant 'd', or 's' and 'sd' on a grid")),
        ],
    ),
    (
        "A decoder asks an encoder",
        [
            ("the whole source", (("luong_global", "multi_head"), ("cross", "key_mask", "weights"), "")),
            ("a window that moves along a long source", (("luong_local",), ("cross", "weights"), "")),
            ("a source too long for all pairs", (("luna", "performer", "efficient"), ("cross", "linear"), "")),
        ],
    ),
    (
        "No order: sets and graphs",
        [
            ("a set of up to a few thousand elements", (("sab",), ("mask", "weights"), "")),
            ("a larger set", (("isab",), ("mask", "linear"), "")),
            ("a set to a few vectors", (("pma",), ("permutation_invariant",), "")),
            ("one set asks another", (("mab",), ("cross",), "")),
            ("a graph", (("graph_kernel",), (), "")),
        ],
    ),
    ("Which heads are needed?", [("a gate for each head, closed by a penalty", (("head_gate",), (), ""))]),
]

MARKS = ("causal", "cross", "key_mask", "attn_mask", "weights", "rows", "step", "qkv_core")


def unmet() -> list[str]:
    """What the tree promises and a card does not."""
    cards = regard.cards()
    faults = [f"{id} is no mechanism" for _, answers in TREE for _, (ids, _, _) in answers for id in ids if id not in cards]
    for _, answers in TREE:
        for answer, (ids, needs, _) in answers:
            faults += [f"{id} under {answer!r} lacks {set(needs) - cards[id].can}" for id in ids if id in cards and set(needs) - cards[id].can]
    named = {id for _, answers in TREE for _, (ids, _, _) in answers for id in ids}
    ours = {id for layout in ("sequence", "set", "graph") for id in regard.ids(layout=layout)}
    return faults + [f"{id} is on no branch" for id in sorted(ours - named - {"set_transformer", "head_gate"})]


def table() -> list[str]:
    measured: dict[str, dict[int, dict[str, str]]] = {}
    path = HERE / "measured" / "growth.csv"
    if path.exists():
        for row in csv.DictReader(path.read_text().splitlines()):
            measured.setdefault(row["id"], {}).setdefault(int(row["length"]), row)  # the first form of each mechanism
    base = measured.get("multi_head", {})
    lines = [
        "| id | grows | " + " | ".join(MARKS) + " | ms 1024 | ms 4096 | MB 4096 | faster than multi_head from |",
        "| --- " * (len(MARKS) + 6) + "|",
    ]
    for id in [id for layout in ("sequence", "set") for id in regard.ids(layout=layout)]:
        card, own = regard.card(id), measured.get(id, {})
        faster = [n for n in own if n in base and float(own[n]["ms"]) < float(base[n]["ms"])]
        always = next((n for n in sorted(own) if all(m in faster for m in own if m >= n and m in base)), None)
        marks = [("if" if mark in card.unless else "yes") if mark in card.can else "" for mark in MARKS]
        cells = [f"{float(own[n][key]):.3g}" if n in own else "" for n, key in ((1024, "ms"), (4096, "ms"), (4096, "mb"))]
        crossing = "" if id == "multi_head" or not own else "never" if always is None else f"{always}"
        lines.append(f"| `{id}` | N^{card.grows['N']:g} | " + " | ".join((*marks, *cells, crossing)) + " |")
    return lines


def text() -> str:
    faults = unmet()
    if faults:
        raise SystemExit("choosing.md would promise what the cards do not: " + "; ".join(faults))
    out = ["# Choosing a mechanism for sequences, sets and graphs", "", "Length first, then order, masks, and whether weights are looked at.", ""]
    for question, answers in TREE:
        out += [f"- **{question}**"]
        for answer, (ids, _, note) in answers:
            out += [f"  - {answer}: " + ", ".join(f"`{id}`" for id in ids) + (f" ({note})" if note else "")]
    out += [
        "",
        "Weights of chosen positions, at any length and with the fast path kept: `regard.attend_rows` (column *rows*). The device decides less than",
        "the length: on CUDA every mechanism runs in plain torch and fused attention kernels, none needs a compiled extension; the lengths below are",
        "those of a CPU. How far the approximations are from softmax on a text encoder: [measured/approximation.md](measured/approximation.md).",
        "Beside public implementations: [measured/README.md](measured/README.md). Whether one helps on your problem: `regard compare`.",
        "",
        "*if*: not with every option (`regard show ID` says which). Times are forward + backward of one sample of width 256 on two CPU cores, of the",
        "first form listed in [measured/growth.md](measured/growth.md).",
        "",
        *table(),
    ]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    write_whole(HERE / "choosing.md", text())
