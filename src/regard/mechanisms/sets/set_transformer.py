r"""Set Transformer: encode a set by attention, pool it by attention, decode the pooled vectors by attention.

    z = ISAB(... ISAB(x)),   out = Linear(SAB(... SAB(PMA_k(z))))                                   (see `isab`, `sab`, `pma`)

Lee, Lee, Kim, Kosiorek, Choi, Teh, "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", ICML 2019.
arXiv:1810.00825. Follows models.py of the authors' code. Dropout stands where their point cloud model has it: before the pooling and
before the last linear layer; that model is `decoder_depth=0, dropout=0.5`. B batch, N elements, k outputs, H heads.
Not in the paper: masks.
"""

from itertools import product
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...parts.linear import Linear
from ...parts.masks import zero_rows
from ...parts.set_blocks import ISAB, PMA, SAB, SET_TRANSFORMER
from ...validate import check_mask, check_option, check_tokens


class SetTransformer(Mechanism):
    """Args:
    dim: width of the elements.
    hidden_dim: width inside.
    out_dim: width of an output.
    num_outputs: number of outputs for each set.
    num_inducing: inducing points of each encoder block (encoder="isab").
    num_heads: heads of every block.
    norm: layer norms in every block.
    encoder: "isab", linear in the size of the set, or "sab", all pairs.
    encoder_depth, decoder_depth: number of encoder blocks, and of SABs after the pooling.
    dropout: probability of zeroing an entry before the pooling and before the last linear layer, in training.
    """

    card: ClassVar = Card(
        id="set_transformer",
        layout="set",
        paper=SET_TRANSFORMER,
        source="juho-lee/set_transformer@73432c6 (MIT), models.py, main_pointcloud.py",
        summary="A whole model from sets to vectors: induced attention, attention pooling, attention among the outputs.",
        when="Regression or classification of unordered sets of varying size; any number of outputs per set.",
        # Encoder (the first block reads `dim`, the others `hidden_dim`), pooling, decoder, last linear layer.
        flops=(
            "B*N*(6*(dim + (encoder_depth - 1)*hidden_dim)*hidden_dim + 2*encoder_depth*hidden_dim**2)"
            "+ encoder_depth*(((2 + 6*B)*num_inducing*hidden_dim**2 + 8*B*N*num_inducing*hidden_dim) if induced else 4*B*N**2*hidden_dim)"
            "+ (2 + 2*B)*num_outputs*hidden_dim**2 + B*N*(4*hidden_dim**2 + 4*num_outputs*hidden_dim)"
            "+ decoder_depth*B*num_outputs*(8*hidden_dim**2 + 4*num_outputs*hidden_dim) + 2*B*num_outputs*hidden_dim*out_dim"
        ),
        grows={"N": 1.0},
        can=frozenset({"mask", "linear", "weights", "row_stochastic", "permutation_invariant"}),
        unless={"linear": "encoder == 'sab'"},
        checked_against="authors",
        uncertain="Scores are scaled by the full width as in the code; the paper scales by the head width (scale='head').",
        example={"dim": 3, "hidden_dim": 16, "out_dim": 5, "num_outputs": 3, "num_inducing": 4, "num_heads": 4},
        variants=(
            {"dim": 3, "hidden_dim": 24, "out_dim": 2, "num_outputs": 4, "num_inducing": 6, "num_heads": 2, "norm": True},
            {"dim": 2, "hidden_dim": 16, "num_inducing": 3, "num_heads": 2, "encoder_depth": 1, "decoder_depth": 0, "dropout": 0.5},
        ),
    )

    def __init__(
        self,
        dim: int,
        hidden_dim: int = 128,
        out_dim: int = 1,
        num_outputs: int = 1,
        num_inducing: int = 32,
        num_heads: int = 4,
        *,
        norm: bool = False,
        encoder: Literal["isab", "sab"] = "isab",
        encoder_depth: int = 2,
        decoder_depth: int = 2,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(encoder, ("isab", "sab"), "encoder")
        require(encoder_depth > 0, "encoder_depth={} must be at least 1", encoder_depth)
        require(decoder_depth >= 0, "decoder_depth={} must not be negative", decoder_depth)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.dim, self.hidden_dim, self.out_dim, self.num_outputs = dim, hidden_dim, out_dim, num_outputs
        self.num_inducing, self.num_heads, self.norm, self.dropout = num_inducing, num_heads, norm, dropout
        self.encoder, self.encoder_depth, self.decoder_depth, self.induced = encoder, encoder_depth, decoder_depth, encoder == "isab"
        dd = {"norm": norm, "device": device, "dtype": dtype}
        widths = [dim, *[hidden_dim] * (encoder_depth - 1)]
        induced = [ISAB(width, num_heads, hidden_dim, num_inducing, **dd) for width in widths if self.induced]
        self.enc = nn.Sequential(*(induced or [SAB(width, num_heads, hidden_dim, **dd) for width in widths]))
        self.dec = nn.Sequential(
            PMA(hidden_dim, num_heads, num_outputs, **dd),
            *(SAB(hidden_dim, num_heads, **dd) for _ in range(decoder_depth)),
            Linear(hidden_dim, out_dim, device=device, dtype=dtype),
        )

    def key_maps(self) -> tuple[KeyMap, ...]:
        """Dropout modules shift the numbers of the decoder's blocks: one naming for each way of placing them."""
        maps, middle = [], (False, True) if self.decoder_depth else (False,)
        for pool, between, last in product((False, True), middle, (False, True)):
            before = [pool, *[between] * self.decoder_depth, last]
            numbers = [block + sum(before[: block + 1]) for block in range(len(before))]
            rules = tuple(rename(f"dec.{number}.*", f"dec.{block}.*") for block, number in enumerate(numbers))
            maps.append(KeyMap(f"dec at {' '.join(map(str, numbers))}" if any(before) else "models.py", rules))
        return tuple(maps)

    def forward(
        self, x: Float[Tensor, "b n dim"], *, mask: Bool[Tensor, "b n"] | None = None, return_weights: bool = False
    ) -> Float[Tensor, "b k out_dim"] | tuple[Tensor, Tensor]:
        """Elements with a False `mask` are not seen. Weights are those of the pooling, (B, H, k, N): what each output looks at."""
        check_tokens(x, self.dim)
        check_mask(mask, *x.shape[:2], name="mask")
        x = zero_rows(x, mask)
        for block in self.enc:
            x = block(x, mask=mask)
        pool, *mixers, last = self.dec
        x = torch.dropout(x, self.dropout, self.training)
        out, weights = pool(x, mask=mask, return_weights=True) if return_weights else (pool(x, mask=mask), x.new_empty(0))
        for mixer in mixers:
            out = mixer(out)
        out = last(torch.dropout(out, self.dropout, self.training))
        return (out, weights) if return_weights else out
