r"""Luong global attention: a decoder state weighs all encoder states by an unscaled score and is merged with their mean.

    dot: s_tm = h_t . m_m    general: h_t . W m_m    concat: v . tanh(Wq h_t + Wc m_m)    location: (Wl h_t)_m
    c_t = sum_m softmax_m(s_t)_m m_m,   out_t = tanh(Wo [c_t ; h_t])

Luong, Pham, Manning, "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015. arXiv:1508.04025.
B batch, N decoder states, M encoder states, D dim, E context_dim. Not in the paper: the biases and the missing tanh of OpenNMT's "mlp" (score_bias,
out_bias, activation=None), its sparsemax, TensorFlow's learned factor of the scores; a state with no allowed key gets c = 0. Input feeding, the
output joined to the next input of the decoder, is the decoder's.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops import _dispatch
from ...ops.softmax_attention import attend, rows_of
from ...parts.luong import Score, attentional, checked_step, in_rows, luong_layers, normalized, queries_and_keys, scores
from ...validate import check_option


class LuongGlobalAttention(Mechanism):
    """Args:
    dim: width of the decoder states and of the output.
    context_dim: width of the encoder states; dim if None.
    score: "dot" (equal widths), "general", "concat" or "location".
    max_len: positions that "location" can weigh; those beyond get no attention.
    scale: multiply the scores by a learned number, 1 at first.
    score_bias: bias of the query projection of "concat".
    out_bias: bias of the output projection.
    activation: "tanh", or None for none.
    normalize: "softmax", or "sparsemax" for weights that may be exactly zero.
    dropout: probability of dropping a weight in training.
    """

    card: ClassVar = Card(
        id="luong_global",
        layout="sequence",
        paper=Paper(
            title="Effective Approaches to Attention-based Neural Machine Translation",
            authors="Minh-Thang Luong, Hieu Pham, Christopher D. Manning",
            venue="EMNLP",
            year=2015,
            arxiv="1508.04025",
        ),
        source="OpenNMT/OpenNMT-py global_attention.py (MIT)",
        summary="One unscaled head after a recurrent step: encoder states are averaged by score and merged with the decoder state.",
        when="Recurrent decoders: one state at a time, or all of a training sentence at once, against an encoded source.",
        flops="2*B*N*(context_dim + dim)*dim + (2*B*min(N, M)*dim*context_dim if score == 'general' else 0)"
        " + (2*B*(N*dim + M*context_dim)*dim if score == 'concat' else 0) + 2*B*N*(min(M, max_len) if score == 'location' else M)"
        "*(2*context_dim if score == 'general' and N <= M else dim + context_dim)",
        grows={"N": 2.0},
        can=frozenset({"cross", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "permutation_equivariant"}),
        unless={"permutation_equivariant": "score == 'location'"},
        checked_against="public",
        uncertain="The authors' Matlab code was not run; score='location', scale and sparsemax were checked against the equations alone.",
        example={"dim": 16},
        variants=(
            {"dim": 16, "score": "dot", "scale": True},
            {"dim": 16, "score": "concat", "normalize": "sparsemax", "scale": True},
            {"dim": 16, "score": "concat", "score_bias": True, "out_bias": True, "activation": None},
            {"dim": 16, "score": "location", "max_len": 20},
        ),
    )
    official: ClassVar = (KeyMap("OpenNMT/OpenNMT-py"), KeyMap("tensorflow's scaled_luong", (rename("attention_g", "score_scale"),)))

    def __init__(
        self,
        dim: int,
        context_dim: int | None = None,
        *,
        score: Score = "general",
        max_len: int | None = None,
        scale: bool = False,
        score_bias: bool = False,
        out_bias: bool = False,
        activation: Literal["tanh"] | None = "tanh",
        normalize: Literal["softmax", "sparsemax"] = "softmax",
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_option(activation, ("tanh", None), "activation")
        check_option(normalize, ("softmax", "sparsemax"), "normalize")
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.dim, self.context_dim, self.score, self.max_len = dim, dim if context_dim is None else context_dim, score, max_len
        self.scale, self.score_bias, self.out_bias = scale, score_bias, out_bias
        self.activation, self.normalize, self.dropout = activation, normalize, dropout
        for name, layer in luong_layers(dim, self.context_dim, score, max_len, score_bias, out_bias, device=device, dtype=dtype).items():
            self.add_module(name, layer)
        self.score_scale = nn.Parameter(torch.ones((), device=device, dtype=dtype)) if scale else None

    def forward(
        self,
        x: Float[Tensor, "b *n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        *,
        key_mask: Bool[Tensor, "b m"] | None = None,
        attn_mask: Bool[Tensor, "#b #n m"] | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from `x` to `context` (to `x` itself if None). Returns (B, N, dim), or that and the weights (B, N, M).

        One step, x (B, dim), gives (B, dim) and (B, M).
        """
        h, source, mask = checked_step(x, context, self.dim, self.context_dim, key_mask, attn_mask)
        q, k, source, mask = self._scored(h, source, mask)
        dropout = self.dropout if self.training else 0.0
        if self._fused(source):
            mask = None if mask is None else mask[:, None]
            c = attend(q[:, None], k[:, None], source[:, None], scale=1.0, mask=mask, dropout=dropout)[:, 0]
        else:

            def core(q: Tensor, mask: Tensor | None) -> Tensor:
                weights = normalized(self._scores(q, k), mask, self.normalize).to(source.dtype)
                return F.dropout(weights, dropout) @ source

            c = in_rows(core, 2 * source.shape[0] * source.shape[1], q, mask)
        out = attentional(self, c.to(h.dtype), h).reshape(*x.shape[:-1], self.dim)
        if not return_weights:
            return out
        return out, self.weights(x, context, key_mask=key_mask, attn_mask=attn_mask)

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Float[Tensor, "b *r m"]:
        """The weights of R chosen positions of `x` alone; of all if None."""
        h, source, mask = checked_step(x, context, self.dim, self.context_dim, key_mask, attn_mask)
        keys = source.shape[1]
        q, k, _, mask = self._scored(h if queries is None else h[:, queries], source, rows_of(mask, queries))
        weights = normalized(self._scores(q, k), mask, self.normalize).to(x.dtype)
        weights = F.pad(weights, (0, keys - k.shape[1])) if self.score == "location" else weights
        return weights if x.ndim == 3 else weights[:, 0]

    def _fused(self, source: Tensor) -> bool:
        """Whether no weights are stored. On the CPU, up to 4 dim keys, keeping them is faster than computing them again in the backward pass."""
        if self.normalize != "softmax" or self.score == "concat":
            return False
        few = isinstance(source.shape[1], int) and source.shape[1] <= 4 * self.dim
        return not (few and _dispatch.on_cpu(source) and torch.is_grad_enabled())

    def _scored(self, h: Tensor, source: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, and the source and mask at the positions that have a score."""
        if self.score == "location":
            source, mask = source[:, : self.max_len], None if mask is None else mask[..., : self.max_len]
        q, k = queries_and_keys(self, h, source)
        return q if self.score_scale is None or self.score == "concat" else q * self.score_scale, k, source, mask

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        s = scores(self, q, k)
        return s if self.score_scale is None or self.score != "concat" else s * self.score_scale
