"""Softmax attention over a pattern that falls into dense pieces: exact, differentiable, and never N x N.

A plan lists, for each group of heads, layers of pieces. A piece is one batched dense attention between a view of the queries and a view of
the keys; the pieces of a layer share no query, layers share no (query, key) pair. Layers are merged by their log-sum-exp:

    lse = log sum_p e^lse_p,   out = sum_p e^(lse_p - lse) out_p

The gradient of a piece needs only the merged numbers, P = e^(scores - lse) and dS = P * (dP - rowsum(dOut * out)), so nothing but q, k, v, out
and lse is kept. It is one operator to torch.compile and torch.export, which therefore never see a length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from ...errors import RegardError
from .. import _dispatch, _flops  # noqa: F401  (the fused CPU kernel is counted)

aten = torch.ops.aten
INF = float("inf")
Index: TypeAlias = tuple[slice, slice, Tensor, Tensor]


class View(Protocol):
    """How rows of (B, N, H, d) form dense problems (P, Q, L, d), and the adjoint, which adds such a tensor to a total in place."""

    def take(self, x: Tensor) -> Tensor: ...
    def add(self, total: Tensor, part: Tensor) -> None: ...


@dataclass(frozen=True)
class Rows:
    """Positions start..stop as one problem: (B, H, L, d)."""

    start: int
    stop: int

    def take(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop].transpose(1, 2)

    def add(self, total: Tensor, part: Tensor) -> None:
        total[:, self.start : self.stop] += part.transpose(1, 2)


@dataclass(frozen=True)
class Windows:
    """`count` runs of `width` positions, one every `step` from `start`: (B count, H, width, d). `step` divides `width`."""

    start: int
    count: int
    step: int
    width: int

    def take(self, x: Tensor) -> Tensor:
        stop = self.start + (self.count - 1) * self.step + self.width
        return x[:, self.start : stop].unfold(1, self.width, self.step).movedim(-1, 2).flatten(0, 1).transpose(1, 2)

    def add(self, total: Tensor, part: Tensor) -> None:
        part = part.transpose(1, 2).unflatten(0, (total.shape[0], self.count))
        for offset in range(0, self.width, self.step):
            rows = slice(self.start + offset, self.start + offset + self.count * self.step)
            total[:, rows].unflatten(1, (self.count, self.step)).add_(part[:, :, offset : offset + self.step])


@dataclass(frozen=True)
class Residues:
    """Every `stride`-th of the first `stride` `count` positions, from each of the first `stride`: (B, stride H, count, d)."""

    stride: int
    count: int

    def take(self, x: Tensor) -> Tensor:
        return x[:, : self.stride * self.count].unflatten(1, (self.count, self.stride)).flatten(2, 3).transpose(1, 2)

    def add(self, total: Tensor, part: Tensor) -> None:
        total[:, : self.stride * self.count] += part.transpose(1, 2).unflatten(2, (self.stride, -1)).flatten(1, 2)


@dataclass(frozen=True)
class Columns:
    """From each of the first `count` blocks of `size` positions the columns that head h names in `columns[h]`.

    `own`: each block a problem, (B count, H, c, d); else all one problem, (B, H, count c, d).
    """

    size: int
    count: int
    columns: tuple[tuple[int, ...], ...]
    own: bool = False

    def _index(self, x: Tensor) -> tuple[Tensor, Index]:
        columns = torch.tensor(self.columns, device=x.device)
        heads = torch.arange(len(self.columns), device=x.device)[:, None]
        return x[:, : self.size * self.count].unflatten(1, (self.count, self.size)), (slice(None), slice(None), columns, heads)

    def take(self, x: Tensor) -> Tensor:
        blocks, index = self._index(x)
        picked = blocks[index]
        return picked.flatten(0, 1) if self.own else picked.transpose(1, 2).flatten(2, 3)

    def add(self, total: Tensor, part: Tensor) -> None:
        blocks, index = self._index(total)
        blocks[index] += part.unflatten(0, (-1, self.count)) if self.own else part.unflatten(2, (self.count, -1)).transpose(1, 2)


@dataclass(frozen=True)
class Piece:
    """One dense attention. `mask(device)` is boolean, broadcastable to (P, Q, L, keys); `causal` hides later keys by index: L keys, no mask."""

    queries: View
    keys: View
    mask: Callable[[torch.device], Tensor] | None = None
    causal: bool = False


@dataclass(frozen=True)
class Layer:
    """Pieces that share no query; queries before `start` have no key in it. The first layer of a group starts at 0 and has every query."""

    pieces: tuple[Piece, ...]
    start: int = 0


@dataclass(frozen=True)
class Plan:
    """`rows` >= N is what the inputs are padded to; `hides_padding`: no real query sees the padding. Groups are (heads, layers)."""

    rows: int
    hides_padding: bool
    groups: tuple[tuple[slice, tuple[Layer, ...]], ...]


Planner = Callable[..., Plan]
PLANNERS: dict[str, Planner] = {}


def planner(function: Planner) -> Planner:
    """Register a function (n, num_heads, *options) -> Plan under its name; options are integers."""
    PLANNERS[function.__name__] = function
    return function


@lru_cache(maxsize=64)
def _plan(name: str, options: tuple[int, ...], n: int, num_heads: int) -> Plan:
    return PLANNERS[name](n, num_heads, *options)


def block_attend(q: Tensor, k: Tensor, v: Tensor, plan: str, options: Sequence[int] = (), *, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v over the pairs of a plan.

    Args:
        q, k, v: (B, H, N, d), all of the same shape; differentiable once.
        plan, options: name of a planner and its options.
        key_mask: (B, N), True = may be attended.

    Returns:
        (B, H, N, d); a query without any key gets zeros, and passes finite gradients.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _call(block_attention, q, k, v, key_mask, plan, list(options), scale)[0].transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, plan: str, options: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    """On (B, N, H, d); also returns the log-sum-exp, (B, N, H), 0 for a query without any key."""
    (b, n, h, d), todo = q.shape, _plan(plan, tuple(options), q.shape[1], q.shape[2])
    valid = _valid(key_mask, q, todo)
    out = q.new_zeros((b, n, h, d))
    lse = q.new_zeros((b, n, h), dtype=torch.promote_types(q.dtype, torch.float32))
    for some in _samples(q):
        whole = [_pad(x[some], todo.rows) for x in (q, k, v)]
        for heads, layers in todo.groups:
            part = [x[:, :, heads] for x in whole]
            seen = None if valid is None else valid[some, :, heads]
            o, e = _layer(layers[0], part, seen, scale, (out[some, :, heads], lse[some, :, heads, None]))
            for layer in layers[1:]:
                o2, e2 = _layer(layer, part, seen, scale)
                _merge(o[:, layer.start :], e[:, layer.start :], o2[:, layer.start :], e2[:, layer.start :])
            if todo.rows != n:
                out[some, :, heads] = o[:, :n]
                lse[some, :, heads] = e[:, :n, :, 0]
    return out, lse.masked_fill_(lse == -INF, 0.0)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None, plan: str, options: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (b, n, h, d), todo = q.shape, _plan(plan, tuple(options), q.shape[1], q.shape[2])
    valid = _valid(key_mask, q, todo)
    grads = [q.new_zeros((b, n, h, d)) for _ in range(3)]
    direct = todo.rows == n and q.dtype == lse.dtype
    for some in _samples(q):
        whole = [_pad(x[some], todo.rows) for x in (q, k, v, grad, out, lse[..., None])]
        for heads, layers in todo.groups:
            part = [x[:, :, heads] for x in whole]
            seen = None if valid is None else valid[some, :, heads]
            totals = [x[some, :, heads] if direct else torch.zeros(part[0].shape, dtype=lse.dtype, device=q.device) for x in grads]
            for piece in (piece for layer in layers for piece in layer.pieces):
                views = (piece.queries, piece.keys, piece.keys, piece.queries, piece.queries, piece.queries)
                taken = [view.take(x) for view, x in zip(views, part, strict=True)]
                for view, total, x in zip(views, totals, _gradients(taken, _allowed(piece, seen, q.device), piece.causal, scale), strict=False):
                    view.add(total, x)
            for x, total in zip(grads, totals, strict=True):
                if not direct:
                    x[some, :, heads] = total[:, :n]
    return grads[0], grads[1], grads[2]


def _samples(x: Tensor) -> list[slice]:
    """Parts of the batch to work through one after the other, so that what is temporary stays small."""
    b, n = x.shape[:2]
    step = max(1, (1024 if _dispatch.on_cpu(x) else 65536) // max(n, 1))
    return [slice(first, first + step) for first in range(0, b, step)]


def _pad(x: Tensor, rows: int) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()  # the CPU kernel takes that for granted
    return x if x.shape[1] == rows else F.pad(x, (0, 0) * (x.ndim - 2) + (0, rows - x.shape[1]))


def _valid(key_mask: Tensor | None, q: Tensor, plan: Plan) -> Tensor | None:
    """(B, rows, H, 1), True for keys that are neither masked nor padding; None if nothing is to be hidden."""
    b, n, h, _ = q.shape
    if key_mask is None and (plan.hides_padding or plan.rows == n):
        return None
    valid = q.new_ones((b, n), dtype=torch.bool) if key_mask is None else key_mask
    return F.pad(valid, (0, plan.rows - n))[:, :, None, None].expand(-1, -1, h, 1)


def _allowed(piece: Piece, valid: Tensor | None, device: torch.device) -> Tensor | None:
    mask = None if piece.mask is None else piece.mask(device)
    if valid is not None:
        keys = piece.keys.take(valid).mT
        keys = keys[:, :1] if keys.stride(1) == 0 else keys
        mask = keys if mask is None else mask & keys
    return mask


def _layer(
    layer: Layer, qkv: Sequence[Tensor], valid: Tensor | None, scale: float, zeros: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the pairs of one layer, (B, rows, H, d), (B, rows, H, 1): in `zeros`, if they have these shapes."""
    q, k, v = qkv
    if zeros is not None and zeros[0].shape == q.shape:
        out, lse = zeros
    else:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.zeros((*q.shape[:3], 1), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for piece in layer.pieces:
        o, e = _attend(piece.queries.take(q), piece.keys.take(k), piece.keys.take(v), _allowed(piece, valid, q.device), piece.causal, scale)
        piece.queries.add(out, o)
        piece.queries.add(lse, e[..., None])
    return out, lse


def _merge(out: Tensor, lse: Tensor, out2: Tensor, lse2: Tensor) -> None:
    both = torch.logaddexp(lse, lse2)
    some = both.masked_fill(both == -INF, 0.0)
    out.copy_(out * (lse - some).exp() + out2 * (lse2 - some).exp())
    lse.copy_(both)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -INF)
    return bias.reshape(*[1] * (4 - bias.ndim), *bias.shape)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), -INF) if causal else scores


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one piece, in the queries' view; -inf for a row without keys."""
    bias = _bias(mask, q.dtype)
    if not _dispatch.on_cpu(q):
        scores = _scores(q, k, bias, causal, scale)
        lse = scores.logsumexp(-1)
        return (scores - lse.masked_fill(lse == -INF, 0.0)[..., None]).exp().to(v.dtype) @ v, lse
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if mask is not None:  # the kernel says 0 for a row without keys
        some = (mask.cumsum(-1) > 0)[..., 0, :] if causal else mask.any(-1)
        lse = lse.masked_fill(~some, -INF)
    return out, lse


