r"""Bilinear attention: a joint distribution over all pairs of an object and a word, by a bilinear form of low rank.

    logits_g[i,j] = sum_c h[g,c] v_[i,c] q_[j,c] + b_g,   att_g = softmax over all pairs (i,j) together,   v_ = FC(V), q_ = FC(Q)
    joint_g[c] = sum_ij att_g[i,j] v'_g[i,c] q'_g[j,c],   q^g = q^{g-1} + Linear_g(joint_g) (for every word) [+ FC_g(count)],   q^0 = Q

FC(x) = ReLU(Linear(x)). Kim, Jun, Zhang, "Bilinear Attention Networks", NeurIPS 2018. arXiv:1805.07932. Every linear map and h are weight-normalised
with a scalar gain. As in the authors' code the maps come once, from the original Q. Ours: masks of words, and zeros where all objects are masked.
B batch, n objects, m words, K = rank_mult * q_dim, G glimpses. No tensor has the axes (n, m, K): the largest are (G min(n, m), K).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...card import Card, Paper
from ...errors import require
from ...mechanism import Mechanism
from ...official import KeyMap, Rule
from ...ops._precision import at_least_float32
from ...parts.counting import FUNCTIONS, Counter
from ...parts.masks import zero_rows
from ...parts.weight_norm import WeightNormLinear, weight_norm_rules
from ...validate import check_floating, check_mask, check_tokens


class BilinearAttention(Mechanism):
    """Args:
    v_dim: width of the objects.
    q_dim: width of the words, and of the output.
    glimpses: number of joint distributions G.
    rank_mult: the rank of the bilinear form is rank_mult * q_dim.
    dropout: before every linear layer of objects and words, and on v_ (and in the classifier).
    counter: count this many boxes (the authors: 10) from each glimpse and add that to the words; 0 for none.
    num_classes: classify the sum of the words; None returns the words.

    Checkpoints with more than 32 glimpses name h `h_net`; they load as well.
    """

    card: ClassVar = Card(
        id="ban",
        layout="pair",
        paper=Paper(
            title="Bilinear Attention Networks", authors="Jin-Hwa Kim, Jaehyun Jun, Byoung-Tak Zhang", venue="NeurIPS", year=2018, arxiv="1805.07932"
        ),
        source="jnhwkim/ban-vqa@ef4cc36d (MIT)",
        summary="Several joint distributions over all pairs of two sets, each summed to one vector of products that updates the second set.",
        when="Two sets to be compared pair by pair: regions and words, proteins and drugs.",
        flops="2*B*(N*v_dim + M*q_dim + glimpses*N*M)*rank_mult*q_dim"
        " + glimpses*2*B*(N*v_dim + M*q_dim + N*M + q_dim + (counter + 1 if counter else 0))*q_dim"
        " + (4*B*q_dim*(q_dim + num_classes) if num_classes is not None else 0)",
        grows={"N": 2.0},
        can=frozenset({"weights"}),
        example={"v_dim": 10, "q_dim": 8},
        variants=(
            {"v_dim": 6, "q_dim": 8, "glimpses": 3, "rank_mult": 1, "num_classes": 5},
            {"v_dim": 8, "q_dim": 8, "counter": 4, "dropout": (0.0, 0.0)},
        ),
    )
    functions: ClassVar = {"pooled": lambda module, **inputs: module(**inputs).sum(1)}

    def __init__(
        self,
        v_dim: int,
        q_dim: int,
        glimpses: int = 2,
        rank_mult: int = 3,
        dropout: tuple[float, float] = (0.2, 0.5),
        counter: int = 0,
        num_classes: int | None = None,
        *,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        for name, value in (("v_dim", v_dim), ("q_dim", q_dim), ("glimpses", glimpses), ("rank_mult", rank_mult), ("num_classes", num_classes)):
            require(value is None or value > 0, "{}={} must be at least 1", name, value)
        require(counter >= 0, "counter={} must be the number of boxes to count, or 0 for no counter", counter)
        fits = isinstance(dropout, tuple | list) and len(dropout) == 2 and all(0 <= p < 1 for p in dropout)
        require(fits, "dropout={!r} must be two probabilities in [0, 1): before linear layers, and on the attention's objects", dropout)
        self.v_dim, self.q_dim, self.glimpses, self.rank_mult, self.dropout = v_dim, q_dim, glimpses, rank_mult, tuple(dropout)
        self.counter, self.num_classes = counter, num_classes
        self.returns = ("out" if num_classes is None else "logits", "weights")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def layers(width: int) -> nn.ModuleList:
            return nn.ModuleList(WeightNormLinear(width, q_dim, **dd) for _ in range(glimpses))

        rank = rank_mult * q_dim
        self.att_v, self.att_q, self.att_h = (WeightNormLinear(*shape, **dd) for shape in ((v_dim, rank), (q_dim, rank), (rank, glimpses)))
        for parameter in (self.att_h.weight_v, self.att_h.bias):
            nn.init.normal_(parameter)
        with torch.no_grad():
            self.att_h.weight_g.copy_(torch.linalg.vector_norm(self.att_h.weight_v))
        self.joint_v, self.joint_q, self.update = layers(v_dim), layers(q_dim), layers(q_dim)
        if counter:
            self.count, self.count_update = Counter(counter, **dd), layers(counter + 1)
        if num_classes is not None:
            self.classifier = nn.ModuleList((WeightNormLinear(q_dim, 2 * q_dim, **dd), WeightNormLinear(2 * q_dim, num_classes, **dd)))

    @staticmethod
    def example_inputs(options: Mapping[str, Any], *, batch: int, size: Any, generator: torch.Generator) -> dict[str, Tensor]:
        n = size if isinstance(size, int) else torch.Size(size).numel()
        n = max(n, options.get("counter", 0))
        inputs = {"v": torch.randn(batch, n, options["v_dim"], generator=generator)}
        inputs["q"] = torch.randn(batch, max(1, n - 2), options["q_dim"], generator=generator)
        if options.get("counter"):
            low, sides = torch.rand(2, batch, n, 2, generator=generator)
            inputs["boxes"] = torch.cat((low, low + sides), -1)
        return inputs

    def key_maps(self) -> tuple[KeyMap, ...]:
        names = {"v_att.logits.v_net.main.1": "att_v", "v_att.logits.q_net.main.1": "att_q"}
        for g in range(self.glimpses):
            names |= {f"b_net.{g}.v_net.main.1": f"joint_v.{g}", f"b_net.{g}.q_net.main.1": f"joint_q.{g}", f"q_prj.{g}.main.1": f"update.{g}"}
            names |= {f"c_prj.{g}.main.0": f"count_update.{g}"}
        names |= {"classifier.main.0": "classifier.0", "classifier.main.3": "classifier.1"}

        def broadcast(t: Tensor) -> Tensor:
            """h (G, K) as (1, G, 1, K), its bias (G) as (1, G, 1, 1)."""
            return t.unflatten(0, (1, -1, 1)) if t.ndim > 1 else t[None, :, None, None]

        h = {
            "h_mat": weight_norm_rules("v_att.logits", "att_h", "h_mat", "h_bias", broadcast),
            "h_net": weight_norm_rules("v_att.logits.h_net", "att_h"),
        }
        slopes = tuple(f"counter.f.{i}.weight" for i in range(FUNCTIONS))
        count = Rule(slopes, ("count.weight",), lambda t, _: [torch.stack(t)], lambda t, _: list(t[0].unbind()))
        return tuple(
            KeyMap(
                f"ban-vqa ({form}, {style})",
                (*(rule for theirs, ours in names.items() for rule in weight_norm_rules(theirs, ours)[style]), *h[form][style], count),
                ignore=(r"w_emb\..*", r"q_emb\..*"),
            )
            for form in h
            for style in h[form]
        )

    def forward(
        self,
        v: Float[Tensor, "b n v_dim"],
        q: Float[Tensor, "b m q_dim"],
        *,
        boxes: Float[Tensor, "b n 4"] | None = None,
        v_mask: Bool[Tensor, "b n"] | None = None,
        q_mask: Bool[Tensor, "b m"] | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Words (B, m, q_dim), or logits (B, num_classes); or that and the weights (B, G, n, m).

        Args:
            v, q: objects and words.
            boxes: x1, y1, x2, y2 of each object, for the counter.
            v_mask, q_mask: True for a real one. As in the authors' code, without v_mask an object of zeros is none, and without q_mask every word is
                real. Words masked by q_mask come out as zeros, so that out.sum(1) is the sum of the real ones.
        """
        self._check(v, q, boxes, v_mask, q_mask)
        real = torch.linalg.vector_norm(v.detach(), torch.inf, -1) > 0 if v_mask is None else v_mask
        v, q = zero_rows(v, v_mask), zero_rows(q, q_mask)
        logits, mask = self._logits(v, q), real[:, None, None]
        mask = mask if q_mask is None else mask & q_mask[:, None, :, None]
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)  # finite, so that a sample without objects has no NaN
        weights = logits.flatten(2).softmax(-1).view(logits.shape).masked_fill(~mask, 0.0).to(q.dtype)
        steps = self._counts(boxes, logits) if self.counter and boxes is not None else None
        for g in range(self.glimpses):
            products = torch.bmm(weights[:, g], self._embed(self.joint_v[g], v)) * self._embed(self.joint_q[g], q)
            q = q + self.update[g](self._drop(products.sum(1)))[:, None]
            q = q if steps is None else q + F.relu(self.count_update[g](steps[:, g].to(q.dtype)))[:, None]
        out = zero_rows(q, q_mask)
        if self.num_classes is not None:
            out = self.classifier[1](F.dropout(F.relu(self.classifier[0](out.sum(1))), self.dropout[1], self.training))
        return (out, weights.mT) if return_weights else out

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout[0], self.training)

    def _embed(self, layer: nn.Module, x: Tensor) -> Tensor:
        """FC."""
        return F.relu(layer(self._drop(x)))

    def _logits(self, v: Tensor, q: Tensor) -> Tensor:
        """(B, G, m, n), in float32 at least: the smaller set is scaled by h, then one product with the other."""
        v, q = F.dropout(self._embed(self.att_v, v), self.dropout[1], self.training), self._embed(self.att_q, q)
        h = self.att_h.weight().to(q.dtype)[:, None]
        if q.shape[1] <= v.shape[1]:
            scores = torch.bmm((q[:, None] * h).flatten(1, 2), v.mT).unflatten(1, (self.glimpses, -1))
        else:
            scores = torch.bmm((v[:, None] * h).flatten(1, 2), q.mT).unflatten(1, (self.glimpses, -1)).mT
        return scores.to(at_least_float32(scores)) + self.att_h.bias[:, None, None]

    def _counts(self, boxes: Tensor, logits: Tensor) -> Tensor:
        """(B, G, counter + 1): an object is attended as its best word."""
        return self.count(boxes, logits.max(2).values)

    def _check(self, v: Tensor, q: Tensor, boxes: Tensor | None, v_mask: Tensor | None, q_mask: Tensor | None) -> None:
        check_tokens(v, self.v_dim, "v", "v_dim")
        check_tokens(q, self.q_dim, "q", "q_dim")
        require(v.shape[0] == q.shape[0], "v has batch {} but q has batch {}", v.shape[0], q.shape[0])
        some = v.shape[1] > 0 and q.shape[1] > 0
        require(some, "v and q must hold at least one object and one word, got {} and {}", tuple(v.shape), tuple(q.shape))
        check_mask(v_mask, *v.shape[:2], name="v_mask")
        check_mask(q_mask, *q.shape[:2], name="q_mask")
        if boxes is not None:
            check_floating(boxes, "boxes")
            require(tuple(boxes.shape) == (*v.shape[:2], 4), "boxes must be {}, got {}", (*v.shape[:2], 4), tuple(boxes.shape))
        if self.counter:
            none = "a module made with counter={} needs boxes (batch, objects, 4); pass boxes=, or make it with counter=0"
            require(boxes is not None, none, self.counter)
            few = "counter={} counts so many boxes, but v has only {} objects; pad v and boxes with zeros, or make the module with a smaller counter"
            require(v.shape[1] >= self.counter, few, self.counter, v.shape[1])
