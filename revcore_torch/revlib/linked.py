"""A tape over modules that are called one by one, with anything in between: each knows its own step alone.

revlib's protocol: beside the two streams travel two *slots*, tensors of the streams' shape whose values mean nothing.
On the way back the gradient of a slot is not one: it is the stream after the module, as the next module rebuilt it.
:func:`replace_grad` starts it with the last streams. So two streams are kept in all, at any depth, and the order of
things is autograd's.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.policy import Reverse
from revcore.program import revnet
from revcore_torch.functional import check
from revcore_torch.steps import Streams
from revcore_torch.tape import Tape, _can_record, _keeps_graph, run

Slots = tuple[Tensor, Tensor]


class LinkedTape(Tape):
    """The tape of one module's step; what it starts from comes back through the slots."""

    starts_exact = False  # a later module rebuilt them
    gone = (
        "the streams after a ReversibleModule did not come back to it, and its input is rebuilt from them: hand all "
        "four tensors that a module returns on to the next one, and those of the last one to replace_grad, whose two "
        "outputs are the network's: y0, y1 = replace_grad(*last(...)). Or use ReversibleSequential"
    )

    def __init__(self, slots: Slots, *given: Any) -> None:
        super().__init__(*given)
        self.slots: Slots | None = slots  # while recording
        self.arrived: Streams | None = None
        self.later: weakref.ref[LinkedTape] | None = None

    def _pass_through(self, kept: tuple[Tensor, ...], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        assert self.slots is not None
        earlier = getattr(self.slots[0].grad_fn, "tape", None)
        if isinstance(earlier, LinkedTape):
            if earlier.later is not None and earlier.later() is not None:
                raise SpecError(
                    "what one ReversibleModule returned was handed to two: of each module's four tensors only one "
                    "module can be the next"
                )
            earlier.later = weakref.ref(self)
        first, second, *outputs = _Link.apply(self, kept[2:], *self.slots, *outputs)
        self.slots = first, second
        return outputs

    def _in_node(self) -> Sequence[Tensor] | None:
        if self.arrived is None:
            return None
        arguments = super()._in_node()
        return None if arguments is None else (*self.arrived, *arguments)

    def take_slots(self) -> Slots:
        """Return the slots to hand on; the tape must not hold what has a graph (T8)."""
        assert self.slots is not None
        slots, self.slots = self.slots, None
        return slots


class _Link(torch.autograd.Function):
    """The identity on a module's outputs. Its node keeps arguments, and hands the streams on to the module before."""

    @staticmethod
    def forward(ctx: Any, tape: LinkedTape, arguments: Sequence[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        ctx.tape = tape
        tape.node = weakref.ref(ctx)
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tape, (y0, y1, *rest) = ctx.tape, grads
        if y0 is None or y1 is None:
            return None, None, None, None, *rest
        later = tape.later() if tape.later is not None else None
        again = _keeps_graph() or torch.is_grad_enabled()
        if later is not None and not again:
            later.current = None  # all of its nodes have run
        tape.arrived = y1.detach(), y0.detach()  # the step hands its streams out swapped
        with tape._walking() as walk:
            tape._rebuild(walk, 0)
            before = walk.streams
        if not again:
            tape.arrived = None
        return None, None, *before, *rest


class _ReplaceGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, x1: Tensor, slot0: Tensor, slot1: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x0, x1)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in (x0, x1) if not x.requires_grad])
        return x0, x1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x0, x1 = ctx.saved_tensors
        return *grads, x0.detach(), x1.detach()


@torch._disable_dynamo  # T10  # pyright: ignore[reportPrivateImportUsage]
def replace_grad(x0: Tensor, x1: Tensor, slot0: Tensor, slot1: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(x0, x1)``; on the way back, the slots' "gradients" are these two tensors.

    Called once, with what the last :class:`ReversibleModule` of a chain returned.

    >>> import torch
    >>> x = torch.ones(2, requires_grad=True)
    >>> slots = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    >>> y0, y1 = replace_grad(x, 2 * x, *slots)
    >>> torch.autograd.grad(y0.sum() + y1.sum(), [x, slots[1]])
    (tensor([3., 3.]), tensor([2., 2.]))
    """
    if not _can_record():  # nor has any module
        return x0, x1
    return _ReplaceGrad.apply(x0, x1, slot0, slot1)  # type: ignore[return-value]


@torch._disable_dynamo  # T10  # pyright: ignore[reportPrivateImportUsage]
def step(
    coupling: Coupling, block: Any, streams: Streams, slots: Slots, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Streams, Slots, tuple[Any, ...]]:
    """Run one step of a RevNet: return the streams swapped, the slots, and the block's extra outputs."""
    _, blocks, streams, arguments = check(revnet(1, coupling), [block], streams, args, kwargs, None)
    for slot, stream in zip(slots, streams, strict=True):
        if slot.shape != stream.shape or slot.dtype != stream.dtype or slot.device != stream.device:
            raise SpecError(
                f"a slot came as {slot.dtype}, shape {tuple(slot.shape)} on {slot.device}, and the stream that travels "
                f"back in it is {stream.dtype}, shape {tuple(stream.shape)} on {stream.device}: begin with "
                "torch.zeros_like(x0), torch.zeros_like(x1)"
            )
    made: list[LinkedTape] = []

    def make_tape(*given: Any) -> LinkedTape:
        made.append(LinkedTape(slots, *given))
        return made[-1]

    (y, x1), aux = run(revnet(1, coupling), blocks, streams, arguments, Reverse(), make_tape)
    return (x1, y), (made[-1].take_slots() if made else slots), aux[0]
