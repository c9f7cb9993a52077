r"""L0 head gates: a number in [0, 1] for each head multiplies what the head gives, and a penalty closes those that are not needed.

    training: s = sigmoid((log u' - log(1 - u') + log_a) / T),  u' = eps + (1 - 2 eps) u,  u uniform     evaluation: s = sigmoid(log_a)
    z = clip(s (high - low) + low, 0, 1),   out = x z                                                    hard: 1[z > 0.5], with the gradient of z
    p = P(z > 0) = sigmoid(log_a - T log(-low / high)),   penalty = l0 sum_h p + l2 mean_h(p) |x|^2 / 2

Voita, Talbot, Moiseev, Sennrich, Titov, "Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, the Rest Can Be Pruned",
ACL 2019. arXiv:1905.09418. The stretched concrete distribution is that of Louizos, Welling, Kingma, arXiv:1712.01312; as in the authors' code the
gate of evaluation is not divided by T. Cheaper than multiplying x: `fold_into` the output projection. B batch, H heads, N positions, d head width.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, rename
from ...ops._precision import at_least_float32
from ...validate import check_floating, check_option

OPEN = 2.5  # above 2.398 a gate of evaluation is exactly 1 with the usual stretch


class HeadGate(Mechanism):
    """Args:
    num_heads: one gate for each.
    temperature: T; smaller draws are nearer to 0 and 1.
    stretch: (low, high) with low < 0 and high > 1; what lies beyond [0, 1] is clipped.
    l0_penalty, l2_penalty: weights of the expected number of open gates, and of what they let through, in `penalty`.
    eps: keeps draws and probabilities off 0 and 1.
    hard: gates are 0 or 1, their gradients those of the soft gates.
    local_rep: in training a draw for every element of x, not one for each head.
    init: "official" draws log_a from U(-sqrt(3 / num_heads), sqrt(3 / num_heads)); "open" starts with all heads on.
    """

    card: ClassVar = Card(
        id="head_gate",
        layout="structure",
        paper=Paper(
            title="Analyzing Multi-Head Self-Attention: Specialized Heads Do the Heavy Lifting, the Rest Can Be Pruned",
            authors="Elena Voita, David Talbot, Fedor Moiseev, Rico Sennrich, Ivan Titov",
            venue="ACL",
            year=2019,
            arxiv="1905.09418",
        ),
        source="lena-voita/the-story-of-heads@efaa0dd5 (no licence)",
        summary="One learned gate for each head, driven to exactly 0 by a penalty where the head is not needed.",
        when="Find which heads of an attention layer are needed, then leave the others out.",
        flops="0",
        grows={},
        can=frozenset({"elementwise"}),
        checked_against="authors",
        uncertain="Their TensorFlow 1 code was evaluated literally, not run.",
        example={"num_heads": 24},
        variants=({"num_heads": 6, "local_rep": True, "init": "open"}, {"num_heads": 24, "temperature": 0.5, "stretch": (-0.2, 1.3)}),
        returns=("out", "gates", "penalty", "p_open"),
    )
    tested_as: ClassVar = "map"  # heads stand where a map has channels
    official: ClassVar = (KeyMap("lena-voita/the-story-of-heads", (rename("gate/log_a", "log_a"),)),)

    def __init__(
        self,
        num_heads: int,
        temperature: float = 0.33,
        stretch: tuple[float, float] = (-0.1, 1.1),
        l0_penalty: float = 1.0,
        l2_penalty: float = 0.0,
        eps: float = 1e-6,
        hard: bool = False,
        local_rep: bool = False,
        init: Literal["official", "open"] = "official",
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        require(num_heads > 0, "num_heads={} must be at least 1", num_heads)
        require(temperature > 0, "temperature={} must be greater than 0", temperature)
        require(len(stretch) == 2 and stretch[0] < 0 and stretch[1] > 1, "stretch={} must be (low, high) with low < 0 and high > 1", stretch)
        require(0 <= eps < 0.5, "eps={} must be in [0, 0.5)", eps)
        check_option(init, ("official", "open"), "init")
        self.num_heads, self.temperature, self.stretch, self.eps = num_heads, temperature, tuple(stretch), eps
        self.l0_penalty, self.l2_penalty, self.hard, self.local_rep, self.init = l0_penalty, l2_penalty, hard, local_rep, init
        self.log_a = nn.Parameter(torch.empty(1, num_heads, 1, 1, device=device, dtype=dtype))
        if init == "open":
            nn.init.constant_(self.log_a, OPEN)
        else:
            nn.init.uniform_(self.log_a, -((3 / num_heads) ** 0.5), (3 / num_heads) ** 0.5)

    def forward(
        self,
        x: Float[Tensor, "b h n d"],
        *,
        noise: Float[Tensor, "..."] | None = None,
        return_gates: bool = False,
        return_penalty: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Each head times its gate, (B, H, N, d); then the gates, then `penalty(x)` and `p_open()`, if asked for.

        `noise`: the uniform draws u, (1, H, 1, 1) or the shape of x (local_rep); drawn if None, not used in evaluation.
        """
        check_floating(x)
        require(x.ndim == 4, "x must be (batch, {} heads, positions, width), got {} axes: {}", self.num_heads, x.ndim, tuple(x.shape))
        require(x.shape[1] == self.num_heads, "x has {} heads but this module was made with num_heads={}", x.shape[1], self.num_heads)
        if self.local_rep and self.training:
            noise = torch.rand_like(x, dtype=self._log_a().dtype) if noise is None else noise
            require(noise.shape == x.shape, "noise {} must have the shape of x {}", tuple(noise.shape), tuple(x.shape))
        gates = self.gates(noise)
        out = x * gates.to(x.dtype)
        found = ((gates,) if return_gates else ()) + ((self.penalty(x), self.p_open()) if return_penalty else ())
        return (out, *found) if found else out

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Heads of random values."""
        return {"x": torch.randn(batch, options["num_heads"], *size, generator=generator)}

    def gates(self, noise: Tensor | None = None) -> Tensor:
        """z, float32 at least: in training of the draws `noise`, of new ones for each head if None; in evaluation (1, H, 1, 1)."""
        if not self.training:
            return self._evaluated()
        require(noise is not None or not self.local_rep, "local_rep=True draws for every element: give noise={} of the shape of x", noise)
        log_a = self._log_a()
        noise = torch.rand_like(log_a) if noise is None else self._checked(noise).to(log_a.dtype)
        draws = self.eps + (1 - 2 * self.eps) * noise
        return self._stretched(torch.sigmoid((draws.log() - (-draws).log1p() + log_a) / self.temperature))

    def p_open(self) -> Tensor:
        """The probability that a gate of training is not 0, (1, H, 1, 1)."""
        low, high = self.stretch
        return torch.sigmoid(self._log_a() - self.temperature * math.log(-low / high)).clamp(self.eps, 1 - self.eps)

    def penalty(self, values: Tensor | None = None) -> Tensor:
        """What to add to the loss, a scalar. `values`: x before its gates, needed with l2_penalty or local_rep, which counts elements, not heads."""
        p = self.p_open()
        require(values is not None or not (self.l2_penalty or self.local_rep), "penalty needs values=x with l2_penalty={}", self.l2_penalty)
        if values is None:
            return self.l0_penalty * p.sum()
        p = p.expand(values.shape) if self.local_rep else p
        return self.l0_penalty * p.sum() + (0.5 * self.l2_penalty * p.mean() * values.to(p.dtype).square().sum() if self.l2_penalty else 0.0)

    def open_heads(self) -> Bool[Tensor, "..."]:
        """Which heads evaluation does not multiply by exactly 0, (H,)."""
        return self._evaluated().detach().flatten() != 0

    def sparsity_rate(self) -> Tensor:
        """The share of open heads, as the authors call it."""
        return self.open_heads().float().mean()

    @torch.no_grad()
    def fold_into(self, linear: nn.Linear) -> nn.Linear:
        """A copy of the output projection that has the gates of evaluation in it: on ungated heads, merged, it gives what `linear` gives on gated."""
        require(linear.in_features % self.num_heads == 0, "linear reads {} channels, not num_heads={} heads", linear.in_features, self.num_heads)
        folded = copy.deepcopy(linear)
        folded.weight.mul_(self._evaluated().flatten().repeat_interleave(linear.in_features // self.num_heads))
        return folded

    def _log_a(self) -> Tensor:
        return self.log_a.to(at_least_float32(self.log_a))

    def _evaluated(self) -> Tensor:
        return self._stretched(torch.sigmoid(self._log_a()))

    def _stretched(self, s: Tensor) -> Tensor:
        low, high = self.stretch
        z = (s * (high - low) + low).clamp(0.0, 1.0)
        return z + ((z > 0.5).to(z.dtype) - z).detach() if self.hard else z

    def _checked(self, noise: Tensor) -> Tensor:
        check_floating(noise, "noise")
        heads = (1, self.num_heads, 1, 1)
        fits = noise.ndim == 4 and noise.shape[1] == self.num_heads if self.local_rep else noise.shape == heads
        require(fits, "noise {} must have shape {}", tuple(noise.shape), "of x" if self.local_rep else heads)
        if not (torch.compiler.is_compiling() or noise.is_meta or torch._C._are_functorch_transforms_active()):
            require(bool(((noise > 0) & (noise < 1)).all()), "noise must lie in (0, 1), got values from {} to {}", noise.min(), noise.max())
        return noise
