"""What only `sparse` has: fixed strides through the conformance suite, head modes, strides that follow the length, what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import regard
from regard import registry
from regard.errors import RegardError, RegardTypeError
from regard.ops._dispatch import use_impl
from regard.ops.softmax_attention.patterns import sparse_pattern
from regard.testing import CHECKS, Subject, run
from regard.testing.goldens import read

GOLDENS = sorted((Path(__file__).parents[1] / "goldens" / "sparse").glob("*.safetensors"))
# The suite's own subjects have stride=None, for which the pattern of a prefix or of a padded batch is another one: here strides are given.
FIXED: list[dict[str, Any]] = [
    {"dim": 16, "num_heads": 4, "stride": 5},
    {"dim": 16, "num_heads": 4, "pattern": "fixed", "stride": 6, "summary": 2, "num_stripes": 2},
    {"dim": 18, "num_heads": 3, "pattern": "fixed", "stride": 4, "head_mode": "split", "causal": False},
    {"dim": 18, "num_heads": 3, "pattern": "local", "stride": 3},
]
NAMES = [
    name
    for name, check in CHECKS.items()
    if check.needs & {"causal", "key_mask", "weights", "attn_mask"} or "mask" in name or name == "cost_formula_is_what_is_counted"
]


def subject(options: dict[str, Any]) -> Subject:
    card, kind = registry.card("sparse"), registry.get("sparse")
    card = replace(card, bounds={}, example=options)
    return Subject(f"sparse {options}", kind, options, "sequence", card.capabilities(kind(**options)), card)


@pytest.mark.parametrize(("options", "check"), [(o, n) for o in FIXED for n in NAMES if CHECKS[n].applies(subject(o))])
def test_given_strides_pass_the_suite(options: dict[str, Any], check: str) -> None:
    (outcome,) = run(subject(options), [check])
    assert outcome.status != "fail", outcome.message


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_pattern_equals_the_official_layout(path: Path) -> None:
    golden = read(path)
    options = {k: v for k, v in golden.kwargs.items() if k not in ("dim", "qkv_bias")}
    mask = load_file(path)["mask"]
    assert torch.equal(sparse_pattern(mask.shape[-1], **options), mask)


def test_goldens_are_there() -> None:
    assert len(GOLDENS) == 4


@pytest.mark.parametrize("impl", ["reference", "dense", "blocks"])
def test_every_form_gives_the_weights_applied(impl: str) -> None:
    """Weights come from the dense definition; the output is those weights on the values, padded, prefixed and split between heads alike."""
    for options in FIXED:
        module = regard.create("sparse", **options).double()
        x = torch.randn(2, 23, options["dim"], dtype=torch.double)
        key_mask = torch.rand(2, 23) < 0.7
        with use_impl(sparse_attention=impl):
            out, weights = module(x, key_mask=key_mask, return_weights=True)
        v = module.v_proj(x).unflatten(2, (module.num_heads, -1)).transpose(1, 2)
        torch.testing.assert_close(out, module.out_proj((weights @ v).transpose(1, 2).flatten(2)))
        assert weights[~key_mask[:, None, None].expand_as(weights)].abs().max() == 0


def test_free_stride_is_the_root_of_the_length() -> None:
    free, given = regard.create("sparse", 8, 2), regard.create("sparse", 8, 2, stride=6)
    given.load_state_dict(free.state_dict())
    x = torch.randn(1, 36, 8)
    for n in (36, 31, 26):
        torch.testing.assert_close(free(x[:, :n]), given(x[:, :n]))
    assert (free(x[:, :25]) - given(x[:, :25])).abs().max() > 1e-4
    wide = regard.create("sparse", 8, 4, pattern="fixed", summary=3, num_stripes=4)
    assert wide(x[:, :5]).isfinite().all()  # ceil(sqrt(5)) columns cannot hold 4 stripes of 3: the stride is 12


def test_long_sequences_equal_the_dense_mask_with_padding_and_gradients() -> None:
    for options in ({"stride": 16}, {"pattern": "fixed", "summary": 2, "num_stripes": 2}, {"head_mode": "split", "causal": False}):
        module = regard.create("sparse", 16, 4, **options)
        key_mask = torch.arange(530)[None] < torch.tensor([[530], [300]])
        found = []
        for impl in ("blocks", "reference"):
            x = torch.randn(2, 530, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
            with use_impl(sparse_attention=impl):
                out = module(x, key_mask=key_mask)
            found.append([out, *torch.autograd.grad(out.square().sum(), (x, *module.parameters()))])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_trains_and_rests() -> None:
    module = regard.create("sparse", 8, 2, stride=4, dropout=0.5)
    x = torch.randn(1, 300, 8)
    assert (module(x) - module(x)).abs().max() > 1e-3
    module.eval()
    assert torch.equal(module(x), module(x))


def test_work_grows_as_the_power_three_halves_under_a_free_stride_and_not_under_a_given_one() -> None:
    def flops(module: torch.nn.Module, n: int) -> int:
        with FlopCounterMode(display=False) as counter:
            module(torch.empty(1, n, 16, device="meta"))
        return counter.get_total_flops()

    free, given, near = (regard.create("sparse", 16, 4, device="meta", **o) for o in ({}, {"stride": 8}, {"pattern": "local", "stride": 8}))
    ratios = [flops(m, 2**15) / flops(m, 2**14) for m in (free, given, near)]
    assert 2.6 < ratios[0] < 2.9 and 3.8 < ratios[1] <= 4 and 1.95 < ratios[2] < 2.05


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 3}, "dim=8 is not divisible by num_heads=3"),
        ({"num_heads": 2, "num_stripes": 4}, "num_heads=2 is not divisible by num_stripes=4"),
        ({"pattern": "star"}, "pattern='star'"),
        ({"stride": 0}, "stride=0"),
        ({"num_heads": 2, "pattern": "fixed", "stride": 3, "summary": 2, "num_stripes": 2}, "at most stride=3"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RegardError, match=text):
        regard.create("sparse", 8, **options)


def test_wrong_calls_are_named() -> None:
    module, x = regard.create("sparse", 8, 2), torch.randn(2, 5, 8)
    with pytest.raises(RegardError, match="takes no context"):
        module(x, x)
    with pytest.raises(RegardError, match="attn_mask must broadcast"):
        module(x, attn_mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(RegardTypeError, match="key_mask must be boolean"):
        module(x, key_mask=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(RegardTypeError, match="did you mean"):
        regard.create("sparse", 8, 2, strides=3)
