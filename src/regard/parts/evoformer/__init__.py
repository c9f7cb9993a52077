"""The parts of AlphaFold 2's Evoformer and its invariant point attention, one algorithm of the supplement each. All give the update alone.

B batch, S sequences, N residues, H heads, d head width; msa (B, S, N, c_m), pair (B, N, N, c_z), single (B, N, c_s). Parameters are named as in
OpenFold. Masks are boolean, True = there.
"""

from .block import Block
from .ipa import InvariantPointAttention
from .msa import MSAColumnAttention, MSAColumnGlobalAttention, MSARowAttention
from .outer import OuterProductMean
from .transition import MSATransition, PairTransition
from .triangle import TriangleAttention, TriangleMultiplication

__all__ = [
    "Block",
    "InvariantPointAttention",
    "MSAColumnAttention",
    "MSAColumnGlobalAttention",
    "MSARowAttention",
    "MSATransition",
    "OuterProductMean",
    "PairTransition",
    "TriangleAttention",
    "TriangleMultiplication",
]
