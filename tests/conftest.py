"""Settings of all tests: one thread a worker, NaN in uninitialised memory, no leftovers between tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
with torch.device("meta"):  # remembers the real torch.empty as a factory before it is replaced below
    torch.zeros(1)


@pytest.fixture(autouse=True)
def poisoned_empty_memory(monkeypatch: pytest.MonkeyPatch):
    """`torch.empty` gives NaN, so that a kernel which forgets an element is seen."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        out = plain(*args, **kwargs)
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not torch.compiler.is_compiling():
            out.data.fill_(float("nan"))
        return out

    monkeypatch.setattr(torch, "empty", poisoned)
