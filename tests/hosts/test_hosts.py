"""Hosts: the same weights for every candidate, masks kept, no look into the future."""

import pytest
import torch
from torch import Tensor, nn

from regard.errors import RegardError
from regard.hosts.maps import ResNet, SegmentationNet
from regard.hosts.tokens import CausalLM, TokenEncoder


class Mean(nn.Module):
    """Mean over earlier positions, after a projection whose draw moves the generator."""

    def __init__(self, width: int, extra: int = 0) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.more = nn.Linear(width, extra) if extra else None

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Masked(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        scores = self.score(x)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[..., None], float("-inf"))
        return (scores.softmax(1) * x).sum(1, keepdim=True).expand_as(x)


class Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate(x.mean((-2, -1))).sigmoid()[..., None, None]
        return x * gate, gate


def outside(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if ".slot." not in k and k.split(".")[-2:-1] != ["norm"]}


@pytest.mark.parametrize(
    ("make", "slots"),
    [
        (lambda slot: TokenEncoder(17, 5, slot, dim=16), [None, Mean, lambda w: Mean(w, extra=9), Masked]),
        (lambda slot: CausalLM(17, slot, dim=16), [None, Mean, lambda w: Mean(w, extra=9)]),
        (lambda slot: ResNet(1, 5, slot, widths=(8, 16)), [None, Scale]),
        (lambda slot: SegmentationNet(3, 4, slot, width=8), [None, Scale]),
    ],
    ids=["encoder", "lm", "resnet", "segmentation"],
)
def test_weights_outside_the_slot_do_not_depend_on_what_sits_in_it(make, slots) -> None:
    found = []
    for slot in slots:
        torch.manual_seed(3)
        found.append(outside(make(slot)))
    for other in found[1:]:
        for name in set(other) & set(found[0]):
            assert torch.equal(found[0][name], other[name]), name
    assert len(found[0]) >= 8


def test_blocks_get_different_slot_weights_and_seeds_repeat() -> None:
    torch.manual_seed(0)
    one = TokenEncoder(17, 5, Mean, dim=16)
    torch.manual_seed(0)
    two = TokenEncoder(17, 5, Mean, dim=16)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    slots = [m.project.weight for m in one.modules() if isinstance(m, Mean)]
    assert len(slots) == 2 and not torch.equal(*slots)


def test_padding_does_not_change_the_class() -> None:
    torch.manual_seed(0)
    model = TokenEncoder(17, 5, Masked, dim=16).eval()
    tokens = torch.randint(17, (3, 10))
    mask = torch.ones(3, 10, dtype=torch.bool)
    padded = torch.cat((tokens, torch.randint(17, (3, 6))), 1)
    long = torch.cat((mask, torch.zeros(3, 6, dtype=torch.bool)), 1)
    assert torch.allclose(model(tokens, mask), model(padded, long), atol=1e-6)
    assert model(tokens, torch.zeros_like(mask)).isfinite().all()


def test_language_model_sees_nothing_of_the_future() -> None:
    torch.manual_seed(0)
    model = CausalLM(50, Mean, dim=16).eval()
    tokens = torch.randint(50, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = torch.randint(50, (2, 8))
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_ready_modules_and_tuples_are_taken() -> None:
    ready = Scale(8)
    model = ResNet(1, 3, ready, widths=(8,))
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert not any(m is ready for m in model.modules())
    assert SegmentationNet(3, 4, None, width=8)(torch.rand(2, 3, 15, 18)).shape == (2, 4, 15, 18)


def test_a_changed_shape_is_said() -> None:
    class Half(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x[:, ::2]

    with pytest.raises(RegardError, match="Half turns"):
        TokenEncoder(17, 5, Half, dim=16)(torch.randint(17, (2, 8)))
