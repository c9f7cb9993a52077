"""What the parts ask of their inputs, before any work."""

from torch import Tensor

from ...errors import require
from ...validate import check_floating, check_mask


def check_widths(**widths: int) -> None:
    for name, value in widths.items():
        require(isinstance(value, int) and value > 0, "{}={!r} must be a whole number from 1 up", name, value)


def check_msa(msa: Tensor, dim: int, mask: Tensor | None) -> None:
    """`msa` must be (B, S, N, dim), its mask (B, S, N)."""
    check_floating(msa, "msa")
    require(msa.ndim == 4, "msa must be (batch, sequences, residues, {}), got {} axes: {}", dim, msa.ndim, tuple(msa.shape))
    require(msa.shape[3] == dim, "msa has width {} but this module was made with msa_dim={}; msa is {}", msa.shape[3], dim, tuple(msa.shape))
    require(min(msa.shape[1:3]) > 0, "msa has no sequence or no residue: {}", tuple(msa.shape))
    check_mask(mask, *msa.shape[:3], name="msa_mask")


def check_pair(pair: Tensor, dim: int, mask: Tensor | None = None, like: tuple[str, Tensor, int] | None = None) -> None:
    """`pair` must be (B, N, N, dim), its mask (B, N, N). `like`: an input, its name, and which of its axes are the residues."""
    check_floating(pair, "pair")
    require(pair.ndim == 4, "pair must be (batch, residues, residues, {}), got {} axes: {}", dim, pair.ndim, tuple(pair.shape))
    require(pair.shape[3] == dim, "pair has width {} but this module was made with pair_dim={}; pair is {}", pair.shape[3], dim, tuple(pair.shape))
    require(pair.shape[1] == pair.shape[2] > 0, "pair must have as many rows as columns, one for each residue; it is {}", tuple(pair.shape))
    check_mask(mask, *pair.shape[:3], name="pair_mask")
    if like is not None:
        name, other, axis = like
        same = pair.shape[0] == other.shape[0] and pair.shape[1] == other.shape[axis]
        require(same, "pair and {} differ in batch or residues: pair is {}, {} is {}", name, tuple(pair.shape), name, tuple(other.shape))


def check_frames(single: Tensor, rotations: Tensor, translations: Tensor) -> None:
    """One frame for each residue of `single` (B, N, c)."""
    b, n, _ = single.shape
    for name, t, shape in (("rotations", rotations, (b, n, 3, 3)), ("translations", translations, (b, n, 3))):
        check_floating(t, name)
        require(tuple(t.shape) == shape, "{} must be {}, one for each residue of single, got {}", name, shape, tuple(t.shape))
