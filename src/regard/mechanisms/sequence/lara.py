r"""LARA: randomized attention through C Gaussian proposals that all queries share, mixed for each query by multiple importance sampling.

    L(y, w) = s w.y - s |y|^2 / 2,   s = d^-1/2;   mu_c = q~_c + k~_c from pooled queries and keys;   w_c = mu_c + noise_std eps_c, mu_c in eval
    kv_c = softmax_M(L(k, w_c)) v,   Z_c = logsumexp_M L(k, w_c),   out_n = sum_c softmax_C(log alpha_c(n) + L(q_n, w_c) + Z_c - g_c) kv_c
    mis-bh:     alpha = 1,                                g_c = logsumexp_c' P_cc',   P_cc' = L(mu_c', w_c)
    mis-biased: log alpha_c(n) = s mu_c . q_n,            g_c = logsumexp_c' P_cc'
    mis-opt:    alpha_c(n) = max(1e-8, softmax_c'(P_cc')_c + alpha_coeff (t_c(n) - mean_c t_c(n))),   t = softmax_N(s q~_c . q_n),   g_c = P_cc

Zheng, Wang, Kong, "Linear Complexity Randomized Self-attention Mechanism", ICML 2022, arXiv:2204.04667. As in the authors' code eps has variance 1 by
default; draws fit the feature for noise_std = d^(1/4) alone ("unbiased"). As there, masked positions enter the means of segments as zeros; with
mask_pooling (not in theirs) they are left out of every mean and sum. B batch, N positions, D dim, H heads, d head width, C landmarks.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, fused, rename
from ...ops._precision import at_least_float32
from ...ops.importance_sampling import Mixture, mixture_attention, mixture_weights
from ...ops.softmax_attention import attend_key_bias
from ...parts.heads import checked_source, head_width, init_truncated_, merge_heads, split_heads
from ...parts.landmarks import LandmarkNet, cell_means, segments_present
from ...parts.linear import Linear
from ...validate import check_floating, check_option

PROPOSALS = ("pool", "pool-mixed", "pool-vmixed", "no-param-pool", "no-param-pool-mixed", "no-param-pool-vmixed", "adaptive-1d")
QKV = (*(fused(f"qkv.{kind}", [f"{n}_proj.{kind}" for n in "qkv"]) for kind in ("weight", "bias")), rename("proj.*", "out_proj.*"))


def _nets(at: int) -> tuple[Any, ...]:
    return tuple(rename(f"{n}_bar_gen.{at + i}.*", f"{n}_proposal.{part}.*") for n in "qk" for i, part in enumerate(("linear", "norm")))


class LinearRandomizedAttention(Mechanism):
    """Args:
    dim: width of the input and of the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    num_landmarks: proposals C; on an image the largest square up to it.
    proposal: "pool" (means of image cells, then a linear layer and a norm), "no-param-pool" (the means alone), either with "-mixed" (key landmarks
        attend to one another) or "-vmixed" (the same, weighed by pooled values); "adaptive-1d" (layer and norm, then means of segments).
    pool_module: layer and norm work on each head ("light") or on all heads together ("dense").
    mis_type: "mis-opt", "mis-bh" or "mis-biased". alpha_coeff: of the part of alpha that depends on the query.
    antithetic: in training two samples, mu + e and mu - e, of each proposal. multisample: two independent ones.
    noise_std: standard deviation of the noise in training, or "unbiased" for head_dim ** 0.25.
    mask_pooling: masked positions are in no landmark and no softmax; "adaptive-1d" only. Then a padded batch gives what its sequences give alone.
    grid_size: (height, width) of the image, unless given to forward.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping an output channel in training.
    """

    card: ClassVar = Card(
        id="lara",
        layout="sequence",
        paper=Paper(
            title="Linear Complexity Randomized Self-attention Mechanism",
            authors="Lin Zheng, Chong Wang, Lingpeng Kong",
            venue="ICML",
            year=2022,
            arxiv="2204.04667",
        ),
        source="HKUNLP/efficient-attention lara.py (Apache-2.0)",
        summary="Linear attention through a few dozen landmark proposals that every query mixes by importance sampling.",
        when="Vision transformers and long encoders where a few dozen summaries per head are enough; no causal order.",
        flops="8*B*N*dim*width + 4*B*width*net_width*(N if proposal == 'adaptive-1d' else landmarks)"
        " + 2*B*num_heads*min(N, landmarks)*(N*(5*head_dim + 2 if mis_type == 'mis-opt' else 4*head_dim + 4) + min(N, landmarks)*head_dim)"
        " + (4*B*num_heads*landmarks**2*(head_dim + 1) if mixed else 0)",
        grows={"N": 1.0},
        can=frozenset({"key_mask", "weights", "rows", "row_stochastic", "linear", "qkv_core"}),
        unless={"key_mask": "not mask_pooling", "qkv_core": "grid_size is None and proposal != 'adaptive-1d'"},
        uncertain="mask_pooling is not in the authors' code.",
        example={"dim": 32, "num_heads": 4, "num_landmarks": 5, "proposal": "adaptive-1d", "mask_pooling": True},
        variants=(
            {"dim": 24, "num_heads": 3, "num_landmarks": 6, "proposal": "adaptive-1d", "mis_type": "mis-bh"},
            {"dim": 24, "num_heads": 3, "num_landmarks": 4, "proposal": "pool-vmixed", "pool_module": "dense", "grid_size": (5, 7)},
            {"dim": 24, "num_heads": 2, "num_landmarks": 9, "proposal": "no-param-pool", "mis_type": "mis-biased", "grid_size": (6, 4)},
        ),
    )
    official: ClassVar = (
        KeyMap("HKUNLP/efficient-attention (pool)", (*QKV, *_nets(2))),
        KeyMap("HKUNLP/efficient-attention (adaptive-1d)", (*QKV, *_nets(0))),
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        num_landmarks: int = 49,
        proposal: str = "pool",
        pool_module: Literal["light", "dense"] = "light",
        mis_type: Literal["mis-opt", "mis-bh", "mis-biased"] = "mis-opt",
        alpha_coeff: float = 1.0,
        antithetic: bool = False,
        multisample: bool = False,
        noise_std: float | Literal["unbiased"] = 1.0,
        mask_pooling: bool = False,
        grid_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        check_option(proposal, PROPOSALS, "proposal")
        check_option(pool_module, ("light", "dense"), "pool_module")
        check_option(mis_type, ("mis-opt", "mis-bh", "mis-biased"), "mis_type")
        known = noise_std == "unbiased" if isinstance(noise_std, str) else noise_std >= 0
        require(known, "noise_std={!r} must be a number from 0 up, or 'unbiased'", noise_std)
        require(num_landmarks > 0, "num_landmarks={} must be at least 1", num_landmarks)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.num_landmarks, self.proposal, self.pool_module, self.mis_type = num_landmarks, proposal, pool_module, mis_type
        self.alpha_coeff, self.antithetic, self.multisample, self.noise_std = alpha_coeff, antithetic, multisample, noise_std
        self.mask_pooling, self.grid_size, self.dropout = mask_pooling, grid_size, dropout
        self.qkv_bias, self.out_bias = qkv_bias, out_bias
        self.segmented, self.mixed = proposal == "adaptive-1d", proposal.endswith("mixed")
        require(self.segmented or not mask_pooling, "mask_pooling=True needs proposal='adaptive-1d', got proposal={!r}", proposal)
        require(not self.segmented or pool_module == "light", "pool_module={!r} pools an image, proposal='adaptive-1d' does not", pool_module)
        self.width, self.side = num_heads * self.head_dim, math.isqrt(num_landmarks)
        self.landmarks = num_landmarks if self.segmented else self.side**2
        if self.landmarks != num_landmarks:
            warnings.warn(f"num_landmarks={num_landmarks} is no square: {self.landmarks} landmarks are pooled", stacklevel=2)
        dd = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, self.width, qkv_bias, **dd)
        self.k_proj = Linear(dim, self.width, qkv_bias, **dd)
        self.v_proj = Linear(dim, self.width, qkv_bias, **dd)
        self.out_proj = Linear(self.width, dim, out_bias, **dd)
        self.net_width = 0 if proposal.startswith("no-param") else self.width if pool_module == "dense" else self.head_dim
        if self.net_width:
            self.q_proposal, self.k_proposal = LandmarkNet(self.net_width, **dd), LandmarkNet(self.net_width, **dd)
        init_truncated_(*(layer for layer in self.modules() if isinstance(layer, nn.Linear)))

    def key_maps(self) -> tuple[KeyMap, ...]:
        return (self.official[self.segmented],)

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Tokens; as many as the image has pixels."""
        return {"x": torch.randn(batch, math.prod(options.get("grid_size") or (size,)), options["dim"], generator=generator)}

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Tensor | None = None,
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        attn_mask: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        noise: Float[Tensor, "b h c d"] | None = None,
        generator: torch.Generator | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Returns (B, N, dim), or that and the weights (B, H, N, N) that multiply the values.

        `noise` (B, H, C, d), with multisample (B, H, 2 C, d), is used as it is, in eval too; without it training draws its own.
        """
        require(context is None and attn_mask is None, "lara mixes summaries of x alone: it takes no context and no attn_mask{}; use key_mask", "")
        checked_source(x, None, self.dim, self.dim, key_mask)
        q, k, v = self._heads(x)
        mixture = self._mixture(q, k, v, key_mask, grid_size, noise, generator)
        out = self.out_proj(merge_heads(mixture_attention(mixture, v)))
        out = F.dropout(out, self.dropout, self.training)
        return (out, mixture_weights(mixture).to(x.dtype)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b h r n"]:
        """What multiplies the values, for R chosen positions of `x` alone; for all if None."""
        checked_source(x, None, self.dim, self.dim, key_mask)
        q, k, v = self._heads(x)
        return mixture_weights(self._mixture(q, k, v, key_mask, grid_size, noise, generator), queries).to(x.dtype)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        grid_size: tuple[int, int] | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The core alone, on (B, H, N, d)."""
        return mixture_attention(self._mixture(q, k, v, key_mask, grid_size, noise, generator), v)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(self.q_proj(x), self.num_heads), split_heads(self.k_proj(x), self.num_heads), split_heads(self.v_proj(x), self.num_heads)

    def _mixture(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        grid_size: tuple[int, int] | None,
        noise: Tensor | None,
        generator: torch.Generator | None,
    ) -> Mixture:
        mask, grid = None if key_mask is None else key_mask[:, None], grid_size or self.grid_size
        require(grid is None or math.prod(grid) == q.shape[2], "grid_size={} does not fit {} positions", grid, q.shape[2])
        counted, present = mask if self.mask_pooling else None, None
        if self.segmented:
            count = min(q.shape[2], self.landmarks)
            if mask is not None:
                q, k = (t.masked_fill(~mask.unsqueeze(-1), 0.0) for t in (q, k))
            q_centres, k_centres = self.q_proposal.segment_means(q, count, counted), self.k_proposal.segment_means(k, count, counted)
            present = None if counted is None else segments_present(counted, count)
        else:
            require(grid is not None, "proposal={!r} pools an image: give grid_size=(height, width) to the call or to the module", self.proposal)
            assert grid is not None
            q_centres, k_centres = self._pooled(q, k, v, grid)
        samples = self._samples(q_centres + k_centres, noise, generator)
        return Mixture(q, k, q_centres, k_centres, samples, self.mis_type, self.alpha_coeff, mask, counted, present)

    def _pooled(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Landmarks of queries and of keys from the cells of an image."""
        if min(grid) < self.side and not torch.compiler.is_compiling():
            warnings.warn(f"an image of {grid} is smaller than its {self.side} x {self.side} landmarks: some are the same", stacklevel=4)
        q, k = cell_means(q, grid, self.side), cell_means(k, grid, self.side)
        if self.net_width:
            dense, nets = self.pool_module == "dense", (self.q_proposal, self.k_proposal)
            q, k = (split_heads(net(merge_heads(t)), self.num_heads) if dense else net(t) for net, t in zip(nets, (q, k), strict=True))
        if self.mixed:
            weighed = self.proposal.endswith("vmixed")
            bias = (cell_means(v, grid, self.side).norm(dim=-1) + 1e-4).log() if weighed else k.new_zeros(k.shape[:3])
            k = attend_key_bias(k, k, k, bias)
        return q, k

    def _samples(self, mu: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        b, h, c, d = mu.shape
        shape = (b, h, 2 * c if self.multisample else c, d)
        if noise is None:
            if not self.training:
                return mu
            noise = torch.randn(shape, generator=generator, dtype=at_least_float32(mu), device=mu.device)
        check_floating(noise, "noise")
        require(tuple(noise.shape) == shape, "noise must have shape {}, got {}", shape, tuple(noise.shape))
        e = noise * (self.head_dim**0.25 if self.noise_std == "unbiased" else float(self.noise_std))
        if self.multisample:
            return torch.cat((mu, mu), 2) + e
        return torch.cat((mu + e, mu - e), 2) if self.antithetic else mu + e
