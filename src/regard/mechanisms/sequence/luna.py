r"""Luna: a short memory P packs the sequence by softmax attention, and the sequence reads the packed memory back: linear in the length.

    pack:   Yp = softmax(P Wpq (C Wpk)^T / sqrt(dp)) C Wpv             unpack:  out = softmax(x Wq (Yp Wk)^T / sqrt(d)) Yp Wv, then Wo
    causal: w_j = log2(1 + 2^(k'_j . p)), k' = x Wpc, p = P Wpq / sqrt(d), for each memory slot;   F(X, Y, Z)_t = X_t mean_{j <= t} Y_j^T Z_j
            out = F(softmax(F(q / sqrt(d), k, w)), w, v)

Ma, Kong, Wang, Zhou, May, Ma, Zettlemoyer, "Luna: Linear Unified Nested Attention", NeurIPS 2021, arXiv:2106.01540. As in the authors' code the
causal weights are a softplus to base 2 (the paper: elu + 1 or softplus), and tied keys and values share one projection in each stage. Unlike it,
key_mask holds in causal mode too: w_j = 0 for masked j, which the means leave out. B batch, N queries, M keys, D dim, E context_dim, L memory
slots, H heads of width d, Hp memory heads of width dp.
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops.linear_attention import causal_memory_attention, chunk_size
from ...ops.linear_attention.streaming import LunaState, luna_start, luna_step
from ...ops.softmax_attention import attend, attention_weights
from ...parts.heads import check_position, check_streaming, checked_source, head_width, merge_heads, split_heads
from ...parts.linear import Linear
from ...validate import check_divisible, check_mask, check_tokens


class LunaAttention(Mechanism):
    """Args:
    dim: width of the input, of the memory and of the output.
    num_heads, head_dim: heads of the unpack stage; head_dim must be dim // num_heads, for the memory lives in dim.
    num_memory_heads: heads of the pack stage; num_heads if None.
    memory_len: slots of the learned memory.
    tie_kv: keys and values share a projection.
    context_dim: width of `context`; dim if None.
    qkv_bias, out_bias: biases of the projections.
    dropout: probability of dropping a weight, of both stages, in training.
    causal: position t sees positions j <= t; the memory is only read.
    learned_memory: own a learned memory; without it `memory` must be given to every call.
    """

    card: ClassVar = Card(
        id="luna",
        layout="sequence",
        paper=Paper(
            title="Luna: Linear Unified Nested Attention",
            authors="Xuezhe Ma, Xiang Kong, Sinong Wang, Chunting Zhou, Jonathan May, Hao Ma, Luke Zettlemoyer",
            venue="NeurIPS",
            year=2021,
            arxiv="2106.01540",
        ),
        source="XuezheMax/fairseq-apollo luna_attention.py (MIT)",
        summary="Two softmax attentions through a short memory: the memory packs the sequence, the sequence reads the memory.",
        when="Long inputs that a few dozen slots can summarise, and models that carry a memory from layer to layer.",
        flops="4*B*N*dim**2 + 2*memory_len*dim**2 + (2*B*(M*context_dim*dim + memory_len*dim**2)*(1 if tie_kv else 2) + 4*B*memory_len*dim*(N + M)"
        " if not causal else 2*B*N*dim**2*(2 if tie_kv else 3) + 2*B*N*memory_len*dim"
        " + 4*B*num_heads*ceil(N/min(chunk, N))*min(chunk, N)**2*(head_dim + memory_len)"
        " + 8*B*(ceil(N/min(chunk, N)) - 1)*min(chunk, N)*dim*memory_len)",
        grows={"N": 1.0},
        can=frozenset({"causal", "cross", "key_mask", "weights", "row_stochastic", "linear", "step", "permutation_equivariant"}),
        unless={"cross": "causal", "step": "not causal"},
        checked_against="authors",
        uncertain="Masks in the causal form are not in the authors' code, which ignores them there.",
        example={"dim": 32, "num_heads": 4, "memory_len": 5},
        variants=(
            {"dim": 24, "num_heads": 3, "num_memory_heads": 2, "memory_len": 4, "tie_kv": False},
            {"dim": 24, "num_heads": 4, "memory_len": 6, "causal": True},
        ),
        returns=("out", "memory", "weights"),
    )
    official: ClassVar = (KeyMap("XuezheMax/fairseq-apollo", (rename("projected_embeddings", "memory"),), optional=("memory",)),)

    pq_proj: nn.Linear
    pc_proj: nn.Linear
    q_proj: nn.Linear

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        *,
        num_memory_heads: int | None = None,
        memory_len: int = 16,
        tie_kv: bool = True,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        learned_memory: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads, None)
        require(head_dim in (None, self.head_dim), "head_dim={} must be dim // num_heads = {}: the memory lives in dim", head_dim, self.head_dim)
        self.num_memory_heads = num_heads if num_memory_heads is None else num_memory_heads
        check_divisible(dim, self.num_memory_heads, "dim", "num_memory_heads")
        require(memory_len > 0, "memory_len={} must be at least 1", memory_len)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        self.context_dim = dim if context_dim is None else context_dim
        require(not causal or self.context_dim == dim, "causal=True reads no context, got context_dim={}", context_dim)
        self.memory_len, self.tie_kv, self.qkv_bias, self.out_bias = memory_len, tie_kv, qkv_bias, out_bias
        self.dropout, self.causal, self.learned_memory = dropout, causal, learned_memory
        self.chunk = chunk_size(self.head_dim, memory_len)
        names = {"pq_proj": dim, "q_proj": dim} | dict.fromkeys(["pc_proj"] if tie_kv or causal else ["pk_proj", "pv_proj"], self.context_dim)
        names |= dict.fromkeys(["c_proj"] if tie_kv else ["k_proj", "v_proj"], dim)
        for name, width in names.items():
            setattr(self, name, Linear(width, dim, qkv_bias, device=device, dtype=dtype))
            nn.init.xavier_uniform_(getattr(self, name).weight, gain=2**-0.5)
        self.out_proj = Linear(dim, dim, out_bias, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.out_proj.weight)
        if out_bias:
            nn.init.zeros_(self.out_proj.bias)
        self.memory = nn.Parameter(torch.empty(memory_len, dim, device=device, dtype=dtype)) if learned_memory else None
        if self.memory is not None:
            nn.init.normal_(self.memory, std=dim**-0.5)

    def forward(
        self,
        x: Float[Tensor, "b n dim"],
        context: Float[Tensor, "b m context_dim"] | None = None,
        *,
        memory: Float[Tensor, "b l dim"] | None = None,
        key_mask: Bool[Tensor, "b m"] | None = None,
        memory_mask: Bool[Tensor, "b l"] | None = None,
        attn_mask: Tensor | None = None,
        return_memory: bool = False,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Read `context` (`x` itself if None) through the memory (the learned one if None, of any length if given).

        Returns (B, N, dim), then the new memory (B, L, dim) if asked for (the old one in causal mode), then the weights (B, H, N, L) of the unpack
        stage if asked for. `key_mask` hides positions from the memory, `memory_mask` hides slots from the queries.
        """
        require(attn_mask is None, "luna goes through its memory and has no pairs for attn_mask={} to hide; use key_mask or memory_mask", "...")
        source, slots = self._checked(x, context, memory, key_mask, memory_mask)
        dropout = self.dropout if self.training else 0.0
        if self.causal:
            out = causal_memory_attention(*self._causal_heads(x), self._memory_queries(slots, self.num_heads), key_mask, memory_mask, dropout=dropout)
            packed = slots
        else:
            packed = self._pack(source, slots, key_mask, dropout)
            q, (k, v) = split_heads(self.q_proj(x), self.num_heads), self._keys_values(packed, "", self.num_heads)
            out = attend(q, k, v, mask=None if memory_mask is None else memory_mask[:, None, None], dropout=dropout)
        given = {"memory": memory, "key_mask": key_mask, "memory_mask": memory_mask}
        found = (
            self.out_proj(merge_heads(out)),
            packed.expand(x.shape[0], -1, -1) if return_memory else None,
            self.weights(x, context, **given) if return_weights else None,
        )
        kept = [t for t in found if t is not None]
        return tuple(kept) if len(kept) > 1 else kept[0]

    def weights(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        queries: Tensor | None = None,
        memory: Tensor | None = None,
        key_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Float[Tensor, "b h r l"]:
        """The weights on the slots of R chosen positions of `x` alone; of all if None. Slots, not positions: the heads mix in between."""
        source, slots = self._checked(x, context, memory, key_mask, memory_mask)
        if self.causal:
            tensors = (*self._causal_heads(x), self._memory_queries(slots, self.num_heads), key_mask, memory_mask)
            weights = causal_memory_attention(*tensors, return_weights=True)
            return weights if queries is None else weights[:, :, queries]
        k = self._keys_values(self._pack(source, slots, key_mask), "", self.num_heads)[0]
        q = split_heads(self.q_proj(x if queries is None else x[:, queries]), self.num_heads)
        return attention_weights(q, k, mask=None if memory_mask is None else memory_mask[:, None, None])

    def _checked(
        self, x: Tensor, context: Tensor | None, memory: Tensor | None, key_mask: Tensor | None, memory_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What is read, and the memory: (L, D) if learned, (B, L, D) if given."""
        require(not self.causal or context is None, "luna with causal=True reads x alone; context={} cannot be given", "...")
        source = checked_source(x, context, self.dim, self.context_dim, key_mask)
        slots = self._memory(memory, x.shape[0])
        check_mask(memory_mask, x.shape[0], slots.shape[-2], name="memory_mask")
        return source, slots

    def _pack(self, source: Tensor, slots: Tensor, key_mask: Tensor | None, dropout: float = 0.0) -> Tensor:
        """The new memory, (B, L, D)."""
        k, v = self._keys_values(source, "p", self.num_memory_heads)
        q = self._memory_queries(slots, self.num_memory_heads).expand(source.shape[0], -1, -1, -1)
        return merge_heads(attend(q, k, v, mask=None if key_mask is None else key_mask[:, None, None], dropout=dropout))

    def _causal_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k', k, v of the causal form, (B, H, N, d) each."""
        return split_heads(self.q_proj(x), self.num_heads), split_heads(self.pc_proj(x), self.num_heads), *self._keys_values(x, "", self.num_heads)

    def init_state(self, batch: int, *, memory: Tensor | None = None, memory_mask: Tensor | None = None) -> LunaState:
        """The state before the first position of `batch` sequences; step by step needs causal=True."""
        check_streaming(self.causal, "luna")
        memory = self._memory(memory, batch)
        check_mask(memory_mask, batch, memory.shape[-2], name="memory_mask")
        return luna_start(self._memory_queries(memory, self.num_heads).expand(batch, -1, -1, -1), memory_mask)

    def step(self, x: Float[Tensor, "b dim"], state: LunaState) -> tuple[Float[Tensor, "b dim"], LunaState]:
        """One more position: its output and the new state."""
        check_position(x, self.dim)
        out, state = luna_step(*self._causal_heads(x[:, None]), state)
        return self.out_proj(merge_heads(out.to(x.dtype)))[:, 0], state

    def _memory(self, memory: Tensor | None, batch: int) -> Tensor:
        """(L, D) if learned, (B, L, D) if given."""
        if memory is None:
            require(self.memory is not None, "luna with learned_memory={} needs memory=(batch, slots, {})", self.learned_memory, self.dim)
            assert self.memory is not None
            return self.memory
        check_tokens(memory, self.dim, "memory")
        require(memory.shape[0] == batch, "memory has batch {} but x has batch {}", memory.shape[0], batch)
        return memory

    def _memory_queries(self, memory: Tensor, heads: int) -> Tensor:
        p = self.pq_proj(memory)
        return split_heads(p if p.ndim == 3 else p.unsqueeze(0), heads)

    def _keys_values(self, source: Tensor, stage: str, heads: int) -> tuple[Tensor, Tensor]:
        found = [split_heads(getattr(self, f"{stage}{name}_proj")(source), heads) for name in (["c"] if self.tie_kv else ["k", "v"])]
        return found[0], found[-1]
