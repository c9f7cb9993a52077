"""The public API: small, typed, quick to import, and answering wrong calls."""

import subprocess
import sys

import numpy
import pytest
import torch

import regard
from regard.card import Card, Paper, evaluate
from regard.errors import RegardError, RegardTypeError, require

PAPER = Paper(title="T", authors="A B, C D", venue="V", year=2000, arxiv="0000.00000")


def test_public_names() -> None:
    assert set(regard.__all__) >= {"create", "ids", "card", "cards", "load_official", "to_official", "use_impl", "explain", "cite"}
    assert set(regard.__all__) >= {"RegardError", "Mechanism", "Card"}


def test_import_is_quick_and_takes_no_optional_package() -> None:
    code = (
        "import sys, time, torch; start = time.perf_counter(); import regard; took = time.perf_counter() - start;"
        "loaded = [m for m in ('matplotlib','sklearn','skimage','tyro','rich','triton','transformers','timm','scipy') if m in sys.modules];"
        "print(took, loaded)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    took, loaded = out.split(" ", 1)
    assert float(took) < 1.5
    assert loaded.strip() == "[]"


def test_cards_ids_and_filters() -> None:
    assert set(regard.cards()) == set(regard.ids())
    assert "multi_head" in regard.ids(layout="sequence", can=("causal", "weights"))
    assert "multi_head" not in regard.ids(can="linear")
    assert "se" in regard.ids(family="channel") and "multi_head" not in regard.ids(family="channel")
    with pytest.raises(RegardError, match="family='nowhere' is unknown"):
        regard.ids(family="nowhere")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: regard.create("multihead", 8), "did you mean 'multi_head'"),
        (lambda: regard.create("multi_head", 8, heads=2), "here: num_heads"),
        (lambda: regard.create("multi_head", 8, num_head=2), "did you mean num_heads"),
        (lambda: regard.create("multi_head"), "missing a required argument: 'dim'"),
        (lambda: regard.create("multi_head", 10, 3), "dim=10 is not divisible by num_heads=3"),
        (lambda: regard.create("multi_head", 8, 0), "num_heads=0"),
        (lambda: regard.create("multi_head", 8, 2, dropout=1.5), "dropout=1.5"),
        (lambda: regard.create("multi_head", 8, 2, rope=True, rope_dim=3), "rope_dim=3"),
        (lambda: regard.create("multi_head", 8, 2, rel_pos_bias="toeplitz"), "max_len"),
    ],
)
def test_wrong_create_is_answered(call, said: str) -> None:
    with pytest.raises(RegardError, match=said):
        call()


def test_unknown_option_is_a_type_error_too() -> None:
    with pytest.raises(TypeError):
        regard.create("multi_head", 8, nonsense=1)
    assert issubclass(RegardTypeError, RegardError) and issubclass(RegardError, ValueError)


def test_require_formats_only_on_failure() -> None:
    class Costly:
        def __format__(self, spec: str) -> str:
            raise RuntimeError

    require(True, "{}", Costly())
    with pytest.raises(RegardError, match="is 3"):
        require(False, "x is {}", 3)


def test_cite_gives_bibtex() -> None:
    text = regard.cite("multi_head")
    assert text.startswith("@inproceedings{multi_head,") and "1706.03762" in text and "Ashish Vaswani and Noam Shazeer" in text
    assert "author = {A B and C D}" in PAPER.bibtex("k")


def test_print_shows_the_call() -> None:
    assert "dim=8, num_heads=2" in repr(regard.create("multi_head", 8, 2))


def card(**changes) -> Card:
    facts = {"id": "x", "layout": "map", "paper": PAPER, "source": "", "summary": "", "when": "", "flops": "2*B*N*dim"}
    return Card(**{**facts, "grows": {"N": 1.0}, "can": frozenset({"cross"}), "example": {}, **changes})


def test_card_refuses_what_is_unknown() -> None:
    with pytest.raises(RegardError, match="layout='cube'"):
        card(layout="cube")
    with pytest.raises(RegardError, match="unknown capabilities"):
        card(can=frozenset({"fly"}))
    with pytest.raises(RegardError, match="`unless` names"):
        card(unless={"causal": "dim > 3"})


