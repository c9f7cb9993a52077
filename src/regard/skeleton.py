"""The skeleton that `regard new` writes: a small mechanism of a layout, complete enough to pass its checks."""

import re
from pathlib import Path
from string import Template

from .errors import require
from .files import write_whole

_HEAD = '''r"""$title: one sentence that says what the idea is.

    $formula

Authors, "Paper title", Venue Year. arXiv:0000.00000.
Say here what you follow where paper and code differ. $legend
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from regard.card import Card, Paper
from regard.mechanism import Mechanism
from regard.validate import $checks


class $name(Mechanism):
    """Args:
    $width: width of the input and the output.
    """

    card: ClassVar = Card(
        id="$id",
        layout="$layout",
        paper=Paper(title="Paper title", authors="First Author, Second Author", venue="Venue", year=2026),
        source="where the code it is compared with lives",
        summary="What it is, in one sentence.",
        when="When to choose it, in one sentence.",
        flops="$flops",
        grows={"N": $exponent},
        can=frozenset($can),
        checked_against="reconstruction",
        example={"$width": 16},
    )

    def __init__(self, $width: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.$width = $width
'''

_BODIES = {
    "sequence": '''        self.score = nn.Linear(dim, 1, device=device, dtype=dtype)
        self.value = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """x (B, N, dim), key_mask (B, N), True = may be attended. Returns (B, N, dim)."""
        check_tokens(x, self.dim)
        check_mask(key_mask, *x.shape[:2])
        score = self.score(x)
        if key_mask is not None:
            score = score.masked_fill(~key_mask[..., None], float("-inf"))
            empty = ~key_mask.any(1)[:, None, None]
            weights = score.masked_fill(empty, 0.0).softmax(1).masked_fill(empty, 0.0)
        else:
            weights = score.softmax(1)
        return x + (weights * self.value(x)).sum(1, keepdim=True)
''',
    "set": '''        self.value = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """x (B, N, dim), mask (B, N), True = a real element. Returns (B, 1, dim)."""
        check_tokens(x, self.dim)
        check_mask(mask, *x.shape[:2], name="mask")
        values = self.value(x).tanh()
        if mask is None:
            return values.mean(1, keepdim=True)
        return values.masked_fill(~mask[..., None], 0.0).sum(1, keepdim=True) / mask.sum(1).clamp_min(1)[:, None, None]
''',
    "map": '''        self.mix = nn.Linear(channels, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W). Returns the same shape."""
        check_map(x, self.channels)
        return x * torch.sigmoid(self.mix(x.mean((2, 3))))[:, :, None, None]
''',
}

_FACTS = {
    "sequence": {
        "width": "dim",
        "formula": "out_i = x_i + sum_j w_j V x_j,   w = softmax over the positions of s(x_j)",
        "legend": "B batch, N positions.",
        "checks": "check_mask, check_tokens",
        "flops": "2*B*N*dim + 2*B*N*dim**2",
        "exponent": "1.0",
        "can": '{"key_mask", "linear", "permutation_equivariant"}',
    },
    "set": {
        "width": "dim",
        "formula": "out = mean over the real elements of tanh(V x_i)",
        "legend": "B batch, N elements.",
        "checks": "check_mask, check_tokens",
        "flops": "2*B*N*dim**2",
        "exponent": "1.0",
        "can": '{"mask", "linear", "permutation_invariant"}',
    },
    "map": {
        "width": "channels",
        "formula": "out = x * sigmoid(W mean(x))",
        "legend": "B batch, H and W the sides of the map.",
        "checks": "check_map",
        "flops": "2*B*channels**2",
        "exponent": "0.0",
        "can": '{"permutation_equivariant"}',
    },
}


def write_skeleton(id: str, layout: str, folder: Path) -> tuple[Path, str]:
    """Write `folder/ID.py`; returns its path and the class's name. Never overwrites.

    Raises:
        RegardError: the id is no lower-case identifier, the folder is missing, or the file is there already.
    """
    require(re.fullmatch(r"[a-z][a-z0-9_]*", id) is not None, "id={!r} must be lower-case letters, digits and _, starting with a letter", id)
    require(layout in _BODIES, "layout={!r} has no skeleton; there are {}", layout, sorted(_BODIES))
    require(folder.is_dir(), "{} is not a folder", folder)
    path = folder / f"{id}.py"
    require(not path.exists(), "{} exists already; choose another id or folder", path)
    name = "".join(part.capitalize() for part in id.split("_"))
    text = Template(_HEAD).substitute(_FACTS[layout], id=id, layout=layout, name=name, title=id.replace("_", " ").capitalize())
    if layout != "map":
        text = text.replace("import torch\n", "")
    write_whole(path, text + _BODIES[layout])
    return path, name
