"""The Triton kernels of window_apply against the shifted way: by Triton's interpreter on a CPU, and on a device where there is one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regard import RegardError, explain, use_impl
from regard.ops.local_window import Window, api, opaque, shifted, window_apply

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# batch, groups, channels of a group, height, width, (kernel, stride, dilation, first, scale), dtype
CASES = [
    (2, 2, 3, 7, 11, (3, 1, 1, -1, 2), torch.float32),
    (1, 1, 11, 13, 11, (3, 1, 1, -1, 1), torch.float32),
    (1, 3, 2, 9, 11, (4, 2, 2, -4, 1), torch.float64),
    (2, 1, 5, 8, 9, (3, 3, 1, -1, 1), torch.float16),
    (1, 2, 9, 5, 6, (3, 1, 2, -2, 1), torch.bfloat16),
    (1, 1, 2, 9, 8, (4, 1, 1, -1, 1), torch.float32),
    (1, 1, 2, 2, 3, (5, 1, 1, -2, 3), torch.float32),
    (1, 2, 1, 1, 1, (3, 1, 1, -1, 2), torch.float32),
    (1, 1, 3, 6, 5, (3, 1, 1, 0, 1), torch.float32),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def inputs(case: tuple, layout: str, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, values, a gradient of the output; whole, or transposed as interleaved groups and channels_last maps are."""
    batch, groups, channels, height, width, (kernel, stride, _, _, scale), dtype = case
    draw = torch.Generator().manual_seed(0)
    rows, columns = -(-height // stride), -(-width // stride)

    def randn(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=draw, dtype=torch.float64).to(device, dtype)
        return x if layout == "whole" else x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))

    w = randn(batch, groups, kernel**2, scale**2, rows, columns)
    return w, randn(batch, groups, channels, height, width), randn(batch, groups, channels, rows * scale, columns * scale)


def compare(device: str) -> None:
    """The three kernels in every case; what they do not write is NaN."""
    from regard.ops.local_window import fused

    def poison(make):
        return lambda *a, **k: make(*a, **k).fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        for i, case in enumerate(CASES):
            for layout in ("whole", "transposed")[: 2 if i < 3 else 1]:
                w, v, dy = inputs(case, layout, device)
                options, dtype = case[5:]
                a, b, c = (x.to(torch.promote_types(dtype, torch.float32)) for x in (w, v, dy))
                expected = shifted.forward(a, b, *options), *shifted.backward(c, a, b, *options)
                found = fused.forward(w, v, *options), *fused.backward(dy, w, v, *options)
                for name, one, other in zip(("out", "dw", "dv"), found, expected, strict=True):
                    bound = TOLERANCE[dtype] * max(1.0, float(other.abs().max()))
                    assert one.dtype == dtype and one.is_contiguous(), (case, layout, name)
                    torch.testing.assert_close(one.to(other.dtype), other, rtol=0, atol=bound, msg=lambda m, at=(case, layout, name): f"{at}: {m}")


def long_sums(device: str) -> None:
    """Half precision: 81 summands of one sign, which a half-precision sum would lose; weights of another dtype than the values."""
    from regard.ops.local_window import fused

    v, w = torch.rand(1, 1, 20, 9, 9, dtype=torch.float64), torch.rand(1, 1, 81, 1, 9, 9, dtype=torch.float64)
    half, single, options = v.to(device, torch.bfloat16), w.to(device, torch.float32), (9, 1, 1, -4, 1)
    found = fused.forward(single, half, *options), *fused.backward(half, single, half, *options)
    expected = shifted.forward(single, half.float(), *options), *shifted.backward(half.float(), single, half.float(), *options)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for one, other, bound in zip(found, expected, (8e-3, 1e-5, 8e-3), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=bound, atol=1e-5)


def operator(device: str) -> None:
    """Through the operator, differentiated."""
    w, v = (torch.rand(*shape, device=device, requires_grad=True) for shape in ((1, 2, 9, 4, 4, 3), (1, 2, 3, 4, 3)))
    outs = [opaque.window_apply(w, v, 3, 1, 1, -1, 2, way) for way in ("fused", "shifted")]
    found, expected = ([y, *torch.autograd.grad(y.square().sum(), (w, v))] for y in outs)
    assert not torch.equal(found[2], torch.zeros_like(v))
    torch.testing.assert_close(found, expected)


@needs_triton
def test_kernels_agree_in_the_interpreter() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, Path(__file__)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_agree_on_the_device() -> None:
    compare("cuda")
    long_sums("cuda")
    operator("cuda")
    w, v = torch.rand(1, 2, 9, 4, 5, 6, device="cuda", requires_grad=True), torch.rand(1, 6, 5, 6, device="cuda", requires_grad=True)
    found = {}
    for impl in ("fused", "shifted"):
        with use_impl(window_apply=impl):
            y = window_apply(w, v, Window(3), scale_factor=2)
        found[impl] = y, *torch.autograd.grad(y.square().sum(), (w, v))
    torch.testing.assert_close(found["fused"], found["shifted"])


class Apply(torch.nn.Module):
    def forward(self, w: Tensor, v: Tensor) -> Tensor:
        return window_apply(w, v, Window(3))


def test_the_way_is_chosen_by_device_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    w, v = torch.rand(1, 1, 9, 4, 4), torch.rand(1, 2, 4, 4)
    monkeypatch.setattr(api, "TRITON", True)
    assert [choice.impl for choice in explain(Apply(), w, v)] == ["shifted"]
    with use_impl(window_apply="fused"), pytest.raises(RegardError, match="needs Triton and a CUDA device, got cpu"):
        window_apply(w, v, Window(3))
    for installed, way in ((True, "fused"), (False, "shifted")):
        monkeypatch.setattr(api, "TRITON", installed)
        with torch._subclasses.FakeTensorMode():  # shapes alone, on a device that need not be there
            w, v = torch.empty(1, 1, 9, 4, 4, device="cuda"), torch.empty(1, 2, 4, 4, device="cuda")
            assert [choice.impl for choice in explain(Apply(), w, v)] == [way]


def test_kernels_are_not_imported_until_chosen() -> None:
    code = "import sys, regard.ops.local_window as m; print('regard.ops.local_window.fused' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


if __name__ == "__main__":
    compare("cpu")
    long_sums("cpu")
    operator("cpu")