def _gradients(views: Sequence[Tensor], mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """What one piece adds to the gradients of its q, k, v, from those, the gradient, the merged output and the merged log-sum-exp."""
    q, k, v, grad, out, lse = views
    bias = _bias(mask, q.dtype)
    if _dispatch.on_cpu(q):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse[..., 0], 0.0, causal, attn_mask=bias, scale=scale)
    weights = (_scores(q, k, bias, causal, scale) - lse).exp()
    change = (weights * ((grad @ v.mT).to(weights.dtype) - (grad * out).sum(-1, keepdim=True, dtype=weights.dtype)) * scale).to(q.dtype)
    return change @ k, change.mT @ q, weights.to(q.dtype).mT @ grad


def _fold(function: Callable[..., tuple[Tensor, ...]], tensors: int) -> Callable[..., Any]:
    """vmap by folding the mapped axis into the batch; the first `tensors` arguments are tensors."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size
        given = [
            x if x is None else (x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)).flatten(0, 1)
            for x, axis in zip(args[:tensors], in_dims, strict=False)
        ]
        results = tuple(x.unflatten(0, (size, -1)) for x in function(*given, *args[tensors:]))
        return results, (0,) * len(results)

    return rule


def _count(q: Any, k: Any, v: Any, key_mask: Any, plan: str, options: Sequence[int], scale: float, **_: Any) -> int:
    """What the pieces multiply, counted on one sample without data."""
    one = torch.empty((1, *q.shape[1:]), device="meta")
    with FlopCounterMode(display=False) as counter:
        _forward(one, one, one, None, plan, options, scale)
    return q.shape[0] * counter.get_total_flops()


block_attention = torch.library.custom_op("regard::block_attention", _forward, mutates_args=())
block_attention_backward = torch.library.custom_op("regard::block_attention_backward", _backward, mutates_args=())


@block_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@block_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, key_mask)


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    return *_call(block_attention_backward, grads[0], *ctx.saved_tensors, *ctx.options), None, None, None, None


class _Forward(torch.autograd.Function):
    """The operator under torch.func.grad, where its own registered gradient does not work."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return block_attention(*args)

    setup_context = staticmethod(_keep)
    backward = staticmethod(_differentiate)


class _Gradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return block_attention_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RegardError("block attention is differentiable once; for second derivatives use use_impl('reference')")


def _call(op: Any, *args: Any) -> tuple[Tensor, ...]:
    """The operator itself in a compiled graph, for which it has a gradient registered; else within its autograd function."""
    function = _Forward if op is block_attention else _Gradient
    return op(*args) if torch.compiler.is_compiling() else function.apply(*args)


block_attention.register_autograd(_differentiate, setup_context=_keep)
block_attention.register_vmap(_fold(block_attention, 4))
block_attention_backward.register_vmap(_fold(block_attention_backward, 7))
register_flop_formula(torch.ops.regard.block_attention, get_raw=True)(_count)
