"""What several checks do."""

import torch
from torch import Tensor, nn

from ..subject import Inputs, Subject, tensors
from ..suite import expect


def forward(module: nn.Module, inputs: Inputs, **flags: object) -> Tensor:
    """The first tensor of the result."""
    return tensors(module(**inputs, **flags))[0]


def close(actual: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Largest difference within `bound` of the largest entry."""
    expect(actual.shape == expected.shape, "{}: shape {} against {}", what, tuple(actual.shape), tuple(expected.shape))
    if not expected.numel():
        return
    expect(bool(actual.isfinite().all()), "{}: not finite", what)
    scale = max(expected.double().abs().max().item(), 1e-6)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    expect(error <= bound, "{}: off by {:.1e} of the largest entry (bound {:.0e})", what, error, bound)


def gradients(module: nn.Module, inputs: Inputs, *, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output, and the gradients of a random projection of all outputs: inputs by name, parameters by "param.<name>"."""
    leaves = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    module.zero_grad()
    results = [t for t in tensors(module(**leaves)) if t.requires_grad]
    expect(bool(results), "no output carries a gradient")
    generator = torch.Generator().manual_seed(seed)
    loss = torch.stack([(t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in results]).sum()
    loss.backward()
    out = {name: t.grad for name, t in leaves.items() if t.grad is not None}
    out |= {f"param.{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return results[0].detach(), out


def rows(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """Some elements of the batch."""
    return {name: t[index] for name, t in inputs.items()}


def tokens_axis(subject: Subject) -> bool:
    """Whether positions are axis 1 (sequences, sets, graphs) rather than trailing axes (maps)."""
    return subject.layout not in ("map", "pair")
