"""window_apply as three Triton kernels: the output, the gradient of the weights, the gradient of the values.

A program has a batch, a group and a tile of pixels: it gathers, over the window and, some at a time, the channels. Nothing is scattered, so there are
no atomics and results do not vary from run to run. Sums are kept in at least float32. Inputs may have any strides.

Imported only when chosen: torch's CPU wheels come without Triton. Checked by Triton's interpreter, and compiled for sm_80 and sm_90, on a machine
without a GPU: no run on a device yet, and the tile sizes are not tuned.
"""

# Triton may be missing, and its language is not Python to a type checker.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .window import accumulator

BLOCK_P = 128  # pixels of a tile
BLOCK_C = 8  # channels at a time


def forward(w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int) -> Tensor:
    """w (B, G, k^2, s^2, H', W'), v (B, G, C, H, W) -> (B, G, C, s H', s W')."""
    out = v.new_empty(*v.shape[:3], w.shape[-2] * scale, w.shape[-1] * scale)
    _launch(_forward, out, (w, v, out), w, v, kernel, stride, dilation, first, scale)
    return out


def backward(dy: Tensor, w: Tensor, v: Tensor, kernel: int, stride: int, dilation: int, first: int, scale: int) -> tuple[Tensor, Tensor]:
    """The gradients of w and v."""
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    _launch(_backward_weights, dy, (dy, v, dw), w, v, kernel, stride, dilation, first, scale)
    _launch(_backward_values, v, (dy, w, dv), w, v, kernel, stride, dilation, first, scale)
    return dw, dv


def _launch(
    program: Any,
    tiled: Tensor,
    maps: tuple[Tensor, Tensor, Tensor],
    w: Tensor,
    v: Tensor,
    kernel: int,
    stride: int,
    dilation: int,
    first: int,
    scale: int,
) -> None:
    """Two maps to read, one to write; a program for each tile of the pixels of `tiled`."""
    batch, groups, channels, *space = v.shape
    grid = (batch * groups * triton.cdiv(tiled.shape[-2] * tiled.shape[-1], BLOCK_P),)
    one, other, written = maps
    with torch.cuda.device_of(v):
        program[grid](
            *(one, other, written),
            *(one.stride(), other.stride()),
            *(groups, *space, *w.shape[-2:]),
            CHANNELS=channels,
            KERNEL=kernel,
            STRIDE=stride,
            DILATION=dilation,
            FIRST=first,
            SCALE=scale,
            SUM=tl.float64 if accumulator(v) == torch.float64 else tl.float32,
            BLOCK_C=min(BLOCK_C, triton.next_power_of_2(channels)),
            BLOCK_P=BLOCK_P,
        )


