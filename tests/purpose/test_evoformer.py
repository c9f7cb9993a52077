"""What the Evoformer is for: pairs that must agree around triangles, frames that any rigid motion leaves as they are, memory of the pairs alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from regard.testing.subject import shuffle_
from regard.workbench.measure import peak_bytes

S, N, WIDTH = 64, 24, 16


def alignments(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two-letter alignments (B, S, N, 2) in which partners of a random pairing of the columns tend to agree, and the pairing (B, N, N)."""
    msa, contacts = torch.empty(batch, S, N, 2), torch.zeros(batch, N, N)
    for i in range(batch):
        order = torch.randperm(N, generator=generator)
        one, two = order[: N // 2], order[N // 2 :]
        letters = torch.rand(S, N, generator=generator) < 0.5
        copied = torch.rand(S, N // 2, generator=generator) < 0.3
        letters[:, two] = torch.where(copied, letters[:, one], letters[:, two])
        msa[i] = F.one_hot(letters.long(), 2).float()
        contacts[i, one, two] = contacts[i, two, one] = 1
    return msa, contacts


class Contacts(nn.Module):
    """Outer product mean, then triangle multiplications or as many transitions, then a score for each pair."""

    def __init__(self, triangles: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(2, WIDTH)
        self.outer = regard.create("evoformer", part="outer_product_mean", msa_dim=WIDTH, pair_dim=WIDTH, hidden_dim=8)
        part: dict[str, Any] = {"part": "triangle_multiplication", "hidden_dim": WIDTH} if triangles else {"part": "pair_transition", "factor": 4}
        self.updates = nn.ModuleList([regard.create("evoformer", pair_dim=WIDTH, **part) for _ in range(2)])
        self.transitions = nn.ModuleList([regard.create("evoformer", part="pair_transition", pair_dim=WIDTH, factor=2) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, msa: Tensor) -> Tensor:
        pair = 10 * self.outer(self.embed(msa))
        for update, transition in zip(self.updates, self.transitions, strict=True):
            pair = pair + update(pair)
            pair = pair + transition(pair)
        scores = self.head(pair).squeeze(-1)
        return (scores + scores.mT) / 2


def precision_at_n(triangles: bool, seed: int, steps: int = 300) -> float:
    """The share of true contacts among the N best-scored entries of the map (N entries are true)."""
    torch.manual_seed(seed)
    net, generator = Contacts(triangles), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    off = ~torch.eye(N, dtype=torch.bool)
    for _ in range(steps):
        msa, contacts = alignments(16, generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(net(msa)[:, off], contacts[:, off], pos_weight=torch.tensor(5.0)).backward()
        optimizer.step()
        schedule.step()
    msa, contacts = alignments(200, torch.Generator().manual_seed(1000))
    with torch.no_grad():
        scores = net(msa).masked_fill(~off, -1e9).flatten(1)
    best = scores.topk(N, 1).indices
    return contacts.flatten(1).gather(1, best).mean().item()


@pytest.mark.slow
def test_triangles_find_contacts() -> None:
    """Precision at N on unseen pairings: 0.78 with triangle multiplication, 0.63 with transitions in its place (one seed, 70 s on a busy core)."""
    plain, triangles = (precision_at_n(kind, seed=0) for kind in (False, True))
    assert triangles > plain + 0.05


@pytest.mark.slow
def test_ipa_is_invariant() -> None:
    """A rotation and translation of all frames moves the output by 2e-6 of its largest entry in float32."""
    torch.manual_seed(0)
    module = regard.create("evoformer", part="ipa", single_dim=64, pair_dim=32)
    shuffle_(module)
    single, pair = torch.randn(2, 40, 64), torch.randn(2, 40, 40, 32)
    rotations, translations = (torch.linalg.qr(torch.randn(2, 40, 3, 3))[0], 5 * torch.randn(2, 40, 3))
    turn, shift = torch.linalg.qr(torch.randn(3, 3))[0], 20 * torch.randn(3)
    with torch.no_grad():
        before = module(single, pair, rotations, translations)
        after = module(single, pair, turn @ rotations, translations @ turn.mT + shift)
        moved = module(single, pair, rotations, translations @ turn.mT)
    error = ((after - before).abs().max() / before.abs().max()).item()
    assert error < 1e-4
    assert (moved - before).abs().max() > 1e-2 * before.abs().max(), "points that move against the frames must count"


@pytest.mark.slow
def test_a_fresh_block_is_the_identity() -> None:
    block = regard.create("evoformer", msa_dim=32, pair_dim=16)
    msa, pair = torch.randn(2, 6, 20, 32), torch.randn(2, 20, 20, 16)
    assert all(torch.equal(*both) for both in zip(block(msa, pair), (msa, pair), strict=True))


@pytest.mark.slow
def test_triangle_attention_needs_memory_for_the_pairs_alone() -> None:
    """Peak bytes of a forward pass per pair: 569, 341 and 305 for 128, 256 and 512 residues; logits stored at once would be 2 kB to 8 kB."""
    module, found = regard.create("evoformer", part="triangle_attention", pair_dim=32, head_dim=8, num_heads=4), {}
    for n in (128, 256, 512):
        pair = torch.randn(1, n, n, 32)
        with torch.no_grad():
            found[n] = peak_bytes(lambda pair=pair: module(pair), pair.device) / n**2
    assert found[512] < 1.5 * found[128]
