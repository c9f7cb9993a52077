"""Faults in sequence, set and graph modules."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...official import KeyMap, rename
from ...ops._dispatch import choose
from ._base import Nodes, Pool, Tokens, card


class SoftmaxOverBatch(Tokens):
    fails = "same_sample_in_another_batch"

    def weigh(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return scores.softmax(0)


class KnowsItsPlaceInTheBatch(Tokens):
    fails = "batch_permutation"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().finish(weights, v, x) * (1 + torch.arange(x.shape[0], device=x.device, dtype=x.dtype))[:, None, None]


class CannotInferAWidth(Tokens):
    fails = "empty_batch_stays_empty"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().finish(weights, v, x).reshape(x.shape[0], x.shape[1], -1)


class WritesToItsInput(Tokens):
    fails = "input_not_modified"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        out = super().finish(weights, v, x)
        if not x.requires_grad:
            x.copy_(out)
        return out


class DriftsInEval(Tokens):
    fails = "eval_is_deterministic"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        self.q.weight.data = self.q.weight.data.softmax(-1)
        return super().scores(q, k)


class DrawsFromNowhere(Tokens):
    fails = "training_is_reproducible"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        noise = torch.rand(1, generator=generator).item() if self.training else 0.0
        return super().finish(weights, v, x) + noise


class ChecksNothing(Tokens):
    fails = "wrong_calls_are_answered"

    def validate(self, x: Tensor, context: Tensor | None, key_mask: Tensor | None, attn_mask: Tensor | None) -> None:
        pass


class TakesFloatMasks(Tokens):
    fails = "wrong_masks_are_answered"

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None, **more: Any) -> Any:
        return super().forward(x, context, key_mask=None if key_mask is None else key_mask.bool(), **more)


class SwallowsBadOptions(Tokens):
    fails = "wrong_options_are_answered"

    def __init__(self, dim: int, num_heads: int = 2, *, causal: bool = False, memory: int | None = None) -> None:
        super().__init__(dim, max(1, num_heads), causal=causal, memory=memory)


class HidesAnOption(Tokens):
    """Args: dim, num_heads, causal, memory."""

    fails = "options_are_documented_and_shown"

    def __init__(self, dim: int, num_heads: int = 2, *, causal: bool = False, memory: int | None = None, secret: int = 0) -> None:
        super().__init__(dim, num_heads, causal=causal, memory=memory)
        self.secret = secret


class MixesUpOfficialNames(Tokens):
    fails = "official_names_round_trip"
    official: ClassVar = (KeyMap("theirs", (rename("k.*", "q.*"), rename("k.*", "k.*"))),)


class MisstatesItsCost(Tokens):
    fails = "cost_formula_is_what_is_counted"
    card: ClassVar = card("probe", "sequence", Tokens.can, {"dim": 8, "num_heads": 2}, "8*B*N*dim**2", 2.0)


class MisstatesItsGrowth(Tokens):
    fails = "growth_is_what_is_counted"
    card: ClassVar = card("probe", "sequence", Tokens.can, {"dim": 8, "num_heads": 2}, Tokens.flops, 1.0)


class MasksValuesOnly(Tokens):
    fails = "padding_invariance"

    def weigh(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return scores.softmax(-1) * allowed


class MasksWithMinusTen(Tokens):
    fails = "masked_elements_are_silent"

    def weigh(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return (scores - 10.0 * (~allowed).to(scores.dtype)).softmax(-1)


class InvertsTheMask(Tokens):
    fails = "full_mask_changes_nothing"

    def allowed(self, n: int, m: int, key_mask: Tensor | None, attn_mask: Tensor | None, device: torch.device) -> Tensor:
        return super().allowed(n, m, None if key_mask is None else ~key_mask, attn_mask, device)


class NoGuardForEmptyRows(Tokens):
    fails = "fully_masked_is_finite"

    def weigh(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return scores.masked_fill(~allowed, float("-inf")).softmax(-1)


class TransposesAttnMask(Tokens):
    fails = "attn_mask_hides_pairs"

    def allowed(self, n: int, m: int, key_mask: Tensor | None, attn_mask: Tensor | None, device: torch.device) -> Tensor:
        return super().allowed(n, m, key_mask, None if attn_mask is None else attn_mask.mT, device)


class ShowsUnmaskedWeights(Tokens):
    fails = "masked_keys_weigh_nothing"

    def shown(self, weights: Tensor) -> Tensor:
        return (weights + 1e-3) / (weights + 1e-3).sum(-1, keepdim=True)


class CountsPaddedElements(Pool):
    fails = "padding_invariance_of_elements"

    def pool(self, x: Tensor, real: Tensor) -> Tensor:
        return x.masked_fill(~real[..., None], 0.0).mean(1)


class IgnoresNodeMask(Nodes):
    fails = "padding_invariance_of_nodes"

    def hide(self, adjacency: Tensor, node_mask: Tensor) -> Tensor:
        return adjacency


class NeedsEvenLengths(Tokens):
    fails = "any_size"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q.unflatten(2, (-1, 2)).flatten(2, 3) if q.shape[2] % 2 else q) @ k.unflatten(2, (-1, 2)).flatten(2, 3).mT


class NormalisesByZero(Tokens):
    fails = "constant_input_is_finite"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().finish(weights, v, x) + x / x.norm(dim=-1, keepdim=True)


class ExponentWithoutMaximum(Tokens):
    fails = "finite_at_a_thousand"

    def weigh(self, scores: Tensor, allowed: Tensor) -> Tensor:
        e = scores.exp() * allowed
        return e / e.sum(-1, keepdim=True).clamp_min(1e-30)


class DetachesItsScores(Tokens):
    fails = "gradcheck_in_float64"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k.detach()) + 0.0 * k.sum()


class ComputesInSingle(Tokens):
    fails = "float64_agrees"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().finish(weights, v, x).float()


class AddsSinglePrecisionConstants(Tokens):
    fails = "bfloat16_is_close"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + torch.zeros(1, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))


class RoundsInHalf(Tokens):
    fails = "autocast_trains"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = super().scores(q, k)
        return scores.round() if scores.dtype == torch.bfloat16 else scores


class KeepsLayersInAList(Tokens):
    fails = "parameters_are_registered_and_learn"

    def __init__(self, dim: int, num_heads: int = 2, *, causal: bool = False, memory: int | None = None) -> None:
        super().__init__(dim, num_heads, causal=causal, memory=memory)
        self.layers = [nn.Linear(dim, dim)]

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return self.layers[0](super().finish(weights, v, x))


class MeansOverEverything(Tokens):
    fails = "queries_matter"

    def weigh(self, scores: Tensor, allowed: Tensor) -> Tensor:
        return super().weigh(scores * 0.0, allowed)


class IgnoresItsHeads(Tokens):
    fails = "heads_and_groups_matter"

    def heads(self, x: Tensor) -> Tensor:
        return x[:, None]


class PeeksOneAhead(Tokens):
    fails = "no_gradient_from_the_future"

    def past(self, n: int, m: int, device: torch.device) -> Tensor:
        return torch.arange(m, device=device) <= torch.arange(n, device=device)[:, None] + m - n + 1


class DividesByTheWholeLength(Tokens):
    fails = "prefix_property"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().finish(weights, v, x) * (1 + 1 / x.shape[1])


class ForgetsOldSteps(Tokens):
    fails = "steps_equal_the_whole"

    def init_state(self, batch: int) -> Tensor:
        self.memory = 4
        return super().init_state(batch)


class KnowsItsPlace(Tokens):
    fails = "permutation_equivariance"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) - torch.arange(k.shape[2], device=k.device, dtype=k.dtype)


class PrefersTheFirst(Pool):
    fails = "permutation_invariance"

    def pool(self, x: Tensor, real: Tensor) -> Tensor:
        return super().pool(x, real) + x[:, 0] * real[:, :1]


class IgnoresItsContext(Tokens):
    fails = "cross_attention"

    def forward(self, x: Tensor, context: Tensor | None = None, **more: Any) -> Any:
        return super().forward(x, None if context is None else torch.zeros_like(context), **more)


class ShowsWeightsOfAnotherCall(Tokens):
    fails = "weights_come_beside_the_same_output"

    def forward(self, x: Tensor, context: Tensor | None = None, *, return_weights: bool = False, **more: Any) -> Any:
        return super().forward(2 * x if return_weights else x, context, return_weights=return_weights, **more)


class ShowsWeightsAfterDropout(Tokens):
    fails = "weights_sum_to_one"

    def shown(self, weights: Tensor) -> Tensor:
        return 0.9 * weights


class ReadsAValueOnTheHost(Tokens):
    fails = "compiles_whole"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().finish(weights, v, x) * (1.0 if weights.sum().item() >= 0 else 2.0)


class BindsItsLength(Tokens):
    fails = "exports_with_free_sizes"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        out = super().finish(weights, v, x)
        return torch.stack([out[:, t] for t in range(x.shape[1])], 1)


class RebuildsItsWeights(Tokens):
    fails = "vmap_over_weights"

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        scale = max(self.out.weight.detach().flatten()[:2].tolist(), default=0.0)
        return super().finish(weights, v, x) * (1 + 0.0 * scale)


class CountsItsCalls(Tokens):
    fails = "checkpointing_equals"
    calls: int = 0

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        self.calls += x.requires_grad
        return super().finish(weights, v, x) * (1 + 0.1 * self.calls)


class HoldsALambda(Tokens):
    fails = "copies_and_pickles"

    def __init__(self, dim: int, num_heads: int = 2, *, causal: bool = False, memory: int | None = None) -> None:
        super().__init__(dim, num_heads, causal=causal, memory=memory)
        self.activation = lambda x: x


class HoldsATableOutsideItsState(Tokens):
    fails = "state_survives_a_file"

    def __init__(self, dim: int, num_heads: int = 2, *, causal: bool = False, memory: int | None = None) -> None:
        super().__init__(dim, num_heads, causal=causal, memory=memory)
        self.table = torch.randn(dim)

    def finish(self, weights: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return super().finish(weights, v, x) * self.table


class MakesTensorsOnTheHost(Tokens):
    fails = "builds_on_meta"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) + torch.zeros(k.shape[2], device="cpu", dtype=k.dtype)


class TrustsItsStrides(Tokens):
    fails = "strided_input_is_the_same"

    def forward(self, x: Tensor, context: Tensor | None = None, **more: Any) -> Any:
        if x.ndim == 3 and context is None:
            x = torch.as_strided(x, x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))
        return super().forward(x, context, **more)


class FastPathIsWrong(Tokens):
    fails = "fast_paths_equal_the_reference"

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        fused = choose("softmax_attention", "fused", "a wrong scale on the fast path") == "fused"
        return super().scores(q, k) * (1.1 if fused else 1.0)


class ShowsOtherRows(Tokens):
    fails = "chosen_rows_are_those_of_the_weights"

    def weights(self, x: Tensor, *, queries: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return super().weights(x, queries=queries.sort().values, key_mask=key_mask)


class PicksRowsOfAllPairs(Tokens):
    fails = "rows_cost_is_linear"

    def weights(self, x: Tensor, *, queries: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return super().weights(x, queries=torch.arange(x.shape[1], device=x.device), key_mask=key_mask)[:, :, queries]


class HasAnotherCore(Tokens):
    fails = "core_is_what_the_module_computes"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return super().attend(2 * q, k, v, key_mask=key_mask)
