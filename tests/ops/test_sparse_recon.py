"""Sparse reconstruction: every form against the definition, values, codes and gradients; the Fourier form and its bound."""

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.ops._dispatch import use_impl
from regard.ops.sparse_recon import SHRINK, blocked, fourier_recon, largest_singular, reference, sparse_recon

NAMES = ("q", "v", "random", "static", "mixing", "threshold", "step")


def drawn(static: bool, n: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    atoms = 8 if static else 5
    out = {"q": noise(3, 2, n, 4), "v": noise(3, 2, n, 4), "random": noise(2, 4, 5), "mixing": torch.eye(atoms).double() + 0.1 * noise(atoms, atoms)}
    out |= {"threshold": torch.tensor([0.2]).double(), "step": torch.tensor([1.2]).double()}
    return {**out, "static": noise(1, 2, n, 3)} if static else out


def run(impl: str, inputs: dict[str, Tensor], names: tuple[str, ...] = NAMES, **options: Any) -> list[Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    with use_impl(sparse_recon=impl):
        out, code = sparse_recon(**leaves, **options)  # type: ignore[arg-type]
    loss = (out * torch.sin(torch.arange(out.numel())).view_as(out)).sum() + (code * torch.cos(torch.arange(code.numel())).view_as(code)).sum()
    return [out, code, *torch.autograd.grad(loss, [leaves[name] for name in names if name in leaves])]


@pytest.mark.parametrize("impl", ["folded", "blocked"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("steps", "shrink"), [(4, "gelu"), (3, "relu"), (0, "gelu")])
def test_equals_the_definition(impl: str, static: bool, steps: int, shrink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "FLOATS", 90)  # two heads of one sample in a block
    names = NAMES if steps else ("q", "v", "random", "threshold")  # without steps neither mixing nor step has a part
    found = [run(way, drawn(static), names, steps=steps, shrink=shrink) for way in (impl, "reference")]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_queries_too_short_to_be_normalised() -> None:
    """Below length 1e-12 the features' norm term is no constant, and has a gradient."""
    found = []
    for impl in ("blocked", "reference"):
        inputs = drawn(False)
        inputs["q"] *= 2e-13
        found.append(run(impl, inputs, steps=3, shrink="gelu"))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_one_output_alone_has_its_gradient() -> None:
    for which in (0, 1):
        found = []
        for impl in ("blocked", "reference"):
            inputs = {name: t.requires_grad_() for name, t in drawn(False).items()}
            with use_impl(sparse_recon=impl):
                result = sparse_recon(**inputs, steps=3, shrink="gelu")[which]  # type: ignore[arg-type]
            found.append(torch.autograd.grad(result.square().sum(), (inputs["q"], inputs["v"], inputs["mixing"])))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_without_steps_the_gradient_is_the_derivative() -> None:
    """With steps it is not: none flows through the step bound."""
    inputs = drawn(True, n=5)

    def function(q: Tensor, v: Tensor, static: Tensor) -> Tensor:
        return sparse_recon(**{**inputs, "q": q, "v": v, "static": static}, steps=0, shrink="gelu")[0]  # type: ignore[arg-type]

    values = [inputs[name].requires_grad_() for name in ("q", "v", "static")]
    with use_impl(sparse_recon="blocked"):
        assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_dictionary_has_unit_columns_and_forgets_the_scale_of_the_queries() -> None:
    inputs = drawn(True)
    p = reference.dictionary(inputs["q"], inputs["random"], inputs["static"])
    torch.testing.assert_close(p.norm(dim=-2), torch.ones(3, 2, 8, dtype=torch.double))
    torch.testing.assert_close(reference.dictionary(1e3 * inputs["q"], inputs["random"], inputs["static"]), p)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (1, 2), (3, 1)])
@pytest.mark.parametrize("impl", ["factored", "reference"])
def test_fourier_form_against_whole_spectra(impl: str, shape: tuple[int, int]) -> None:
    """The half spectra give the real convolutions of the kernels they stand for, one channel and frequency at a time."""
    h, w = shape
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, h, w, generator=generator, dtype=torch.double)
    kernel, after = (torch.randn(3, *c, h, w // 2 + 1, 2, generator=generator, dtype=torch.double) for c in ((4,), ()))
    k, back, bound = torch.view_as_complex(kernel), torch.view_as_complex(after), largest_singular(kernel)

    def fft(z: Tensor) -> Tensor:
        return torch.fft.rfft2(z, norm="ortho")

    def inverse(z: Tensor) -> Tensor:
        return torch.fft.irfft2(z, shape, norm="ortho")

    with use_impl(fourier_recon=impl):
        out, code = fourier_recon(x, kernel, after, bound, lam=0.3, steps=2, shrink="relu", return_code=True)
        plain, none = fourier_recon(x, kernel, after, bound, lam=0.3, steps=2, shrink="relu")
    for c in range(3):
        target = torch.stack([inverse(k[c, i] * fft(x[:, c])) for i in range(4)], 1)
        z = SHRINK["relu"](target, 0.3)
        for _ in range(2):
            again = torch.stack([inverse(sum(k[c, i] * k[c, j].conj() * fft(z[:, j]) for j in range(4))) for i in range(4)], 1)
            z = SHRINK["relu"](z - (again - target) / bound[c], 0.3 / bound[c].item())
        decoded = inverse(sum(k[c, j].conj() * fft(z[:, j]) for j in range(4)))
        torch.testing.assert_close(code[:, c], z)
        torch.testing.assert_close(out[:, c], inverse(back[c] * fft(decoded)))
    assert none is None
    torch.testing.assert_close(plain, out)


def test_fourier_gradients_in_blocks_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.ops.linear_attention import api

    monkeypatch.setattr(api, "KEPT", 0)
    monkeypatch.setattr(api, "BLOCK", 200)
    found = []
    for impl in ("factored", "reference"):
        generator = torch.Generator().manual_seed(3)
        inputs = [torch.randn(s, generator=generator, dtype=torch.double).requires_grad_() for s in ((2, 3, 4, 4), (3, 2, 4, 3, 2), (3, 4, 3, 2))]
        with use_impl(fourier_recon=impl):
            out, _ = fourier_recon(*inputs, torch.full((3,), 9.0).double(), lam=0.1, steps=3, shrink="gelu")
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_largest_singular_is_that_of_the_products() -> None:
    kernel = torch.randn(3, 5, 4, 3, 2, dtype=torch.double)
    k = torch.view_as_complex(kernel)
    products = torch.einsum("crhw,cshw->chwrs", k, k.conj()).real
    torch.testing.assert_close(largest_singular(kernel), torch.linalg.svdvals(products).flatten(1).amax(1))
