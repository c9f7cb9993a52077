"""Correct modules in a few lines each, cut so that a mutant can spoil one step."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...validate import check_bool, check_broadcastable, check_context, check_divisible, check_map, check_mask, check_tokens

PAPER = Paper(title="None", authors="Nobody", venue="None", year=2000)


def card(id: str, layout: Any, can: set[str], example: dict[str, Any], flops: str = "0", exponent: float = 1.0, **more: Any) -> Card:
    return Card(
        id=id,
        layout=layout,
        paper=PAPER,
        source="",
        summary="",
        when="",
        flops=flops,
        grows={"N": exponent},
        can=frozenset(can),
        example=example,
        **more,
    )


class Tokens(Mechanism):
    """Softmax attention on tokens. Args: dim, num_heads, causal, and memory: how many past tokens `step` keeps (None: all)."""

    can: ClassVar = {"causal", "cross", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "permutation_equivariant", "step", "qkv_core"}
    flops: ClassVar = "4*B*N*dim**2 + 4*B*M*dim**2 + 4*B*N*M*dim"
    card: ClassVar = card("probe", "sequence", can, {"dim": 8, "num_heads": 2}, flops, 2.0)
    official: ClassVar = (KeyMap("theirs", (rename("query.*", "q.*"),)),)

    def __init__(self, dim: int, num_heads: int = 2, *, causal: bool = False, memory: int | None = None) -> None:
        super().__init__()
        check_divisible(dim, num_heads, "dim", "num_heads")
        self.dim, self.num_heads, self.causal, self.memory = dim, num_heads, causal, memory
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Any:
        self.validate(x, context, key_mask, attn_mask)
        c = x if context is None else context
        q, k, v = self.heads(self.q(x)), self.heads(self.k(c)), self.heads(self.v(c))
        allowed = self.allowed(x.shape[1], c.shape[1], key_mask, attn_mask, x.device)
        weights = self.weigh(self.scores(q, k), allowed)
        out = self.finish(weights, v, x)
        return (out, self.shown(weights)) if return_weights else out

    def validate(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None, attn_mask: Tensor | None) -> None:
        check_tokens(x, self.dim)
        c = x if context is None else context
        check_context(x, c, self.dim)
        check_mask(key_mask, c.shape[0], c.shape[1])
        if attn_mask is not None:
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, (x.shape[0], self.num_heads, x.shape[1], c.shape[1]), "attn_mask")

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * q.shape[-1] ** -0.5

    def allowed(self, n: int, m: int, key_mask: Tensor | None, attn_mask: Tensor | None, device: torch.device) -> Tensor:
        allowed = torch.ones(n, m, dtype=torch.bool, device=device)
        if self.causal:
            allowed = self.past(n, m, device)
        if key_mask is not None:
            allowed = allowed & key_mask[:, None, None]
        return allowed if attn_mask is None else allowed & attn_mask

    def past(self, n: int, m: int, device: torch.device) -> Tensor:
        return torch.arange(m, device=device) <= torch.arange(n, device=device)[:, None] + m - n

    def weigh(self, scores: Tensor, allowed: Tensor) -> Tensor:
        scores = scores.masked_fill(~allowed, float("-inf"))
        empty = (scores == float("-inf")).all(-1, keepdim=True)
        return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def shown(self, weights: Tensor) -> Tensor:
        return weights

    def weights(self, x: Tensor, *, queries: Tensor, key_mask: Tensor | None = None) -> Tensor:
        allowed = self.allowed(x.shape[1], x.shape[1], key_mask, None, x.device) if self.causal else None
        allowed = torch.ones((), dtype=torch.bool, device=x.device) if allowed is None else allowed[..., queries, :]
        allowed = allowed if key_mask is None else allowed & key_mask[:, None, None]
        return self.weigh(self.scores(self.heads(self.q(x[:, queries])), self.heads(self.k(x))), allowed)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return self.weigh(self.scores(q, k), self.allowed(q.shape[2], k.shape[2], key_mask, None, q.device)) @ v

    def init_state(self, batch: int) -> Tensor:
        return torch.zeros(batch, 0, self.dim)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.cat((state, x[:, None]), 1)
        if self.memory is not None:
            state = state[:, -self.memory :]
        return self.forward(x[:, None], state)[:, 0], state


class Pool(Mechanism):
    """The mean of the real elements of a set, projected. Args: dim."""

    card: ClassVar = card("probe", "set", {"mask", "permutation_invariant"}, {"dim": 8}, "2*B*N*dim**2")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.proj = dim, nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        check_tokens(x, self.dim)
        check_mask(mask, *x.shape[:2], name="mask")
        real = torch.ones(x.shape[:2], device=x.device, dtype=torch.bool) if mask is None else mask
        return self.pool(self.proj(x).tanh(), real)[:, None]

    def pool(self, x: Tensor, real: Tensor) -> Tensor:
        count = real.sum(1, keepdim=True).clamp_min(1)
        return x.masked_fill(~real[..., None], 0.0).sum(1) / count


class Nodes(Mechanism):
    """Each graph node adds up its neighbours. Args: dim."""

    card: ClassVar = card("probe", "graph", {"permutation_equivariant"}, {"dim": 8}, "2*B*N*dim**2 + 2*B*N**2*dim", 2.0)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.proj = dim, nn.Linear(dim, dim)

    def forward(self, x: Tensor, adjacency: Tensor, *, node_mask: Tensor | None = None) -> Tensor:
        check_tokens(x, self.dim)
        check_mask(node_mask, *x.shape[:2], name="node_mask")
        if node_mask is not None:
            adjacency = self.hide(adjacency, node_mask)
        return x + adjacency.to(x.dtype) @ self.proj(x)

    def hide(self, adjacency: Tensor, node_mask: Tensor) -> Tensor:
        return adjacency.masked_fill(~(node_mask[:, None] & node_mask[:, :, None]), 0.0)


class Gate(Mechanism):
    """Squeeze and excite on a map, with a gain that starts at zero. Args: channels, reduction."""

    card: ClassVar = card(
        "probe",
        "map",
        {"gate", "identity_start", "permutation_equivariant"},
        {"channels": 8, "reduction": 2},
        "4*B*channels*hidden",
        0.0,
    )

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        require(reduction > 0, "reduction={} must be at least 1", reduction)
        require(channels >= reduction, "channels={} // reduction={} is zero", channels, reduction)
        self.channels, self.reduction, self.hidden = channels, reduction, channels // reduction
        self.down, self.up = nn.Linear(channels, self.hidden), nn.Linear(self.hidden, channels)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.channels)
        return x * self.factors(x)

    def gate(self, x: Tensor) -> Tensor:
        return self.factors(x)

    def squeeze(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def factors(self, x: Tensor) -> Tensor:
        return 1 + self.gain * self.up(self.down(self.squeeze(x)).relu()).tanh()[:, :, None, None]
