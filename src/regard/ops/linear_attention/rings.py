"""sum_r w_r sum_{t in ring r} (q . k_t) v_t on a map: the pixels at distance max(|dy|, |dx|) = r are ring r, the last weight is for all others.

"dense": all pairs. "window": the last weight times the sum over the whole map, and tiles of pixels against the R - 1 pixels around them, with the
other weights less the last. "sat": sum_r (w_r - w_{r+1}) Box_r of every column of k x v, box sums from a table of float64; its work is
N R m e element by element where a window needs N (2 R)^2 (m + e) in dense products. All three keep only their inputs for the backward pass.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocked import blocks_of
from .opaque import merged, product

TILE = 64  # pixels of a tile: 8 x 8, longer where the map is lower


def budget(x: Tensor) -> int:
    """Floats of one temporary: what stays in the cache, or fills a device."""
    return 1 << 18 if x.device.type == "cpu" else 1 << 26


def _axes(height: int, width: int, rings: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(side of a tile, pixels beyond it on each side) along the height and the width; a tile as long as the map needs none beyond."""
    rows = min(8, height)
    return tuple((min(n, side), 0 if n <= side else rings - 1) for n, side in ((height, rows), (width, TILE // rows)))  # type: ignore[return-value]


def faster(height: int, width: int, rings: int, m: int, e: int) -> str:
    """By nanoseconds for a pixel on one core of a CPU, measured: 2 + 0.04 (m + e) for each pixel it meets, 4.2 for each box sum of a column."""
    n, seen = height * width, math.prod(side + 2 * beyond for side, beyond in _axes(height, width, rings))
    way, keys = ("window", seen) if 2 * n > 3 * seen else ("dense", n)
    return "sat" if 4.2 * rings * m * e < keys * (2 + 0.04 * (m + e)) else way


def forward(q: Tensor, k: Tensor, v: Tensor, w: Tensor, height: int, width: int, method: str) -> Tensor:
    """q, k (B, H, N, m), v (B, H, N, e), w (B, H, N, R + 1)."""
    return _way(q, v, w, height, width, method)[0](q, k, v, w, height, width)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor, height: int, width: int, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _way(q, v, w, height, width, method)[1](grad, q, k, v, w, height, width)


def _way(q: Tensor, v: Tensor, w: Tensor, height: int, width: int, method: str):
    method = faster(height, width, w.shape[3] - 1, q.shape[3], v.shape[3]) if method == "auto" else method
    return {"dense": (_dense, _dense_backward), "window": (_window, _window_backward), "sat": (_sat, _sat_backward)}[method]


def _pick(y: Tensor, x: Tensor, height: int, width: int, like: Tensor, rings: int, last: int) -> Tensor:
    """Which of the weights 0 .. rings - 1 pixels (y, x), (p,) each, give to those of a map: (p, rings, height width). `last` is the largest ring."""
    rows, columns = ((at[:, None] - torch.arange(side, device=like.device)).abs() for at, side in ((y, height), (x, width)))
    far = torch.maximum(rows[:, :, None], columns[:, None, :]).clamp_max(last).flatten(1)
    return (far[:, None] == torch.arange(rings, device=like.device)[:, None]).to(like.dtype)


def _mix(q: Tensor, k: Tensor, v: Tensor, w: Tensor, pick: Tensor) -> Tensor:
    """Problems q (T, p, m), k (T, s, m), v (T, s, e), w (T, p, rings), pick (p, rings, s) -> (T, p, e)."""
    scores = q @ k.mT
    return scores.mul_((w.transpose(0, 1) @ pick).transpose(0, 1)) @ v


def _unmix(g: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor, pick: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, w."""
    weights, scores, change = (w.transpose(0, 1) @ pick).transpose(0, 1), q @ k.mT, g @ v.mT
    dw = ((scores * change).transpose(0, 1) @ pick.mT).transpose(0, 1)
    scores.mul_(weights)
    change.mul_(weights)
    return change @ k, change.mT @ q, scores.mT @ g, dw


def _row_blocks(q: Tensor, w: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor, list[tuple[slice, slice]]]]:
    """Runs of queries with their choices among all keys, and the (batch, head) pairs to take at a time."""
    n, last = height * width, w.shape[3] - 1
    rows = max(1, min(n, 4 * budget(q) // (n * w.shape[3])))
    for start in range(0, n, rows):
        some = slice(start, min(start + rows, n))
        at = torch.arange(some.start, some.stop, device=q.device)
        pick = _pick(at // width, at % width, height, width, q, last + 1, last)
        yield some, pick, blocks_of(q.shape[0], q.shape[1], rows * n, 2 * budget(q))


def _dense(q: Tensor, k: Tensor, v: Tensor, w: Tensor, height: int, width: int) -> Tensor:
    out = merged(v, v.shape[3])
    for some, pick, blocks in _row_blocks(q, w, height, width):
        for block in blocks:
            asking, sticks, part = (t[block][:, :, some] for t in (q, w, out))
            found = _mix(asking.flatten(0, 1), k[block].flatten(0, 1), v[block].flatten(0, 1), sticks.flatten(0, 1), pick)
            part.copy_(found.view(part.shape))
    return out


def _dense_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    totals = [t.new_zeros(t.shape) for t in (q, k, v, w)]
    for some, pick, blocks in _row_blocks(q, w, height, width):
        rows = (some, slice(None), slice(None), some)
        for block in blocks:
            a, b, c, d = (t[block][:, :, own].flatten(0, 1) for t, own in zip((q, k, v, w), rows, strict=True))
            found = _unmix(grad[block][:, :, some].flatten(0, 1), a, b, c, d, pick)
            for total, own, one in zip(totals, rows, found, strict=True):
                part = total[block][:, :, own]
                part += one.view(part.shape)
    return totals[0], totals[1], totals[2], totals[3]


class _Tiles:
    """A map (P, H, W, c) as tiles (P rows columns, p, c), and as the windows around them (P rows columns, s, c)."""

    def __init__(self, height: int, width: int, rings: int) -> None:
        self.height, self.width, self.rings = height, width, rings
        (self.y, self.above), (self.x, self.left) = _axes(height, width, rings)
        self.rows, self.columns = -(-height // self.y), -(-width // self.x)
        self.sides = self.y + 2 * self.above, self.x + 2 * self.left

    def pick(self, like: Tensor) -> Tensor:
        at = torch.arange(self.y * self.x, device=like.device)
        return _pick(at // self.x + self.above, at % self.x + self.left, *self.sides, like, self.rings, self.rings)

    def cut(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, self.columns * self.x - self.width, 0, self.rows * self.y - self.height))
        return x.unflatten(2, (self.columns, self.x)).unflatten(1, (self.rows, self.y)).transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def join(self, tiles: Tensor) -> Tensor:
        x = tiles.unflatten(0, (-1, self.rows, self.columns)).unflatten(3, (self.y, self.x)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, : self.height, : self.width]

    def windows(self, x: Tensor) -> Tensor:
        low, right = self.rows * self.y - self.height + self.above, self.columns * self.x - self.width + self.left
        x = F.pad(x, (0, 0, self.left, right, self.above, low))
        return x.unfold(1, self.sides[0], self.y).unfold(2, self.sides[1], self.x).movedim(3, 5).flatten(3, 4).flatten(0, 2)

    def add(self, windows: Tensor) -> Tensor:
        """The adjoint of `windows`."""
        windows = windows.unflatten(0, (-1, self.rows, self.columns)).unflatten(3, self.sides)
        steps = [-(-side // tile) for side, tile in zip(self.sides, (self.y, self.x), strict=True)]
        total = windows.new_zeros(windows.shape[0], (self.rows + steps[0] - 1) * self.y, (self.columns + steps[1] - 1) * self.x, windows.shape[5])
        for i, j in itertools.product(*map(range, steps)):
            part = windows[:, :, :, i * self.y : (i + 1) * self.y, j * self.x : (j + 1) * self.x].transpose(2, 3)
            where = total[:, i * self.y : (i + self.rows) * self.y, j * self.x : (j + self.columns) * self.x]
            where.unflatten(2, (self.columns, self.x)).unflatten(1, (self.rows, self.y))[:, :, : part.shape[2], :, : part.shape[4]] += part
        return total[:, self.above : self.above + self.height, self.left : self.left + self.width]


def _tile_blocks(q: Tensor, tiles: _Tiles) -> list[tuple[slice, slice]]:
    return blocks_of(q.shape[0], q.shape[1], tiles.rows * tiles.columns * tiles.y * tiles.x * math.prod(tiles.sides), 2 * budget(q))


def _window(q: Tensor, k: Tensor, v: Tensor, w: Tensor, height: int, width: int) -> Tensor:
    tiles, out = _Tiles(height, width, w.shape[3] - 1), merged(v, v.shape[3])
    pick = tiles.pick(q)
    for block in _tile_blocks(q, tiles):
        queries, keys, values, weights = (t[block].flatten(0, 1) for t in (q, k, v, w))
        last = weights[..., -1:]
        local = weights[..., :-1] - last
        maps = [t.unflatten(1, (height, width)) for t in (queries, keys, values, local)]
        near = _mix(tiles.cut(maps[0]), tiles.windows(maps[1]), tiles.windows(maps[2]), tiles.cut(maps[3]), pick)
        part = out[block]
        part.copy_((tiles.join(near).flatten(1, 2) + last * (queries @ (keys.mT @ values))).view(part.shape))
    return out


def _window_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles = _Tiles(height, width, w.shape[3] - 1)
    pick, out = tiles.pick(q), [t.new_empty(t.shape) for t in (q, k, v, w)]
    for block in _tile_blocks(q, tiles):
        g, queries, keys, values, weights = (t[block].flatten(0, 1) for t in (grad, q, k, v, w))
        last = weights[..., -1:]
        maps = [t.unflatten(1, (height, width)) for t in (g, queries, keys, values, weights[..., :-1] - last)]
        given, a, b, c, d = (tiles.windows(t) if at in (2, 3) else tiles.cut(t) for at, t in enumerate(maps))
        found = _unmix(given, a, b, c, d, pick)
        dq, dk, dv, dw = (tiles.add(t) if at in (1, 2) else tiles.join(t) for at, t in enumerate(found))
        dq, dk, dv, dw = (t.flatten(1, 2) for t in (dq, dk, dv, dw))
        total, scaled = keys.mT @ values, last * queries
        dtotal, read = scaled.mT @ g, g @ total.mT
        dq, dk, dv = dq + last * read, dk + values @ dtotal.mT, dv + keys @ dtotal
        dlast = (read * queries).sum(-1, keepdim=True) - dw.sum(-1, keepdim=True)
        for whole, one in zip(out, (dq, dk, dv, torch.cat((dw, dlast), -1)), strict=True):
            whole[block] = one.view(whole[block].shape)
    return out[0], out[1], out[2], out[3]


class _Boxes:
    """Sums of x (..., H, W) over squares cut off at the border, in x's precision but from a table in float64."""

    def __init__(self, x: Tensor, rings: int) -> None:
        table = F.pad(x.double().cumsum(-1).cumsum(-2), (1, 0, 1, 0)).flatten(0, -3)
        self.table, self.rings, self.like = F.pad(table, (rings,) * 4, mode="replicate"), rings, x

    def sums(self, r: int) -> Tensor:
        """The sums over a distance of at most r, around every pixel."""
        (height, width), low, high = self.like.shape[-2:], self.rings - r, self.rings + r + 1
        rows = self.table[:, high : high + height] - self.table[:, low : low + height]
        return (rows[..., high : high + width] - rows[..., low : low + width]).to(self.like.dtype).view(self.like.shape)


def _columns(q: Tensor, v: Tensor, height: int, width: int) -> tuple[list[tuple[slice, slice]], int]:
    """The (batch, head) pairs and the columns of v to take at a time."""
    return blocks_of(q.shape[0], q.shape[1], v.shape[3] * height * width, budget(q)), max(1, budget(q) // (height * width))


def _sat(q: Tensor, k: Tensor, v: Tensor, w: Tensor, height: int, width: int) -> Tensor:
    rings, out = w.shape[3] - 1, merged(v, v.shape[3])
    blocks, step = _columns(q, v, height, width)
    for block in blocks:
        queries, keys, values, weights = (t[block].mT.unflatten(-1, (height, width)) for t in (q, k, v, w))
        steps, start = weights[:, :, :-1] - weights[:, :, 1:], 0
        for u in values.split(step, 2):
            total = torch.zeros_like(u)
            for a in range(q.shape[3]):
                boxes = _Boxes(keys[:, :, a, None] * u, rings)
                for r in range(rings):
                    total.addcmul_(queries[:, :, a, None] * steps[:, :, r, None], boxes.sums(r))
            out[block][..., start : start + u.shape[2]] = total.flatten(3).mT
            start += u.shape[2]
        out[block] += w[block][..., -1:] * (q[block] @ (k[block].mT @ v[block]))
    return out


def _sat_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, w: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rings, out = w.shape[3] - 1, [t.new_empty(t.shape) for t in (q, k, v, w)]
    blocks, step = _columns(q, v, height, width)
    for block in blocks:
        g, queries, keys, values, weights = (t[block].mT.unflatten(-1, (height, width)) for t in (grad, q, k, v, w))
        steps = weights[:, :, :-1] - weights[:, :, 1:]
        dqueries, dkeys, dsteps, dvalues = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(steps), []
        for u, given in zip(values.split(step, 2), g.split(step, 2), strict=True):
            du = torch.zeros_like(u)
            for a in range(q.shape[3]):
                boxes, change = _Boxes(keys[:, :, a, None] * u, rings), torch.zeros_like(u)
                for r in range(rings):
                    share = (boxes.sums(r) * given).sum(2)
                    dqueries[:, :, a] += steps[:, :, r] * share
                    dsteps[:, :, r] += queries[:, :, a] * share
                    change += _Boxes((queries[:, :, a] * steps[:, :, r]).unsqueeze(2) * given, rings).sums(r)  # a box is its own adjoint
                dkeys[:, :, a] += (change * u).sum(2)
                du.addcmul_(keys[:, :, a, None], change)
            dvalues.append(du)
        dq, dk, dv, dw = (t.flatten(3).mT for t in (dqueries, dkeys, torch.cat(dvalues, 2), F.pad(dsteps, (0, 0, 0, 0, 0, 1))))
        dw = dw - F.pad(dw, (1, 0))[..., :-1]
        last, total = w[block][..., -1:], k[block].mT @ v[block]
        read, dtotal = grad[block] @ total.mT, (last * q[block]).mT @ grad[block]
        dw[..., -1:] += (read * q[block]).sum(-1, keepdim=True)
        for whole, one in zip(out, (dq + last * read, dk + v[block] @ dtotal.mT, dv + k[block] @ dtotal, dw), strict=True):
            whole[block] = one
    return out[0], out[1], out[2], out[3]


def count(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], w: tuple[int, ...], height: int, width: int, method: str) -> int:
    """Multiply-adds of queries and keys, and of weights and values; choosing a weight for a pair is not counted."""
    (b, h, n, m), e, rings = q, v[3], w[3] - 1
    method = faster(height, width, rings, m, e) if method == "auto" else method
    if method == "dense":
        return b * h * n * n * (m + e)
    local = rings * m * e if method == "sat" else (m + e) * math.prod(side + 2 * beyond for side, beyond in _axes(height, width, rings))
    return b * h * n * (local + 2 * m * e)


ring_product = product("ring_product", forward, backward, count)
