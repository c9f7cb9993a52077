"""What only `vars` has: three variants, codes, random features, the step bound, blocks of the authors' checkpoints, grids."""

from typing import Any

import pytest
import torch

import regard
from regard.errors import RegardError
from regard.official import load_official, to_official
from regard.ops.sparse_recon import largest_singular

VARIANTS: list[dict[str, Any]] = [
    {"variant": "d", "dim": 16, "num_heads": 2},
    {"variant": "sd", "dim": 16, "num_heads": 2, "grid_size": (3, 5)},
    {"variant": "s", "dim": 6, "grid_size": (3, 5), "lam": 0.3},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: o["variant"])
def test_code_comes_beside_the_same_output(options: dict[str, Any]) -> None:
    module, x = regard.create("vars", **options).eval(), torch.randn(2, 15, options["dim"])
    out, code = module(x, return_code=True)
    torch.testing.assert_close(out, module(x))
    assert tuple(code.shape) == {"d": (2, 2, 16, 8), "sd": (2, 2, 32, 8), "s": (2, 6, 5, 3, 5)}[options["variant"]]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: o["variant"])
@pytest.mark.parametrize("scale", [1e3, 1e-30, 0.0])
def test_finite_at_any_scale(options: dict[str, Any], scale: float) -> None:
    module, x = regard.create("vars", **options), (scale * torch.randn(2, 15, options["dim"])).requires_grad_()
    out = module(x)
    out.sum().backward()
    assert out.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_defaults_follow_the_variant() -> None:
    for options, expected in zip(VARIANTS, [(0.3, 5, "gelu"), (0.3, 5, "gelu"), (3.5, 3, "relu")], strict=True):
        module = regard.create("vars", **{k: v for k, v in options.items() if k != "lam"})
        assert (module.lam, module.num_steps, module.shrink) == expected
    assert regard.create("vars", "sd", 16, 2, 4).grid_size == (4, 4)
    assert regard.create("vars", dim=16, num_heads=2, feature_ratio=3).rand_matrix.shape == (2, 8, 24)


def test_given_random_features_replace_the_buffer() -> None:
    module, x = regard.create("vars", dim=16, num_heads=2), torch.randn(2, 9, 16)
    other = torch.randn(2, 8, 16)
    changed = module(x, random_features=other)
    assert (changed - module(x)).abs().max() > 1e-4
    module.rand_matrix.copy_(other)
    torch.testing.assert_close(module(x), changed)
    with pytest.raises(RegardError, match=r"random_features must be \(2, 8, 16\), got \(2, 8, 8\)"):
        module(x, random_features=other[..., :8])


def test_d_takes_any_length_and_permutes_with_its_tokens() -> None:
    module, order = regard.create("vars", dim=16, num_heads=2).double(), torch.randperm(23)
    x = torch.randn(1, 23, 16, dtype=torch.double)
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]))


def test_step_bound_of_s() -> None:
    """Set at the start from kernels of norm sqrt(H W / 2) each; moved by update_L alone."""
    module = regard.create("vars", "s", 6, grid_size=(4, 6))
    torch.testing.assert_close(module.kernel.square().sum((2, 3, 4, 5)), torch.full((6, 5), 12.0))
    bound = largest_singular(module.kernel[:, :, 0])
    torch.testing.assert_close(module.L, bound)
    module.kernel.data.mul_(2)
    module.train()(torch.randn(2, 24, 6))
    torch.testing.assert_close(module.L, bound)
    module.update_L()
    torch.testing.assert_close(module.L, 0.9 * bound + 0.4 * bound)
    module.update_L(1.0)
    torch.testing.assert_close(module.L, 4 * bound)
    regard.create("vars", dim=16, num_heads=2).update_L()


def test_checkpoints_of_the_authors() -> None:
    """`L` of d and sd, and the MLP of a whole block of s, carry nothing for us; the bound of s does."""
    for options in VARIANTS:
        source, target = regard.create("vars", **options), regard.create("vars", **options)
        state = to_official(source)
        s = options["variant"] == "s"
        assert ("L" in state) == s
        idle = {"kernel_norm": (), "mlp.fc1.weight": (3,), "norm2.bn.weight": (6,)} if s else {"L": (2,)}
        state |= {name: torch.full(shape, 25.0) for name, shape in idle.items()}
        load_official(target, state)
        assert all(torch.equal(t, target.state_dict()[name]) for name, t in source.state_dict().items())
        if s:
            del state["L"]
            with pytest.raises(RegardError, match="missing L"):
                load_official(target, state)


def test_training_s_on_one_value_is_refused() -> None:
    module = regard.create("vars", "s", 4, grid_size=1)
    with pytest.raises(RegardError, match="larger batch"):
        module(torch.randn(1, 1, 4))
    assert module.eval()(torch.randn(1, 1, 4)).isfinite().all()


def test_half_precision_computes_in_float32() -> None:
    for options in VARIANTS:
        module, x = regard.create("vars", **options).eval(), torch.randn(2, 15, options["dim"])
        out, code = module.bfloat16()(x.bfloat16(), return_code=True)
        assert out.dtype == code.dtype == torch.bfloat16 and out.isfinite().all()
        with torch.autocast("cpu", torch.bfloat16):
            assert module.float()(x).isfinite().all()


def test_dropout_trains_and_rests() -> None:
    module, x = regard.create("vars", dim=16, num_heads=2, dropout=0.5), torch.randn(2, 9, 16)
    assert (module(x) - module(x)).abs().max() > 1e-3
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"variant": "q", "dim": 8}, "variant='q'"),
        ({}, "needs dim"),
        ({"dim": 9, "num_heads": 2}, "dim=9 is not divisible by num_heads=2"),
        ({"variant": "sd", "dim": 8, "num_heads": 2}, "variant='sd' needs grid_size"),
        ({"variant": "s", "dim": 8, "grid_size": 0}, "variant='s' needs grid_size"),
        ({"dim": 8, "num_heads": 2, "shrink": "hard"}, "shrink='hard'"),
        ({"dim": 8, "num_heads": 2, "num_steps": -1}, "num_steps=-1"),
        ({"dim": 8, "num_heads": 2, "feature_ratio": 0}, "feature_ratio=0"),
        ({"dim": 8, "num_heads": 2, "dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RegardError, match=text):
        regard.create("vars", **options)


def test_wrong_calls_are_named() -> None:
    with pytest.raises(RegardError, match=r"x has 14 tokens, but grid_size=\(3, 5\) has 15"):
        regard.create("vars", **VARIANTS[1])(torch.randn(2, 14, 16))
    with pytest.raises(RegardError, match="no random features"):
        regard.create("vars", **VARIANTS[2])(torch.randn(2, 15, 6), random_features=torch.randn(2))