@triton.jit
def _tile(height, width, groups, BLOCK_P: tl.constexpr):
    """Batch and group of this program, together and each; row and column of its pixels, and which of them there are."""
    tiles = tl.cdiv(height * width, BLOCK_P)
    part = tl.program_id(0) // tiles
    pixel = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pixel < height * width
    row, column = (pixel // width).to(tl.int64), (pixel % width).to(tl.int64)
    return part.to(tl.int64), (part // groups).to(tl.int64), (part % groups).to(tl.int64), row, column, inside


@triton.jit
def _forward(
    w,
    v,
    out,
    w_strides,
    v_strides,
    groups,
    height,
    width,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    FIRST: tl.constexpr,
    SCALE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    part, b, g, row, column, real = _tile(rows * SCALE, columns * SCALE, groups, BLOCK_P)
    y, x = row // SCALE, column // SCALE
    phase = row % SCALE * SCALE + column % SCALE
    weights = w + b * w_strides[0] + g * w_strides[1] + phase * w_strides[3] + y * w_strides[4] + x * w_strides[5]
    values = v + b * v_strides[0] + g * v_strides[1]
    for start in range(0, CHANNELS, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        total = tl.zeros((BLOCK_C, BLOCK_P), SUM)
        for j in range(KERNEL * KERNEL):
            source_y = y * STRIDE + FIRST + DILATION * (j // KERNEL)
            source_x = x * STRIDE + FIRST + DILATION * (j % KERNEL)
            seen = real & (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)
            weight = tl.load(weights + tl.cast(j, tl.int64) * w_strides[2], seen, 0.0).to(SUM)
            at = values + c * v_strides[2] + (source_y * v_strides[3] + source_x * v_strides[4])[None, :]
            total += weight[None, :] * tl.load(at, seen[None, :] & (c < CHANNELS), 0.0).to(SUM)
        to = out + (part * CHANNELS + c) * (rows * SCALE * columns * SCALE) + (row * columns * SCALE + column)[None, :]
        tl.store(to, total.to(out.dtype.element_ty), real[None, :] & (c < CHANNELS))


@triton.jit
def _backward_weights(
    dy,
    v,
    dw,
    dy_strides,
    v_strides,
    groups,
    height,
    width,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    FIRST: tl.constexpr,
    SCALE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    part, b, g, row, column, real = _tile(rows * SCALE, columns * SCALE, groups, BLOCK_P)
    y, x = row // SCALE, column // SCALE
    phase = row % SCALE * SCALE + column % SCALE
    outputs = dy + b * dy_strides[0] + g * dy_strides[1] + row * dy_strides[3] + column * dy_strides[4]
    values = v + b * v_strides[0] + g * v_strides[1]
    for j in range(KERNEL * KERNEL):
        source_y = y * STRIDE + FIRST + DILATION * (j // KERNEL)
        source_x = x * STRIDE + FIRST + DILATION * (j % KERNEL)
        seen = real & (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)
        total = tl.zeros((BLOCK_P,), SUM)
        for start in range(0, CHANNELS, BLOCK_C):
            c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
            mask = seen[None, :] & (c < CHANNELS)
            output = tl.load(outputs[None, :] + c * dy_strides[2], mask, 0.0).to(SUM)
            at = values + c * v_strides[2] + (source_y * v_strides[3] + source_x * v_strides[4])[None, :]
            total += tl.sum(output * tl.load(at, mask, 0.0).to(SUM), 0)
        to = dw + (((part * KERNEL * KERNEL + j) * SCALE * SCALE + phase) * rows + y) * columns + x
        tl.store(to, total.to(dw.dtype.element_ty), real)


@triton.jit
def _backward_values(
    dy,
    w,
    dv,
    dy_strides,
    w_strides,
    groups,
    height,
    width,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    FIRST: tl.constexpr,
    SCALE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    part, b, g, row, column, real = _tile(height, width, groups, BLOCK_P)
    weights = w + b * w_strides[0] + g * w_strides[1]
    outputs = dy + b * dy_strides[0] + g * dy_strides[1]
    for start in range(0, CHANNELS, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[:, None]
        total = tl.zeros((BLOCK_C, BLOCK_P), SUM)
        for j in range(KERNEL * KERNEL):
            # The output pixel, if there is one, that sees this one as the j-th of its window.
            ahead_y = row - FIRST - DILATION * (j // KERNEL)
            ahead_x = column - FIRST - DILATION * (j % KERNEL)
            y, x = ahead_y // STRIDE, ahead_x // STRIDE
            exact = (ahead_y >= 0) & (ahead_x >= 0) & (ahead_y % STRIDE == 0) & (ahead_x % STRIDE == 0)
            seen = real & exact & (y < rows) & (x < columns)
            for phase in range(SCALE * SCALE):
                window = tl.cast(j, tl.int64) * w_strides[2] + tl.cast(phase, tl.int64) * w_strides[3]
                weight = tl.load(weights + window + y * w_strides[4] + x * w_strides[5], seen, 0.0).to(SUM)
                to_y, to_x = y * SCALE + phase // SCALE, x * SCALE + phase % SCALE
                at = outputs + c * dy_strides[2] + (to_y * dy_strides[3] + to_x * dy_strides[4])[None, :]
                total += weight[None, :] * tl.load(at, seen[None, :] & (c < CHANNELS), 0.0).to(SUM)
        to = dv + (part * CHANNELS + c) * (height * width) + (row * width + column)[None, :]
        tl.store(to, total.to(dv.dtype.element_ty), real[None, :] & (c < CHANNELS))
