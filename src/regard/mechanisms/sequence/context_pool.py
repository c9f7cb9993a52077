r"""ContextPool: each token becomes a mean of its neighbourhood, whose width and whose weights are predicted, before attention looks at it.

    (w, s) = sigmoid(conv2(relu(conv1(X)))),   sigma_i = max(radius n s_i, 1e-3)
    y_i = sum_j g_ij w_j x_j / sum_j g_ij w_j,   g_ij = exp(-d_ij^2 / (2 sigma_i^2)),   then softmax attention within Y if num_heads is given

Huang, Talbott, Jaitly, Susskind, "Efficient Representation Learning via Adaptive Context Pooling", ICML 2022. arXiv:2207.01844.
B batch, N tokens (H W of a map), C width, d_ij the distance between positions, n the length (of a padded sequence its valid tokens; the longer side
of a map; `context_len` where causal, for the length would tell of the future). We compute the same as softmax_j(log w_j - d_ij^2 / (2 sigma_i^2)),
which no small w can underflow. Not in the paper: maps, masks, causal form, window; its equations are recalled, not read.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...ops.distance_pool import LOWEST, distance_pool, distance_weights
from ...ops.softmax_attention import attend, combine_masks
from ...parts.heads import check_position, check_streaming, head_width, init_projections_, merge_heads, split_heads
from ...parts.linear import Linear
from ...parts.masks import zero_rows
from ...validate import check_bool, check_broadcastable, check_map, check_mask, check_tokens

# Pairs that are multiplied: all while they are few, else tiles of queries (t long, on maps 8 by 16) against the keys within the window w:
# n (t + 2 w), less what sticks out over both ends; causal n (t + w), less what sticks out over the first.
_BAND = "({n}*({t} + {s}*{w}) - {s}*{t}*ceil({w}/{t})*({w} - {t}*(ceil({w}/{t}) - 1)/2))"
_H, _W, _N = (
    _BAND.format(n=n, t=f"min({t}, {n})", w=f"({n} if window is None else min(window, {n}))", s=s)
    for n, t, s in (("H", "8", "2"), ("W", "16", "2"), ("N", "(64 if window is not None and window < 64 else 128)", "(1 if causal else 2)"))
)
_PAIRS = f"(N*N if B*N*N <= 2**18 else {_H}*{_W} if layout == 'map' else {_N})"


class ContextPoolState(NamedTuple):
    """The newest inputs (B, max(window, kernel_size - 1), C), hidden units (B, kernel_size - 1, hidden) and log-weights (B, window)."""

    x: Tensor
    hidden: Tensor
    log_w: Tensor


class ContextPool(Mechanism):
    """`ContextPool(dim=64)` works on tokens, `ContextPool(channels=64)` on maps.

    Args:
        layout: "sequence" or "map"; None takes it from whether `dim` or `channels` is given.
        dim, channels: width of the tokens, or of the map.
        num_heads: heads of a softmax attention within the pooled tokens; None pools alone.
        radius: the widest sigma, as a share of the length.
        kernel_size, hidden_dim: of the two convolutions that predict; hidden_dim=None means half the width.
        causal: token i pools, and attends to, tokens j <= i; needs context_len.
        context_len: the length that radius is a share of where causal.
        head_dim, qkv_bias, out_bias, dropout: of the attention; head_dim=None means dim // num_heads.
        window: pool only over keys at most so far away, along each axis of a map; None for all.
    """

    card: ClassVar = Card(
        id="context_pool",
        layout="sequence",
        also=("map",),
        paper=Paper(
            title="Efficient Representation Learning via Adaptive Context Pooling",
            authors="Chen Huang, Walter Talbott, Navdeep Jaitly, Josh Susskind",
            venue="ICML",
            year=2022,
            arxiv="2207.01844",
        ),
        source="no public code found",
        summary="A Gaussian mean around each token, its width and weights predicted, before attention.",
        when="Phrases or regions of varying extent, and few attention layers; set a window for long inputs.",
        flops=f"2*B*N*taps*hidden_dim*(width + 2) + 2*B*width*{_PAIRS} + (4*B*N*inner*(2*width + N) if num_heads else 0)",
        grows={"N": 2.0},
        can=frozenset({"causal", "key_mask", "attn_mask", "weights", "rows", "row_stochastic", "linear", "step"}),
        unless={
            "causal": "layout == 'map'",
            "key_mask": "layout == 'map'",
            "attn_mask": "num_heads is None",
            "linear": "window is None or num_heads is not None",
            "step": "window is None or num_heads is not None or not causal",
        },
        checked_against="reconstruction",
        uncertain="The abstract confirms the idea; the equations, the hidden width, the kernel and radius 0.1 are as recalled, not as read.",
        example={"dim": 16, "num_heads": 2, "context_len": 40},
        variants=(
            {"dim": 10, "causal": True, "context_len": 30, "window": 5, "kernel_size": 5, "hidden_dim": 4},
            {"dim": 18, "radius": 0.3, "window": 7, "context_len": 24},
            {"channels": 10, "layout": "map"},
            {"channels": 8, "layout": "map", "window": 2, "kernel_size": 1},
        ),
        place="D",
    )

    def __init__(
        self,
        layout: Literal["sequence", "map"] | None = None,
        dim: int | None = None,
        num_heads: int | None = None,
        radius: float = 0.1,
        kernel_size: int = 3,
        hidden_dim: int | None = None,
        causal: bool = False,
        context_len: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
        window: int | None = None,
        *,
        channels: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(layout in (None, "sequence", "map"), "layout={!r} is not 'sequence' or 'map'", layout)
        self.layout = layout or ("map" if channels is not None else "sequence")
        width, other = (channels, dim) if self.layout == "map" else (dim, channels)
        message = "layout={!r} got dim={} and channels={}; tokens have a dim, maps have channels"
        require(width is not None and other is None, message, self.layout, dim, channels)
        assert width is not None
        require(radius > 0, "radius={} must be above 0", radius)
        require(kernel_size > 0 and kernel_size % 2 == 1, "kernel_size={} must be odd, for positions to keep their place", kernel_size)
        require(window is None or window >= 0, "window={} must not be negative; None pools over all positions", window)
        require(0.0 <= dropout < 1.0, "dropout={} must be in [0, 1)", dropout)
        alone = self.layout == "sequence" or (num_heads is None and not causal)
        require(alone, "layout='map' pools alone: num_heads={} and causal={} are for tokens", num_heads, causal)
        require(not causal or context_len is not None, "causal=True needs context_len=..., the length that radius={} is a share of", radius)
        require(context_len is None or context_len > 0, "context_len={} must be at least 1", context_len)
        self.dim, self.channels, self.width, self.radius, self.kernel_size = dim, channels, width, radius, kernel_size
        self.hidden_dim = max(1, width // 2) if hidden_dim is None else hidden_dim
        require(self.hidden_dim > 0, "hidden_dim={} must be at least 1", hidden_dim)
        self.causal, self.context_len, self.window = causal, context_len, window
        self.num_heads, self.qkv_bias, self.out_bias, self.dropout = num_heads, qkv_bias, out_bias, dropout
        self.head_dim = head_dim if num_heads is None else head_width(width, num_heads, head_dim)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        conv, axes = (nn.Conv2d, 2) if self.layout == "map" else (nn.Conv1d, 1)
        self.taps, padding = kernel_size**axes, 0 if causal else kernel_size // 2
        first = conv(width, self.hidden_dim, kernel_size, padding=padding, **dd)
        self.predict = nn.Sequential(first, nn.ReLU(), conv(self.hidden_dim, 2, kernel_size, padding=padding, **dd))
        self.inner = 0
        if num_heads is not None:
            assert self.head_dim is not None
            self.inner = num_heads * self.head_dim
            self.q_proj = Linear(width, self.inner, qkv_bias, **dd)
            self.k_proj = Linear(width, self.inner, qkv_bias, **dd)
            self.v_proj = Linear(width, self.inner, qkv_bias, **dd)
            self.out_proj = Linear(self.inner, width, out_bias, **dd)
            init_projections_(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    def forward(
        self,
        x: Float[Tensor, "b ..."],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        attn_mask: Bool[Tensor, "#b #h n n"] | None = None,
        return_weights: bool = False,
    ) -> Float[Tensor, "b ..."] | tuple[Tensor, Tensor]:
        """Tokens (B, N, C) or a map (B, C, H, W) to the same shape; zeros where `key_mask` is False. `attn_mask` is of the attention.

        With `return_weights` also the weights of the pooling, (B, N, N).
        """
        tokens, grid = self._tokens(x, key_mask, attn_mask)
        y = distance_pool(tokens, *self._predict(tokens, grid, key_mask), grid, window=self.window, causal=self.causal)
        if self.num_heads is not None:
            y = self._attend(zero_rows(y, key_mask), key_mask, attn_mask)
        y = zero_rows(y, key_mask)
        out = y.mT.unflatten(2, grid) if self.layout == "map" else y
        out = out.contiguous() if x.is_contiguous() else out
        return (out, self.weights(x, key_mask=key_mask)) if return_weights else out

    def weights(
        self, x: Tensor, *, queries: Tensor | None = None, key_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Float[Tensor, "b r n"]:
        """The weights of the pooling of R chosen positions alone; of all if None. They do not depend on `attn_mask`."""
        tokens, grid = self._tokens(x, key_mask, attn_mask)
        log_w, sharpness = self._predict(tokens, grid, key_mask)
        if queries is not None:
            sharpness = sharpness[:, queries]
        found = distance_weights(log_w, sharpness, grid, window=self.window, causal=self.causal, queries=queries)
        asking = key_mask if key_mask is None or queries is None else key_mask[:, queries]
        return zero_rows(found, asking).to(x.dtype)

    def _tokens(self, x: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """The tokens (B, N, C), zero where masked, and the grid they stand on; everything is checked."""
        if self.layout == "map":
            check_map(x, self.width)
            require(key_mask is None and attn_mask is None, "layout='map' takes no key_mask and no attn_mask; use layout='sequence'")
            return x.flatten(2).mT, (x.shape[2], x.shape[3])
        check_tokens(x, self.width)
        b, n, _ = x.shape
        check_mask(key_mask, b, n)
        if attn_mask is not None:
            require(self.num_heads is not None, "attn_mask is for the attention after the pooling, but num_heads={}", self.num_heads)
            check_bool(attn_mask, "attn_mask")
            check_broadcastable(attn_mask, (b, self.num_heads or 1, n, n), "attn_mask")
        return zero_rows(x, key_mask), (1, n)

    def _predict(self, tokens: Tensor, grid: tuple[int, int], key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """log w and 1 / (2 sigma^2), (B, N) each, in float32 at least."""
        rows = tokens.mT.unflatten(2, grid) if self.layout == "map" else tokens.mT
        past = (self.kernel_size - 1, 0) if self.causal else (0, 0)
        hidden = F.relu(self.predict[0](F.pad(rows, past)))
        hidden = hidden if key_mask is None else hidden.masked_fill(~key_mask[:, None], 0.0)
        length = max(grid) if key_mask is None else key_mask.sum(1, keepdim=True)
        log_w, sharpness = self._kernel(self.predict[2](F.pad(hidden, past)).flatten(2), length)
        return log_w if key_mask is None else log_w.masked_fill(~key_mask, LOWEST), sharpness

    def _kernel(self, predicted: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        """From the two channels (B, 2, N) to log w and 1 / (2 sigma^2)."""
        if self.causal and self.context_len is not None:
            length = self.context_len
        w, s = predicted.to(torch.promote_types(predicted.dtype, torch.float32)).unbind(1)
        sigma = (self.radius * length * s.sigmoid()).clamp_min(1e-3)
        return F.logsigmoid(w), 0.5 / sigma.square()

    def _attend(self, y: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        assert self.num_heads is not None
        q, k, v = (split_heads(proj(y), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mask = combine_masks(key_mask[:, None, None] if key_mask is not None else None, attn_mask)
        return self.out_proj(merge_heads(attend(q, k, v, mask=mask, causal=self.causal, dropout=self.dropout if self.training else 0.0)))

    def init_state(self, batch: int) -> ContextPoolState:
        """The state before the first of `batch` sequences; step by step needs causal=True, a window and no attention."""
        check_streaming(self.causal, "context_pool")
        require(self.window is not None and self.num_heads is None, "a bounded state needs a window and num_heads=None, got {!r}", self)
        weight, past = self.predict[0].weight, self.kernel_size - 1
        assert isinstance(weight, Tensor)
        log_w = weight.new_full((batch, self.window or 0), LOWEST, dtype=torch.promote_types(weight.dtype, torch.float32))
        newest = weight.new_zeros(batch, max(self.window or 0, past), self.width)
        return ContextPoolState(newest, weight.new_zeros(batch, past, self.hidden_dim), log_w)

    def step(self, x: Float[Tensor, "b dim"], state: ContextPoolState) -> tuple[Float[Tensor, "b dim"], ContextPoolState]:
        """One more token: its output and the new state."""
        check_position(x, self.width)
        seen, k, window = torch.cat((state.x, x[:, None]), 1), self.kernel_size, self.window or 0
        hidden = torch.cat((state.hidden, F.relu(self.predict[0](seen[:, -k:].mT)).mT), 1)
        log_w, sharpness = self._kernel(self.predict[2](hidden.mT), 0)
        log_w = torch.cat((state.log_w, log_w), 1)
        last = torch.tensor([window], device=x.device)
        out = distance_weights(log_w, sharpness, queries=last).to(x.dtype) @ seen[:, -window - 1 :]
        return out[:, 0], ContextPoolState(seen[:, 1:], hidden[:, 1:], log_w[:, 1:])
