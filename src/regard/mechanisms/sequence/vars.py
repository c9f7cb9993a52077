r"""VARS: tokens are replaced by their reconstruction from a sparse code, found by a few recurrent steps on a dictionary.

    out = P z,   z ~ argmin 0.5 |v - P z|^2 + lam |z|_1,   z <- S(z - (U P^T P U z - P^T v) / L)   for num_steps steps

    d   P = random features of the queries, so the dictionary depends on the input; U, lam and L are learned too
    sd  learned atoms, one entry for each position, beside those
    s   code_ratio kernels as large as the grid for each channel, applied in the Fourier domain; then a filter and a BatchNorm

Shi, Song, Joshi, Darrell, Wang, "Visual Attention Emerges from Recurrent Sparse Reconstruction", ICML 2022. arXiv:2204.10962.
B batch, N tokens (row-major on a grid for s and sd), H heads, d head width, m atoms. The paper's threshold S is soft; d and sd follow the code, which
takes a GELU in place of the ReLU. There s is a whole block: ours is its attention without the residual and the MLP.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap
from ...ops.sparse_recon import SHRINK, fourier_recon, largest_singular, sparse_recon
from ...parts.heads import head_width, merge_heads, split_heads
from ...parts.linear import Linear
from ...validate import check_option, check_tokens

_HEADS = "2*B*N*dim*(3*dim + 3*atoms) + 2*B*N*num_heads*atoms**2 + 2*B*num_heads*all_atoms**2*(2*all_atoms*(num_steps > 0) + num_steps*head_dim)"
_STATIC = "(2*N*atoms*(2*B*dim + (B + 1)*num_heads*atoms) if variant == 'sd' else 0)"


class VARS(Mechanism):
    """Args:
    variant: "d" (dynamic dictionary), "sd" (static atoms beside it) or "s" (convolutional).
    dim, num_heads: width of the tokens, heads it is split into; "s" treats every channel alone.
    grid_size: side, or (height, width), of the grid that the tokens stand on; "s" and "sd" need it.
    qkv_bias: biases of the projections to queries and values.
    lam: weight of sparsity; 0.3, for "s" 3.5, if None.
    num_steps: recurrent steps; 5, for "s" 3, if None.
    feature_ratio: random features as a multiple of the head width.
    code_ratio: kernels of each channel ("s").
    shrink: "gelu" or "relu"; None means "gelu", for "s" "relu".
    dropout: probability of dropping an output channel in training.
    """

    card: ClassVar = Card(
        id="vars",
        layout="sequence",
        paper=Paper(
            title="Visual Attention Emerges from Recurrent Sparse Reconstruction",
            authors="Baifeng Shi, Yale Song, Neel Joshi, Trevor Darrell, Xin Wang",
            venue="ICML",
            year=2022,
            arxiv="2204.10962",
        ),
        source="bfshi/VARS (no licence file)",
        summary="Tokens rebuilt from a sparse code on a dictionary, by a few recurrent steps.",
        when="Vision transformers that must bear corrupted or shifted images, at a cost linear in the number of tokens.",
        flops=f"4*B*N*dim**2 if variant == 's' else {_HEADS} + {_STATIC}",
        grows={"N": 1.0},
        can=frozenset({"linear", "permutation_equivariant", "batch_statistics"}),
        unless={"linear": "variant == 's'", "permutation_equivariant": "variant != 'd'", "batch_statistics": "variant != 's'"},
        checked_against="authors",
        example={"dim": 16, "num_heads": 2},
        variants=(
            {"variant": "sd", "dim": 16, "num_heads": 2, "grid_size": (3, 4), "qkv_bias": True},
            {"variant": "s", "dim": 6, "grid_size": (3, 4), "lam": 0.5},
            {"variant": "d", "dim": 18, "num_heads": 3, "feature_ratio": 3, "num_steps": 2, "shrink": "relu", "lam": 0.1},
        ),
        returns=("out", "code"),
        # No gradient flows through the step bound L.
        bounds={"gradcheck_in_float64": (float("inf"), "variant != 's' and num_steps > 0")},
    )
    L: Tensor
    rand_matrix: Tensor
    official: ClassVar = (KeyMap("bfshi/VARS", ignore=("L",)), KeyMap("bfshi/VARS block", ignore=("kernel_norm", r"mlp\..*", r"norm2\..*")))

    def __init__(
        self,
        variant: Literal["d", "sd", "s"] = "d",
        dim: int | None = None,
        num_heads: int = 8,
        grid_size: int | tuple[int, int] | None = None,
        qkv_bias: bool = False,
        lam: float | None = None,
        num_steps: int | None = None,
        feature_ratio: int = 2,
        code_ratio: int = 5,
        shrink: Literal["gelu", "relu"] | None = None,
        dropout: float = 0.0,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(variant, ("d", "sd", "s"), "variant")
        check_option(shrink, (None, *SHRINK), "shrink")
        require(dim is not None and dim > 0, "vars needs dim=..., got dim={}", dim)
        assert dim is not None
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        require(num_steps is None or num_steps >= 0, "num_steps={} must not be negative", num_steps)
        require(feature_ratio >= 1 and code_ratio >= 1, "feature_ratio={} and code_ratio={} must be at least 1", feature_ratio, code_ratio)
        conv = variant == "s"
        self.variant, self.dim, self.num_heads, self.qkv_bias, self.dropout = variant, dim, num_heads, qkv_bias, dropout
        self.lam = (3.5 if conv else 0.3) if lam is None else lam
        self.num_steps = (3 if conv else 5) if num_steps is None else num_steps
        self.feature_ratio, self.code_ratio, self.shrink = feature_ratio, code_ratio, shrink or ("relu" if conv else "gelu")
        self.grid_size = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
        height, width = self.grid_size or (1, 1)
        needs = variant == "d" or (self.grid_size is not None and min(height, width) > 0)
        require(needs, "variant={!r} needs grid_size=..., the side or the (height, width) of the tokens' grid; got {}", variant, grid_size)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if conv:
            spectrum = (height, width // 2 + 1, 2)
            k = torch.randn(dim, code_ratio, 1, *spectrum, **dd)
            self.kernel = nn.Parameter(k / (k.square().sum((2, 3, 4, 5), keepdim=True) * 2 / (height * width)).sqrt())
            self.kernel2 = nn.Parameter(0.02 * torch.randn(dim, 1, 1, *spectrum, **dd))
            self.v = Linear(dim, dim, qkv_bias, **dd)
            self.norm1 = nn.ModuleDict({"bn": nn.BatchNorm1d(dim, **dd)})
            self.register_buffer("L", torch.ones(dim, **dd))
            self.update_L(1.0)
        else:
            self.head_dim = head_width(dim, num_heads, None)
            self.atoms = feature_ratio * self.head_dim
            self.all_atoms = self.atoms * (2 if variant == "sd" else 1)
            self.qkv = Linear(dim, 2 * dim, qkv_bias, **dd)
            self.register_buffer("rand_matrix", torch.randn(num_heads, self.head_dim, self.atoms, **dd))
            if variant == "sd":
                self.kernel = nn.Parameter(torch.randn(1, num_heads, height * width, self.atoms, **dd))
            self.learned_k = nn.Parameter(torch.eye(self.all_atoms, **dd))
            self.learned_lam = nn.Parameter(torch.ones(1, **dd))
            self.learned_L = nn.Parameter(torch.ones(1, **dd))
        self.proj = Linear(dim, dim, **dd)

    def key_maps(self) -> tuple[KeyMap, ...]:
        return self.official[1:] if self.variant == "s" else self.official[:1]

    def forward(
        self, x: Float[Tensor, "b n dim"], *, random_features: Float[Tensor, "h d m"] | None = None, return_code: bool = False
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Tokens (B, N, dim) to (B, N, dim).

        Args:
            random_features: in place of the buffer `rand_matrix` ("d" and "sd").
            return_code: also the code, (B, H, atoms, head_dim), for "s" (B, dim, code_ratio, height, width).
        """
        check_tokens(x, self.dim)
        if self.variant != "d":
            height, width = self.grid_size or (0, 0)
            require(x.shape[1] == height * width, "x has {} tokens, but grid_size={} has {}", x.shape[1], (height, width), height * width)
        out, code = self._by_channel(x, random_features, return_code) if self.variant == "s" else self._by_head(x, random_features, return_code)
        out = F.dropout(self.proj(out), self.dropout, self.training)
        return out if code is None else (out, code.to(x.dtype))

    def _by_head(self, x: Tensor, random: Tensor | None, return_code: bool) -> tuple[Tensor, Tensor | None]:
        drawn = self.rand_matrix if random is None else random
        fits = drawn.shape == self.rand_matrix.shape
        require(fits, "random_features must be {}, got {}", tuple(self.rand_matrix.shape), tuple(drawn.shape))
        q, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(2, -1))
        out, code = sparse_recon(
            q,
            v,
            drawn,
            static=self.kernel if self.variant == "sd" else None,
            mixing=self.learned_k,
            threshold=self.learned_lam * self.lam,
            step=self.learned_L,
            steps=self.num_steps,
            shrink=self.shrink,
        )
        return merge_heads(out), code if return_code else None

    def _by_channel(self, x: Tensor, random: Tensor | None, return_code: bool) -> tuple[Tensor, Tensor | None]:
        require(random is None, "variant='s' has no random features")
        norm = self.norm1["bn"]
        require(
            not norm.training or x.shape[0] * x.shape[1] > 1,
            "the BatchNorm of variant='s' cannot train on one value: use a larger batch or grid, or eval()",
        )
        maps = self.v(x).mT.unflatten(2, self.grid_size)
        options: dict[str, Any] = {"lam": self.lam, "steps": self.num_steps, "shrink": self.shrink, "return_code": return_code}
        out, code = fourier_recon(maps, self.kernel.squeeze(2), self.kernel2[:, 0, 0], self.L, **options)
        return norm(out.flatten(2)).mT, code

    @torch.no_grad()
    def update_L(self, momentum: float = 0.1) -> None:
        """Move the step bound of "s" towards that of the present kernels; the authors do so every 100 training steps. "d" and "sd" keep none."""
        if self.variant == "s":
            self.L.lerp_(largest_singular(self.kernel[:, :, 0]).to(self.L.dtype), momentum)

    @staticmethod
    def example_inputs(options: dict[str, Any], *, batch: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A grid fixes the number of tokens."""
        height, width = options.get("grid_size", (1, size))
        return {"x": torch.randn(batch, height * width, options["dim"], generator=generator)}