def test_card_evaluates_its_formula_and_conditions() -> None:
    class Module:
        dim, mode, causal = 5, "a", False

    assert card().cost(Module(), B=2, N=3) == 60
    assert card(unless={"cross": "mode == 'a' and not causal"}).capabilities(Module()) == frozenset()
    assert card(unless={"cross": "mode in ('b', 'c') or dim > 9"}).capabilities(Module()) == {"cross"}
    loose = card(bounds={"prefix_property": (0.2, "mode == 'b'")})
    assert loose.bound("prefix_property", 1e-5, Module()) == 1e-5, "a tolerance widens only under its condition"
    Module.mode = "b"
    assert loose.bound("prefix_property", 1e-5, Module()) == 0.2
    assert loose.bound("any_other", 1e-5, Module()) == 1e-5
    with pytest.raises(RegardError, match="'depth' is neither"):
        card(flops="depth * 2").cost(Module())
    with pytest.raises(RegardError, match="cannot evaluate"):
        evaluate("__import__('os')", lambda name: 1)


def test_use_impl_and_explain() -> None:
    module, x = regard.create("multi_head", 8, 2), torch.randn(1, 5, 8)
    assert [c.impl for c in regard.explain(module, x)] == ["fused"]
    with regard.use_impl("reference"):
        assert [str(c) for c in regard.explain(module, x)] == ["softmax_attention: reference (asked for by use_impl)"]
    with regard.use_impl(softmax_attention="reference"):
        assert regard.explain(module, x)[0].impl == "reference"
    with pytest.raises(RegardError, match="no implementation 'cuda'"), regard.use_impl(softmax_attention="cuda"):
        pass
    with pytest.raises(RegardError, match="no operation 'convolution'"), regard.use_impl(convolution="reference"):
        pass


@pytest.mark.parametrize("value", ["a", 1.5, True, None])
@pytest.mark.parametrize("id", ["multi_head", "se", "sasa", "ban", "gru_cell"])
def test_a_size_that_is_no_whole_number_is_answered(id: str, value: object) -> None:
    example = regard.card(id).example
    name = next(iter(example))
    with pytest.raises(RegardTypeError, match=f"{name}={value!r} must be a whole number"):
        regard.create(id, **{**example, name: value})


@pytest.mark.parametrize(
    ("id", "option", "said"),
    [
        ("hard_attention", {"temperature": "a"}, "temperature='a' must be a number"),
        ("lstm_cell", {"forget_bias": "a"}, "forget_bias='a' must be a number"),
        ("evoformer", {"column_attention": "no"}, "column_attention='no' must be True or False"),
        ("multi_head", {"qkv_bias": 1}, "qkv_bias=1 must be True or False"),
        ("context_transformer", {"scale": True}, "scale=True must be a number"),
    ],
)
def test_an_option_of_another_kind_is_answered(id: str, option: dict, said: str) -> None:
    with pytest.raises(RegardTypeError, match=said):
        regard.create(id, **{**regard.card(id).example, **option})


@pytest.mark.parametrize(
    ("id", "name"),
    [("sk", "kernel_sizes"), ("spp", "levels"), ("ppm", "bins"), ("adaptive_context", "scales"), ("asymmetric_non_local", "pool_sizes")],
)
@pytest.mark.parametrize("value", ["12", (1.5,), (), (0, 1)])
def test_sizes_that_are_no_sizes_are_answered(id: str, name: str, value: object) -> None:
    with pytest.raises(RegardError, match=name):
        regard.create(id, 32, **{name: value})


def test_sizes_of_numpy_and_none_where_it_means_something() -> None:
    block = regard.create("multi_head", dim=numpy.int64(16), num_heads=numpy.int32(2), head_dim=None)
    assert block(torch.zeros(1, 3, 16)).shape == (1, 3, 16)
    with pytest.raises(RegardTypeError, match="head_dim='a' must be a whole number or None"):
        regard.create("multi_head", dim=16, num_heads=2, head_dim="a")
