"""A fast way with a gradient of its own, made one operator: whole to torch.compile and torch.export, which never see its sizes; counted; usable
under torch.func.vmap and torch.func.grad.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..errors import RegardError

Call = Callable[..., Any]


def operator(
    name: str,
    forward: Call,
    backward: Call,
    fake: Call,
    *,
    tensors: int,
    wanted: Sequence[int] | None = None,
    outputs: int = 1,
    keep_outputs: bool = False,
    fake_backward: Call | None = None,
    flops: Callable[..., int],
    backward_flops: Callable[..., int],
    vmap: Callable[[Call, Any, Any, Any], Any] | None = None,
) -> Call:
    """`forward` as the operator regard::name, differentiable once.

    Args:
        forward: (*tensors, *options) -> a tensor, or a tuple of them. Annotated: its schema is read off. A tensor may be None.
        backward: (*gradients of the outputs, *tensors, [*outputs,] *options) -> the gradients of the tensors at `wanted`, a tuple (a list where a
            tensor may be None: its gradient is anything). Annotated.
        fake: as `forward`, the shapes and strides alone.
        tensors: how many of the first arguments are tensors; outputs: how many results there are.
        wanted: the tensors that have a gradient; all if None.
        keep_outputs: `backward` takes the outputs too.
        fake_backward: as `backward`, the shapes alone; contiguous tensors like those wanted if None.
        flops, backward_flops: matrix-product FLOPs, from shapes in place of tensors.
        vmap: (operator, batch size, axes, arguments) -> outputs with the mapped axis first; member by member if None.
    """
    places = tuple(range(tensors) if wanted is None else wanted)

    def like_wanted(*args: Any) -> Any:
        given = [args[outputs + i] for i in places]
        found = [args[0].new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in given]
        return found if torch.library.infer_schema(backward, mutates_args=()).endswith("[]") else tuple(found)

    op = torch.library.custom_op(f"regard::{name}", forward, mutates_args=())
    adjoint = torch.library.custom_op(f"regard::{name}_backward", backward, mutates_args=())
    op.register_fake(fake)
    adjoint.register_fake(fake_backward or like_wanted)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = () if not keep_outputs else (output,) if isinstance(output, Tensor) else tuple(output)
        ctx.save_for_backward(*inputs[:tensors], *kept)
        ctx.options = inputs[tensors:]

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        found = iter(call_adjoint(*grads, *saved, *ctx.options))
        by_place = {i: one if saved[i] is not None else None for i, one in zip(places, found, strict=True)}
        return *(by_place.get(i) for i in range(tensors)), *[None] * len(ctx.options)

    def once(ctx: Any, *grads: Any) -> Any:
        raise RegardError(f"{name} is differentiable once; for second derivatives use use_impl('reference')")

    op.register_autograd(differentiate, setup_context=keep)
    adjoint.register_autograd(once, setup_context=_keep_nothing)
    call, call_adjoint = _callable(op, keep, differentiate), _callable(adjoint, _keep_nothing, once)
    for one in (op, adjoint):
        one.register_vmap(lambda info, axes, *args, one=one: (vmap or _member_by_member)(one, info.batch_size, axes, args))
    register_flop_formula(getattr(torch.ops.regard, name))(_counted(flops))
    register_flop_formula(getattr(torch.ops.regard, f"{name}_backward"))(_counted(backward_flops))
    return call


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _callable(op: Any, keep: Call, differentiate: Call) -> Call:
    """The operator; under torch.func.grad, where its own registered gradient does not work, within an autograd function."""

    class Within(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            out = op(*args)
            return tuple(out) if isinstance(out, list) else out

        setup_context = staticmethod(keep)
        backward = staticmethod(differentiate)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return Within.apply(*args)
        return op(*args)

    return call


def _counted(flops: Callable[..., int]) -> Callable[..., int]:
    def count(*args: Any, out_shape: Any = None, out_val: Any = None) -> int:
        return flops(*args)

    return count


def _member_by_member(op: Any, size: int, axes: Any, args: Any) -> tuple[Any, Any]:
    """Each member of the mapped axis on its own: operators work through their batch in pieces anyway."""
    found = [op(*(x.select(at, i) if isinstance(x, Tensor) and at is not None else x for x, at in zip(args, axes, strict=True))) for i in range(size)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    columns = [torch.stack(column) for column in zip(*found, strict=True)]
    return (columns, [0] * len(columns)) if isinstance(found[0], list) else (tuple(columns), (0,) * len(columns))
