r"""Masked linear attention: kernel attention times a mask that depends on relative positions alone, without the N x N matrix.

    A = (phi(q) phi(k)^T) * M + eps,   out = (A v) / (A 1),   M_ij = act(rpe[h, i - j]) on a line, act(rpe[h, i_1 - j_1, i_2 - j_2, ...]) on a grid
    "relu": phi(q) = relu(q / sqrt(d)) + 1e-8, phi(k) = relu(k) + 1e-8             "elu": phi(y) = elu(y) + 1
    "favor": phi(y) = exp(W y' - |y'|^2 / 2) / sqrt(m), y' = y d^-1/4

Choromanski et al., "From block-Toeplitz matrices to differential equations on graphs: towards a general theory for scalable masked Transformers",
ICML 2022, arXiv:2107.07999; exp of a Toeplitz mask: Luo et al., NeurIPS 2021. eps and the projections are those of the authors' Flax code. Not as
there: it subtracts a large number for masked keys before the product with M; here they leave both sums. Prefix tokens have M = 1. With
rpe_activation="none" the sum A 1 may vanish or change its sign: nothing is clamped. B batch, N queries, M keys, D dim, H heads, d head width,
m features, p prefix tokens.
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule
from ...ops.linear_attention import chunk_size, full_precision, linear_attention, toeplitz_dense_up_to, toeplitz_mask, toeplitz_product
from ...ops.linear_attention.running import RunningSums, running_start, running_step
from ...parts.feature_maps import kernel_features, random_projection
from ...parts.heads import check_position, checked_source, head_width, init_projections_, merge_heads, split_heads
from ...parts.linear import Linear
from ...validate import check_option

ACTIVATIONS = {"abs": torch.abs, "exp": torch.exp, "none": lambda t: t}


def _flax() -> KeyMap:
    """Kernels (dim, H, d), that of the output (H, d, dim), biases (H, d), and a table whose first row and column are never read."""

    def kernel(name: str, ours: str, heads: int) -> Rule:
        def read(tensors: list[Tensor], module: Any) -> list[Tensor]:
            return [tensors[0].flatten(heads, heads + 1).mT.contiguous()]

        def write(tensors: list[Tensor], module: Any) -> list[Tensor]:
            return [tensors[0].mT.unflatten(heads, (module.num_heads, -1)).contiguous()]

        return Rule((f"{name}.kernel",), (f"{ours}.weight",), read, write)

    def flat(tensors: list[Tensor], module: Any) -> list[Tensor]:
        return [tensors[0].flatten()]

    def by_head(tensors: list[Tensor], module: Any) -> list[Tensor]:
        return [tensors[0].unflatten(0, (module.num_heads, -1))]

    def table(tensors: list[Tensor], module: Any) -> list[Tensor]:
        return [tensors[0].unflatten(1, [2 * n for n in module.grid_size])[:, 1:, 1:].contiguous()]

    def padded(tensors: list[Tensor], module: Any) -> list[Tensor]:
        return [F.pad(tensors[0], (1, 0, 1, 0)).flatten(1)]

    inner = [(name, f"{name[0]}_proj") for name in ("query", "key", "value")]
    biases = [*(Rule((f"{name}.bias",), (f"{ours}.bias",), flat, by_head) for name, ours in inner), Rule(("out.bias",), ("out_proj.bias",))]
    kernels = [*(kernel(name, ours, 1) for name, ours in inner), kernel("out", "out_proj", 0)]
    return KeyMap("google-research/scenic (Flax)", (*kernels, *biases, Rule(("toeplitz_params",), ("rpe",), table, padded)))


FLAX = _flax()


class MaskedLinearAttention(Mechanism):
    """Args:
    dim: width of the input and the output.
    num_heads, head_dim: number of heads and width of each; head_dim=None means dim // num_heads.
    mask: "none", "toeplitz" (a line of at most `max_len` positions) or "block_toeplitz" (a grid of `grid_size`, its tokens row by row).
    num_prefix_tokens: tokens before those of the line or grid (class tokens) that every token meets with M = 1.
    feature_map: "relu", "elu" or "favor"; num_features: rows of its random projection, int(d ln d) if None.
    rpe_activation: "abs", "exp" or "none"; rpe starts where the mask is one.
    causal: query i sees keys j <= i, in the order of the tokens.
    qkv_bias, out_bias: biases of the projections.
    eps: added to every allowed pair.
    dropout: probability of dropping an output channel in training.
    method: "dense", "fft" or "auto". FFTs round relative to the largest term: with "exp" of a wide range take "dense", or float64.
    """

    card: ClassVar = Card(
        id="masked_linear",
        layout="sequence",
        paper=Paper(
            title="From block-Toeplitz matrices to differential equations on graphs: towards a general theory for scalable masked Transformers",
            authors="Krzysztof Choromanski, Han Lin, Haoxian Chen, Tianyi Zhang, Arijit Sehanobish, Valerii Likhosherstov, Jack Parker-Holder, "
            "Tamas Sarlos, Adrian Weller, Thomas Weingarten",
            venue="ICML",
            year=2022,
            arxiv="2107.07999",
        ),
        source="google-research/scenic (Apache-2.0)",
        summary="Kernel attention times a learned mask of relative positions, applied by FFT or in pieces.",
        when="Linear attention that must know where tokens stand: image patches, or sequences of thousands of positions.",
        # An FFT of L real numbers is taken as 5/2 L log2 L operations, at twice the sides of the grid.
        flops="4*B*dim*num_heads*head_dim*(N + M) + (2*B*num_heads*(N + M)*head_dim*num_features if feature_map == 'favor' else 0) + 2*B*num_heads*("
        "((N + M)*(m + 1)*(head_dim + 1) if not causal else ceil(N/min(chunk, N))*min(chunk, N)**2*(m + head_dim + 2)"
        " + 2*(ceil(N/min(chunk, N)) - 1)*min(chunk, N)*(m + 1)*(head_dim + 1)) if mask == 'none' else"
        " (((N - p)**2*(0.5 if causal else 1) + (p**2 if causal else 0))*(m + head_dim + 1)"
        " if method == 'dense' or (method == 'auto' and N - p <= dense_up_to) else"
        " m*(head_dim + 1)*(N - p)*(2.5*2**axes*log2(2**axes*(N - p)) + 2))"
        " + (m*(head_dim + 1)*(N + (0 if causal else N + p)) if p else 0))",
        grows={"N": 1.1},
        can=frozenset({"causal", "cross", "key_mask", "weights", "rows", "row_stochastic", "step", "permutation_equivariant"}),
        unless={
            "cross": "mask != 'none' or causal",
            "step": "mask != 'none' or not causal",
            "row_stochastic": "rpe_activation == 'none'",
            "permutation_equivariant": "mask != 'none'",
        },
        uncertain="The 1-d and causal masks, prefix tokens and FFTs were checked against the equations; official code exists for grids, dense.",
        example={"dim": 32, "num_heads": 4, "max_len": 32768},
        variants=(
            {"dim": 24, "num_heads": 3, "mask": "none", "feature_map": "elu"},
            {"dim": 24, "num_heads": 2, "mask": "none", "feature_map": "favor", "num_features": 10, "causal": True},
            {"dim": 24, "num_heads": 2, "max_len": 16384, "feature_map": "elu", "rpe_activation": "exp", "causal": True, "num_prefix_tokens": 1},
            {"dim": 24, "num_heads": 2, "max_len": 16384, "feature_map": "elu", "rpe_activation": "exp", "method": "fft"},
        ),
        # The FFTs add and subtract what lies ahead: it leaves its rounding behind.
        bounds={"no_gradient_from_the_future": (1e-5, "mask != 'none' and method == 'fft'")},
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mask: Literal["none", "toeplitz", "block_toeplitz"] = "toeplitz",
        *,
        max_len: int | None = None,
        grid_size: tuple[int, ...] | None = None,
        num_prefix_tokens: int = 0,
        feature_map: Literal["relu", "elu", "favor"] = "relu",
        num_features: int | None = None,
        rpe_activation: Literal["abs", "exp", "none"] = "abs",
        causal: bool = False,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        eps: float = 1e-8,
        dropout: float = 0.0,
        method: Literal["auto", "fft", "dense"] = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(mask, ("none", "toeplitz", "block_toeplitz"), "mask")
        check_option(feature_map, ("relu", "elu", "favor"), "feature_map")
        check_option(rpe_activation, tuple(ACTIVATIONS), "rpe_activation")
        check_option(method, ("auto", "fft", "dense"), "method")
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        require(num_prefix_tokens >= 0, "num_prefix_tokens={} must not be negative", num_prefix_tokens)
        require(mask != "toeplitz" or (max_len or 0) > 0, "mask='toeplitz' needs max_len=..., the longest line, got {}", max_len)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, head_dim)
        self.mask, self.max_len, self.grid_size, self.num_prefix_tokens = mask, max_len, grid_size and tuple(grid_size), num_prefix_tokens
        sides = {"none": (), "toeplitz": (max_len or 0,), "block_toeplitz": self.grid_size or (0,)}[mask]
        require(min(sides, default=1) > 0, "mask='block_toeplitz' needs grid_size=(height, width, ...), got {}", grid_size)
        self.feature_map, self.rpe_activation, self.causal, self.method = feature_map, rpe_activation, causal, method
        self.qkv_bias, self.out_bias, self.eps, self.dropout = qkv_bias, out_bias, eps, dropout
        d = self.head_dim
        self.num_features = (max(1, int(d * math.log(d))) if num_features is None else num_features) if feature_map == "favor" else None
        require(feature_map == "favor" or num_features is None, "num_features={} needs feature_map='favor', got {!r}", num_features, feature_map)
        require(self.num_features is None or self.num_features > 0, "num_features={} must be at least 1", num_features)
        self.m, self.p, self.axes = self.num_features or d, num_prefix_tokens, len(sides)  # as the cost formula calls them
        self.chunk, self.dense_up_to = chunk_size(self.m + 1, d + 1), toeplitz_dense_up_to(self.axes, self.m, d + 1, causal)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj, self.k_proj, self.v_proj = (Linear(dim, num_heads * d, qkv_bias, **dd) for _ in range(3))
        self.out_proj = Linear(num_heads * d, dim, out_bias, **dd)
        init_projections_(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        start = torch.zeros if rpe_activation == "exp" else torch.ones
        self.rpe = nn.Parameter(start(num_heads, *(2 * n - 1 for n in sides), **dd)) if sides else None
        drawn = random_projection(self.num_features, d, num_heads=num_heads, **dd) if self.num_features else None
        self.feature_projection: Tensor | None
        self.register_buffer("feature_projection", drawn)

    def key_maps(self) -> tuple[KeyMap, ...]:
        return (FLAX,) if self.mask == "block_toeplitz" and self.axes == 2 else ()

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Tensor | None = None,
        feature_projection: Tensor | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Attend from `x` to `context` (mask="none" alone; to `x` itself if None). Returns (B, N, dim), or that and the weights (B, H, N, M).

        `feature_projection`, (m, d) or (H, m, d), replaces the module's own in this call.
        """
        require(attn_mask is None, "masked_linear never forms the pairs that attn_mask={} would hide; use key_mask or causal=True", "...")
        source = self._source(x, context, key_mask)
        q, k = self._features(x, source, feature_projection)
        v = split_heads(self.v_proj(source), self.num_heads)
        with full_precision(v):
            out = self._mix(q, k, v.to(q.dtype), None if key_mask is None else key_mask[:, None]).to(v.dtype)
        out = F.dropout(self.out_proj(merge_heads(out)), self.dropout, self.training)
        return (out, self.weights(x, context, key_mask=key_mask, feature_projection=feature_projection)) if return_weights else out

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        feature_projection: Tensor | None = None,
    ) -> Float[Tensor, "b h r m"]:
        """What multiplies the values, A / (A 1), for R chosen positions of `x` alone; for all if None."""
        source = self._source(x, context, key_mask)
        at = torch.arange(x.shape[1], device=x.device) if queries is None else queries
        q, k = self._features(x if queries is None else x[:, queries], source, feature_projection)
        with full_precision(q):
            a = q @ k.mT
            if self.rpe is not None:
                rows = toeplitz_mask(self._table(x.shape[1]), (at - self.p).clamp_min(0))
                a = a * F.pad(torch.where(at[:, None] >= self.p, rows, 1.0), (self.p, 0), value=1.0)[..., : a.shape[3]]
            a = a + self.eps
            if key_mask is not None:
                a = a.masked_fill(~key_mask[:, None, None], 0.0)
            if self.causal:
                a = a.masked_fill(torch.arange(a.shape[3], device=x.device) > at[:, None], 0.0)
            total = a.sum(-1, keepdim=True)
            return (a / total.masked_fill(total == 0, 1.0)).to(x.dtype)

    def init_state(self, batch: int) -> RunningSums:
        """The state before the first position of `batch` sequences; step by step needs mask="none" and causal=True."""
        steps = self.causal and self.mask == "none"
        require(steps, "masked_linear runs step by step with mask='none' and causal=True, got mask={!r}, causal={}", self.mask, self.causal)
        return running_start(batch, self.num_heads, self.m + 1, self.head_dim, self.q_proj.weight)

    def step(self, x: Float[Tensor, "b dim"], state: RunningSums) -> tuple[Float[Tensor, "b dim"], RunningSums]:
        """One more position: its output, that of the whole sequence so far at its end, and the new state."""
        check_position(x, self.dim)
        q, k = self._features(x[:, None], x[:, None], None)
        v = split_heads(self.v_proj(x[:, None]), self.num_heads)
        out, state = running_step(F.pad(q, (0, 1), value=self.eps), F.pad(k, (0, 1), value=1.0), v, state)
        return self.out_proj(merge_heads(out.to(v.dtype)))[:, 0], state

    def _source(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None) -> Tensor:
        require(context is None or (self.mask == "none" and not self.causal), "context needs mask='none' and causal=False, got {!r}", self.mask)
        source = checked_source(x, context, self.dim, self.dim, key_mask)
        if self.rpe is not None:
            n, p = x.shape[1] - self.p, self.p
            if self.mask == "toeplitz":
                require(n <= (self.max_len or 0), "x has {} positions after {} prefix tokens, more than max_len={}", n, p, self.max_len)
            else:
                whole = math.prod(self.grid_size or ())
                require(n == whole, "x has {} positions after {} prefix tokens, but grid_size={} has {}", n, p, self.grid_size, whole)
        return source

    def _features(self, x: Tensor, source: Tensor, projection: Tensor | None) -> tuple[Tensor, Tensor]:
        """phi of the queries and keys, in at least float32."""
        q, k = split_heads(self.q_proj(x), self.num_heads), split_heads(self.k_proj(source), self.num_heads)
        if self.feature_map == "relu":
            return kernel_features(q * self.head_dim**-0.5, "relu") + 1e-8, kernel_features(k, "relu") + 1e-8
        w = self.feature_projection if projection is None else projection
        return kernel_features(q, self.feature_map, w), kernel_features(k, self.feature_map, w)

    def _table(self, positions: int) -> Tensor:
        """The mask by offset, for a sequence of so many positions."""
        assert self.rpe is not None
        table = self.rpe.to(torch.promote_types(self.rpe.dtype, torch.float32))
        if self.mask == "toeplitz":
            n, middle = max(positions - self.p, 1), table.shape[1] // 2
            table = table[:, middle - n + 1 : middle + n]
        return ACTIVATIONS[self.rpe_activation](table)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """A v / A 1 for features q, k."""
        if self.rpe is None:  # eps as one more feature
            q, k = F.pad(q, (0, 1), value=self.eps), F.pad(k, (0, 1), value=1.0)
            return linear_attention(q, k, v, mask=mask, causal=self.causal, normalize=True)
        p, v = self.p, F.pad(v, (0, 1), value=1.0)
        if mask is not None:
            gone = ~mask.unsqueeze(-1)
            k, v = k.masked_fill(gone, 0.0), v.masked_fill(gone, 0.0)
        if q.shape[2] <= p:
            sums = linear_attention(q, k, v, causal=self.causal)
        else:
            sums = toeplitz_product(q[:, :, p:], k[:, :, p:], v[:, :, p:], self._table(q.shape[2]), causal=self.causal, method=self.method)
            if p:
                first = linear_attention(q[:, :, :p], *((t[:, :, :p] for t in (k, v)) if self.causal else (k, v)), causal=self.causal)
                sums = torch.cat((first, sums + q[:, :, p:] @ (k[:, :, :p].mT @ v[:, :, :p])), 2)
        sums = sums + self.eps * (v.cumsum(2) if self.causal else v.sum(2, keepdim=True))
        return sums[..., :-1] / sums[..., -1:].masked_fill(sums[..., -1:] == 0, 1.0)
