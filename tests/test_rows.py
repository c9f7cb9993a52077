"""Chosen rows of weights."""

import pytest
import torch

import regard
from regard import RegardError


def test_rows_are_counted_from_both_ends() -> None:
    block, x = regard.create("multi_head", dim=16, num_heads=2, causal=True, rope=True), torch.randn(2, 9, 16)
    whole = block(x, return_weights=True)[1]
    torch.testing.assert_close(regard.attend_rows(block, x, queries=[2, -1]), whole[:, :, [2, 8]])


def test_a_map_is_asked_by_pixel() -> None:
    block, x = regard.create("non_local", channels=8), torch.randn(1, 8, 5, 7)
    whole = block(x, return_weights=True)[1]
    torch.testing.assert_close(regard.attend_rows(block, x, queries=[(4, 2), (-1, -1)]), whole[:, [30, 34]])
    torch.testing.assert_close(regard.attend_rows(block, x, queries=[30]), whole[:, [30]])


@pytest.mark.parametrize(
    ("id", "options"),
    [
        ("performer", {"feature_map": kind, "causal": causal, "num_features": 12})
        for kind in ("favor+", "relu", "trig", "softmax")
        for causal in (False, True)
    ]
    + [("efficient", {"causal": True}), ("efficient", {"normalization": "scaling"}), ("efficient", {})],
)
def test_effective_weights_times_values_are_the_output(id: str, options: dict) -> None:
    torch.manual_seed(0)
    block, x = regard.create(id, dim=16, num_heads=2, **options).double().eval(), torch.randn(2, 11, 16).double()
    real = torch.arange(11) < torch.tensor([[11], [6]])
    out, weights = block(x, key_mask=real, return_weights=True)
    value, last = (block.v_proj, block.out_proj) if id == "performer" else (block.values, block.reprojection)
    v = value(x).unflatten(2, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(last((weights @ v).transpose(1, 2).flatten(2)), out)


@pytest.mark.parametrize(
    ("queries", "says"),
    [([9], "outside the 9"), ([0.5], "whole numbers"), ([[0, 1]], "list of positions"), ([True], "whole numbers")],
)
def test_wrong_queries_are_answered(queries: list, says: str) -> None:
    block, x = regard.create("multi_head", dim=16, num_heads=2), torch.randn(2, 9, 16)
    with pytest.raises(RegardError, match=says):
        regard.attend_rows(block, x, queries=queries)


def test_a_pixel_outside_the_map_is_answered() -> None:
    with pytest.raises(RegardError, match="outside a map of \\(5, 7\\)"):
        regard.attend_rows(regard.create("non_local", channels=8), torch.randn(1, 8, 5, 7), queries=[(5, 0)])


def test_a_mechanism_without_rows_is_answered() -> None:
    with pytest.raises(RegardError, match="se gives no rows"):
        regard.attend_rows(regard.create("se", channels=16), torch.randn(1, 16, 4, 4), queries=[0])


def test_an_input_that_forward_does_not_take_is_answered() -> None:
    block, x = regard.create("position", channels=16), torch.randn(1, 16, 4, 4)
    with pytest.raises(TypeError, match="takes no mask; beside x it takes nothing"):
        regard.attend_rows(block, x, queries=[0], mask=torch.ones(1, 16, dtype=torch.bool))


@pytest.mark.parametrize("id", ["efficient", "performer"])
def test_an_input_that_the_weights_do_not_take_is_answered(id: str) -> None:
    block, x = regard.create(id, dim=16, num_heads=2), torch.randn(1, 6, 16)
    with pytest.raises(RegardError, match="attn_mask"):
        regard.attend_rows(block, x, queries=[0], attn_mask=torch.ones(6, 6, dtype=torch.bool))
    assert torch.equal(regard.attend_rows(block, x, queries=[0], attn_mask=None), regard.attend_rows(block, x, queries=[0]))
