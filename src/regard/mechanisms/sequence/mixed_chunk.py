r"""FLASH: the gated attention unit in chunks, quadratic inside a chunk and linear between chunks.

    u, v, z = SiLU(norm(x) Wp + bp),   y_i = gamma_i z + beta_i:  quadratic q, k and linear lq, lk
    A_g = act(q_g k_g^T / c + R),   S = sum lk^T v over all chunks;  causal: S_g over the chunks before g
    out = (u * (A_g v_g + lq_g S_g)) Wo + bo  (+ x)

Hua, Dai, Liu, Le, "Transformer Quality in Linear Time", ICML 2022, arXiv:2202.10447. From lucidrains/FLASH-pytorch, not in the paper: S / N and
S_g / c (linear_scale; N counts masked positions too, so a padded batch differs from the sequence alone), T5's R with its factor sqrt(s), own chunks
alone, shifted tokens, rotary views. act and R as in `gau`. B batch, N positions, D dim, c chunk_size, g chunk, e hidden_dim, s qk_dim.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule, rename
from ...ops.gated_attention import gated_attention, gated_weights
from ...ops.gated_attention.streaming import MixedChunkState, mixed_chunk_start, mixed_chunk_step
from ...parts.gated import Activation, NormKind, check_gated, init_gated_, input_norm, relative_scores, split_projection
from ...parts.heads import check_position, check_streaming
from ...parts.linear import Linear
from ...parts.positions import rotary
from ...validate import check_mask, check_option, check_tokens


def _read_projection(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    value, gate = tensors[0].chunk(2)
    return [torch.cat((gate, value, tensors[1]))]


def _write_projection(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    gate, value, z = tensors[0].split(module.widths)  # type: ignore[arg-type]
    return [torch.cat((value, gate)), z]


def _swap_middle(tensors: list[Tensor], module: nn.Module) -> list[Tensor]:
    return [tensors[0][[0, 2, 1, 3]]]


LUCIDRAINS = (
    Rule(("to_hidden.0.*", "to_qk.0.*"), ("proj.*",), _read_projection, _write_projection),
    *(Rule((f"qk_offset_scale.{name}",), (name,), _swap_middle, _swap_middle) for name in ("gamma", "beta")),
    rename("rel_pos_bias.relative_attention_bias.weight", "rel_pos_bias.weight"),
    rename("to_out.*", "out_proj.*"),
)
# Pairs that a chunk of so many positions multiplies.
_PAIRS = "({0}*({0} + min({0}, 128))/2 if causal else {0}**2)"


class MixedChunkAttention(Mechanism):
    """Args:
    dim: width of the input and the output.
    chunk_size: c, positions in a chunk.
    qk_dim, hidden_dim: s and e; hidden_dim=None means 2 dim.
    rope_dim: so many channels of the four views are rotated by position, in neighbouring pairs; 0 for none.
    rel_pos: "t5", "rope" or None, inside a chunk.
    norm: of the input: "layernorm", "scalenorm" or None.
    residual: add the input.
    activation: "relu2", "laplace" or "softmax".
    shift_tokens: the first half of the normed channels comes from the position before, masked or not.
    reduce_chunks: not causal: every query reads all chunks in the linear part; False: its own alone.
    linear_scale: of the linear part: "lucidrains", 1 / N or, causal, 1 / c; "none", as in the paper.
    causal: query i sees keys j <= i.
    dropout: probability of dropping a weight A in training.
    """

    card: ClassVar = Card(
        id="mixed_chunk",
        layout="sequence",
        paper=Paper(
            title="Transformer Quality in Linear Time",
            authors="Weizhe Hua, Zihang Dai, Hanxiao Liu, Quoc V. Le",
            venue="ICML",
            year=2022,
            arxiv="2202.10447",
        ),
        source="lucidrains/FLASH-pytorch (MIT)",
        summary="Gated attention in chunks: quadratic inside a chunk, linear between chunks.",
        when="Long sequences, language models above all, where attention and feed-forward are to be one layer of linear cost.",
        flops="2*B*N*dim*(3*hidden_dim + qk_dim) + 4*B*N*qk_dim*hidden_dim + 2*B*(qk_dim + hidden_dim)*"
        f"(floor(N/chunk_size)*{_PAIRS.format('chunk_size')} + {_PAIRS.format('(N % chunk_size)')})",
        grows={"N": 1.0},
        can=frozenset({"causal", "key_mask", "weights", "rows", "linear", "step"}),
        # With 1 / N, padding changes the scale.
        unless={"key_mask": "linear_scale == 'lucidrains' and not causal", "step": "not causal"},
        checked_against="public",
        uncertain="The authors published pseudo-code alone.",
        example={"dim": 32, "qk_dim": 16, "chunk_size": 8},
        variants=(
            {"dim": 24, "qk_dim": 16, "hidden_dim": 36, "chunk_size": 5, "causal": True, "rope_dim": 8, "norm": "scalenorm", "shift_tokens": True},
            {"dim": 24, "qk_dim": 10, "chunk_size": 7, "rel_pos": "rope", "linear_scale": "none", "activation": "laplace", "residual": False},
            {"dim": 16, "qk_dim": 8, "chunk_size": 4, "rel_pos": None, "norm": None, "reduce_chunks": False, "linear_scale": "none"},
        ),
    )
    official: ClassVar = (KeyMap("lucidrains/FLASH-pytorch", LUCIDRAINS, ignore=(r"rotary_pos_emb\.freqs",)),)

    def __init__(
        self,
        dim: int,
        *,
        chunk_size: int = 256,
        qk_dim: int = 128,
        hidden_dim: int | None = None,
        rope_dim: int = 0,
        rel_pos: Literal["t5", "rope"] | None = "t5",
        norm: NormKind = "layernorm",
        residual: bool = True,
        activation: Activation = "relu2",
        shift_tokens: bool = False,
        reduce_chunks: bool = True,
        linear_scale: Literal["lucidrains", "none"] = "lucidrains",
        causal: bool = False,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.chunk_size, self.qk_dim, self.hidden_dim = dim, chunk_size, qk_dim, 2 * dim if hidden_dim is None else hidden_dim
        check_gated(dim, qk_dim, self.hidden_dim, activation, dropout=dropout)
        require(chunk_size > 0, "chunk_size={} must be at least 1", chunk_size)
        require(0 <= rope_dim <= qk_dim and rope_dim % 2 == 0, "rope_dim={} must be even and at most qk_dim={}", rope_dim, qk_dim)
        check_option(rel_pos, ("t5", "rope", None), "rel_pos")
        check_option(linear_scale, ("lucidrains", "none"), "linear_scale")
        self.rope_dim, self.rel_pos, self.residual, self.activation, self.shift_tokens = rope_dim, rel_pos, residual, activation, shift_tokens
        self.reduce_chunks, self.linear_scale, self.causal, self.dropout = reduce_chunks, linear_scale, causal, dropout
        self.widths, self.shifted = [self.hidden_dim, self.hidden_dim, qk_dim], (dim + 1) // 2 if shift_tokens else 0
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = input_norm(norm, dim, **dd)
        self.proj = Linear(dim, sum(self.widths), **dd)
        self.gamma, self.beta = (nn.Parameter(torch.empty(4, qk_dim, **dd)) for _ in range(2))
        self.rel_pos_bias = relative_scores(rel_pos, qk_dim, causal, **dd)
        self.out_proj = Linear(self.hidden_dim, dim, **dd)
        init_gated_(self.proj, self.out_proj, self.gamma, self.beta)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: None = None,
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        attn_mask: None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b n dim"] | tuple[Tensor, Tensor]:
        """Returns (B, N, D), or that and what multiplies v in all, (B, 1, N, N), for inspection."""
        self._check(x, context, key_mask, attn_mask)
        h, (gate, value, base) = self._normed(x), split_projection(self.proj, self.widths)
        q, k, linear, options = self._views(base(h), None)
        out = gated_attention(q, k, value(h), linear=linear, key_mask=key_mask, dropout=self.dropout if self.training else 0.0, **options)
        out = self.out_proj(gate(h).mul_(out))
        out = out + x if self.residual else out
        return (out, self.weights(x, key_mask=key_mask)) if return_weights else out

    def weights(
        self, x: Tensor, context: None = None, *, queries: Tensor | None = None, key_mask: Tensor | None = None, attn_mask: None = None
    ) -> Tensor:
        """What multiplies v, from both parts together, for R chosen positions alone, (B, 1, R, N), for all if None."""
        self._check(x, context, key_mask, attn_mask)
        base = split_projection(self.proj, self.widths)[2]
        q, k, linear, options = self._views(base(self._normed(x)), queries)
        return gated_weights(q, k, linear=linear, queries=queries, key_mask=key_mask, **options)[:, None]

    def init_state(self, batch: int) -> MixedChunkState:
        """The state before the first position of `batch` sequences; step by step needs causal=True."""
        check_streaming(self.causal, "mixed_chunk")
        return mixed_chunk_start(batch, self.chunk_size, self.qk_dim, self.hidden_dim, self.shifted, self.proj.weight)

    def step(self, x: Float[Tensor, "b dim"], state: MixedChunkState) -> tuple[Float[Tensor, "b dim"], MixedChunkState]:
        """One more position: its output and the new state, at a cost of O((c + s) e)."""
        check_position(x, self.dim)
        h = self.norm(x)
        last, h = h[:, : self.shifted], torch.cat((state.last.to(h.dtype), h[:, self.shifted :]), -1)
        gate, value, base = split_projection(self.proj, self.widths)
        q, k, (lq, lk), options = self._views(base(h)[:, None], None, state.position[:, None])
        out, state = mixed_chunk_step(q[:, 0], k[:, 0], value(h), lq[:, 0], lk[:, 0], options["bias"], self.activation, last, state)
        out = self.out_proj(gate(h) * out.to(h.dtype))
        return (out + x if self.residual else out), state

    def _check(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None, attn_mask: Tensor | None) -> None:
        require(context is None, "mixed_chunk attends within x: it takes no context")
        require(attn_mask is None, "mixed_chunk sums most pairs without forming them: it takes no attn_mask; use key_mask or causal=True")
        check_tokens(x, self.dim)
        check_mask(key_mask, x.shape[0], x.shape[1])

    def _normed(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if not self.shift_tokens:
            return h
        before = torch.cat((torch.zeros_like(h[:, :1, : self.shifted]), h[:, :-1, : self.shifted]), 1)
        return torch.cat((before, h[..., self.shifted :]), -1)

    def _views(
        self, z: Tensor, queries: Tensor | None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], dict[str, Any]]:
        """The four views, of the queries with their scales."""
        n, c = z.shape[1], self.chunk_size
        local_scale = self.qk_dim**-0.5 if self.activation == "softmax" else 1 / c
        linear_scale = 1.0 if self.linear_scale == "none" else 1 / (c if self.causal else n)
        positions = torch.arange(n, device=z.device) if positions is None else positions
        views = []
        for i, scale in enumerate((local_scale, None, linear_scale, None)):
            chosen = queries if scale is not None else None
            y = (z if chosen is None else z[:, chosen]) * self.gamma[i] + self.beta[i]
            if self.rope_dim:
                y = rotary(y[:, None], positions if chosen is None else positions[..., chosen], self.rope_dim, 10000.0, True)[:, 0]
            views.append(y if scale is None else y * scale)
        q, k, lq, lk = views
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(c)
        return q, k, (lq, lk), {"bias": bias, "chunk": c, "act": self.activation, "causal": self.causal, "own_chunk": not self.reduce_chunks}
