"""Plain networks over tokens: an encoder with a classifier, and a causal language model. Attention is a constructor argument."""

import math

import torch
from torch import Tensor, nn

from .slot import Slot, TokenSlot, build


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)). Without attention only the second."""

    def __init__(self, dim: int, slot: Slot, mlp_ratio: float) -> None:
        super().__init__()
        module = build(slot, dim)
        self.norm = nn.LayerNorm(dim) if module is not None else None
        self.slot = TokenSlot(module) if module is not None else None
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.slot is not None and self.norm is not None:
            x = x + self.slot(self.norm(x), key_mask)
        return x + self.mlp(x)


class TokenTrunk(nn.Module):
    """Embedding, fixed sinusoidal positions (any length), a convolution of width 4 over earlier tokens, and the blocks.

    The convolution gives every candidate, `none` too, the same view of neighbouring tokens; bytes alone mean little. It looks back only, so that
    the causal model may have it as well.

    Args:
        vocabulary: number of token ids.
        slot: the mechanism of each block.
        dim, depth, mlp_ratio: sizes of the blocks.
    """

    def __init__(self, vocabulary: int, slot: Slot, *, dim: int = 64, depth: int = 2, mlp_ratio: float = 2.0, context: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.near = nn.Conv1d(dim, dim, context)
        self.context = context
        self.blocks = nn.ModuleList(Block(dim, slot, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """tokens (B, N) -> (B, N, dim)"""
        x = self.embed(tokens)
        x = x + torch.relu(self.near(nn.functional.pad(x.mT, (self.context - 1, 0)))).mT
        x = x + positions(tokens.shape[1], x.shape[2], x.device, x.dtype)
        for block in self.blocks:
            x = block(x, key_mask)
        return self.norm(x)


def positions(length: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sinusoidal positions (length, dim): sines first, then cosines, wavelengths from 2 pi to 10 000 * 2 pi."""
    rates = torch.exp(torch.arange(0, dim, 2, device=device) * (-math.log(10_000.0) / dim))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :dim].to(dtype)


class TokenEncoder(nn.Module):
    """Tokens -> class. forward: (B, N) [, key_mask (B, N)] -> (B, classes).

    The trunk, then the mean plus the largest value over real positions, then a linear classifier. The largest value lets one telling word in a
    long window decide, which the mean alone learns only slowly.
    """

    def __init__(self, vocabulary: int, num_classes: int, slot: Slot, *, dim: int = 64, depth: int = 2, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        self.trunk = TokenTrunk(vocabulary, slot, dim=dim, depth=depth, mlp_ratio=mlp_ratio)
        self.classify = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        x = self.trunk(tokens, key_mask)
        if key_mask is None:
            return self.classify(x.mean(1) + x.amax(1))
        real = key_mask[..., None]
        mean = x.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)
        largest = x.masked_fill(~real, float("-inf")).amax(1).masked_fill(~real.any(1), 0)
        return self.classify(mean + largest)


class CausalLM(nn.Module):
    """Tokens -> scores of the next token at each position. forward: (B, N) -> (B, N, vocabulary). The slot must hold a causal mechanism."""

    def __init__(self, vocabulary: int, slot: Slot, *, dim: int = 64, depth: int = 2, mlp_ratio: float = 2.0) -> None:
        super().__init__()
        self.trunk = TokenTrunk(vocabulary, slot, dim=dim, depth=depth, mlp_ratio=mlp_ratio)
        self.predict = nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.predict(self.trunk(tokens))
