"""Authors' names: loaded whole or not at all, written back, faults named."""

import pytest
import torch
from torch import nn

import regard
from regard.errors import RegardError
from regard.official import KeyMap, Rule, fused, pointwise, rename, to_official, translate


def test_multi_head_attention_of_torch_loads_and_agrees() -> None:
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    ours = regard.load_official(regard.create("multi_head", 24, 3).eval(), theirs.state_dict())
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x, context), theirs(x, context, context, need_weights=False)[0])


def test_multi_head_attention_with_kdim_loads_and_agrees() -> None:
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, kdim=10, vdim=10).eval()
    ours = regard.load_official(regard.create("multi_head", 24, 3, context_dim=10).eval(), theirs.state_dict())
    x, context = torch.randn(2, 5, 24), torch.randn(2, 7, 10)
    torch.testing.assert_close(ours(x, context), theirs(x, context, context, need_weights=False)[0])
    assert set(regard.to_official(ours)) == set(theirs.state_dict())


def test_faults_are_named_and_nothing_is_loaded() -> None:
    module = regard.create("multi_head", 8, 2)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    state = regard.to_official(regard.create("multi_head", 8, 2))
    del state["out_proj.bias"]
    state["bias_k"] = torch.zeros(1, 1, 8)
    state["out_proj.weight"] = torch.zeros(8, 9)
    with pytest.raises(RegardError, match=r"unknown bias_k; missing out_proj.bias; misshapen out_proj.weight \(8, 9\), needs \(8, 8\)"):
        regard.load_official(module, state)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_a_checkpoint_around_the_state_is_answered() -> None:
    with pytest.raises(RegardError, match="not tensors"):
        regard.load_official(regard.create("multi_head", 8, 2), {"state_dict": {}, "epoch": 3})  # type: ignore[dict-item]


def test_unknown_naming_is_answered() -> None:
    with pytest.raises(RegardError, match="naming='fairseq' is unknown"):
        to_official(regard.create("multi_head", 8, 2), "fairseq")


class Layer(nn.Module):
    dims = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 2)


def test_rules_invert_each_other() -> None:
    module = Layer()
    for keymap in (
        KeyMap("conv", (pointwise("conv.*", "a.*"),)),
        KeyMap("renamed", (rename("first.*", "a.*"), rename("second.*", "b.*"))),
        KeyMap("fused", (fused("ab.weight", ("a.weight", "b.weight")), fused("ab.bias", ("a.bias", "b.bias")))),
        KeyMap("flipped", (Rule(("x",), ("a.weight",), lambda t, m: [t[0].T], lambda t, m: [t[0].T]),)),
    ):
        module.key_maps = lambda keymap=keymap: (keymap,)  # type: ignore[assignment]
        written = to_official(module, keymap.name)
        reading = translate(module, written, keymap)
        assert reading.faults == 0
        assert all(torch.equal(t, module.state_dict()[name]) for name, t in reading.tensors.items())
    module.key_maps = lambda: (KeyMap("conv", (pointwise("conv.*", "a.*"),)),)  # type: ignore[assignment]
    assert to_official(module)["conv.weight"].shape == (6, 4, 1, 1, 1)
