"""What revlib 1.7.2 has in ``revlib.core``, and 1.0.1 in ``revlib``: modules for one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.policy import Reverse, StoreAll
from revcore.program import revnet
from revcore_torch.functional import reversible
from revcore_torch.modules import ReversibleSequential
from revcore_torch.revlib import linked
from revcore_torch.revlib.functions import (
    COUPLING,
    DUAL_OR_QUAD_TENSOR,
    FUSED_OPTIMIZER,
    QUAD_TENSOR,
    TENSOR_OR_LIST,
    MemoryModes,
    TensorOffload,
    additive_coupling_forward,
    additive_coupling_inverse,
    coupling_of,
    get_key,
    momentum_coupling_inverse,
    offload_tensor,
    on_first,
    split_tensor_list,
    take_0th_tensor,
)
from revcore_torch.revlib.fused import FusedOptimizer
from revcore_torch.revlib.linked import replace_grad
from revcore_torch.revlib.offload import OnDevice, device_of

__all__ = [
    "COUPLING",
    "DUAL_OR_QUAD_TENSOR",
    "FUSED_OPTIMIZER",
    "QUAD_TENSOR",
    "TENSOR_OR_LIST",
    "MemoryModes",
    "MergeCalls",
    "ReversibleModule",
    "ReversibleModuleCache",
    "ReversibleSequential",
    "ReversibleWrapper",
    "SingleBranchReversibleModule",
    "TensorOffload",
    "additive_coupling_forward",
    "additive_coupling_inverse",
    "get_key",
    "momentum_coupling_inverse",
    "offload_tensor",
    "replace_grad",
    "reverse_and_swap",
    "split_tensor_list",
    "take_0th_tensor",
]


class ReversibleModuleCache:
    """Holds the last two streams that went through a module, detached.

    >>> cache = ReversibleModuleCache()
    >>> _ = ReversibleModule(nn.Identity(), cache=cache)((torch.ones(1), torch.zeros(1)))
    >>> cache.x0, cache.x1
    (tensor([0.]), tensor([1.]))
    """

    x0: Tensor
    x1: Tensor

    def __call__(self, x0: Tensor, x1: Tensor) -> None:
        self.x0, self.x1 = x0.detach(), x1.detach()


class ReversibleWrapper(nn.Module):
    """A block with its coupling: ``forward(x0, x1) = coupling_forward(x0, f(x1))``, and the inverse ``(y0, y1)``.

    Keeps what autograd keeps. ``inverse`` takes the streams as the step hands them out, so ``y0`` is ``x1``.

    >>> wrapper = ReversibleWrapper(nn.Tanh())
    >>> x = torch.ones(1), torch.zeros(1)
    >>> wrapper.inverse(x[1], wrapper(*x))
    tensor([1.])
    """

    def __init__(self, wrapped_module: Any, coupling_forward: Any = None, coupling_inverse: Any = None) -> None:
        super().__init__()
        self.wrapped_module = wrapped_module
        self.coupling_forward = coupling_forward or additive_coupling_forward
        self.coupling_inverse = coupling_inverse or additive_coupling_inverse

    def forward(self, x0: Tensor, x1: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.coupling_forward(x0, self.wrapped_module(x1, *args, **kwargs))

    def inverse(self, y0: Tensor, y1: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.coupling_inverse(y1, self.wrapped_module(y0, *args, **kwargs))


class ReversibleModule(nn.Module):
    """One step of a RevNet, for use in :class:`ReversibleSequential` or by itself, one after the other.

    By itself it takes ``(x0, x1, slot0, slot1)`` and returns ``(x1, coupling_forward(x0, f(x1)), slot0, slot1)``; the
    slots begin as zeros, and :func:`replace_grad` takes what the last module returns. Of a chain of them two streams
    are kept. Where the block returns ``[f, *extra]``, the second output is such a list.

    Args:
        wrapped_module: the block.
        coupling_forward: ``y = coupling_forward(x, f)``, additive by default; or a :class:`revcore.Coupling`.
        coupling_inverse: ``x = coupling_inverse(y, f)``, its true inverse; checked here and now.
        memory_savings: ``False`` keeps everything; two streams in, two out.
        cache: keep this module's two streams by themselves (so memory grows with depth); two streams in, two out.
        target_device: where the block runs; its parameters stay where they are.
        fused_optimizer: see :class:`revcore_torch.revlib.fused.FusedOptimizer`.

    Raises:
        SpecError: a coupling without a true inverse; on a call, another number of tensors.

    >>> first, last = ReversibleModule(nn.Linear(2, 2)), ReversibleModule(nn.Linear(2, 2))
    >>> x = torch.ones(1, 2)
    >>> y0, y1 = replace_grad(*last(first((x, x, torch.zeros_like(x), torch.zeros_like(x)))))
    >>> (y0 + y1).sum().backward()
    """

    is_one_step = True

    def __init__(
        self,
        wrapped_module: Any,
        coupling_forward: Any = None,
        coupling_inverse: Any = None,
        memory_savings: bool = True,
        cache: ReversibleModuleCache | None = None,
        target_device: Any = "",
        fused_optimizer: Any = None,
    ) -> None:
        super().__init__()
        self.coupling = coupling_of(coupling_forward, coupling_inverse)
        if isinstance(coupling_forward, Coupling):
            coupling_forward, coupling_inverse = coupling_forward.forward, coupling_forward.inverse
        self.device = device_of(target_device)
        self.wrapped_module = ReversibleWrapper(wrapped_module, coupling_forward, coupling_inverse)
        self.memory_savings, self.cache, self.target_device = memory_savings, cache, target_device
        self.fused = None if fused_optimizer is None else FusedOptimizer(fused_optimizer, [self.wrapped_module])

    def forward(self, inp: Any, *args: Any, **kwargs: Any) -> Any:
        alone = not self.memory_savings or self.cache is not None
        if len(inp) != (2 if alone else 4):
            raise SpecError(
                f"{len(inp)} tensors came, expected "
                + ("(x0, x1)" if alone else "(x0, x1, slot0, slot1): begin with zeros_like(x0), zeros_like(x1)")
            )
        if self.fused is not None:
            self.fused.attach([self.wrapped_module])
        streams, slots = tuple(inp[:2]), tuple(inp[2:])
        block = self.wrapped_module.wrapped_module
        if self.device is not None:
            block = OnDevice(block, self.device)
        if alone:
            policy = Reverse() if self.memory_savings else StoreAll()
            out = reversible(revnet(1, self.coupling), [block], streams, *args, policy=policy, **kwargs)
            (x1, y), aux = out if isinstance(out[0], tuple) else (out, [()])
            extra = aux[0]
            if self.cache is not None:
                self.cache(x1, y)
        else:
            (x1, y), slots, extra = linked.step(self.coupling, block, streams, slots, args, kwargs)
        return (x1, [y, *extra] if extra else y, *slots)

    def extra_repr(self) -> str:
        return f"coupling={self.coupling}, target_device={self.target_device or None}"


class SingleBranchReversibleModule(ReversibleModule):
    """A :class:`ReversibleModule` that takes and returns one stream; the other waits in a list shared by all.

    Args:
        secondary_branch_buffer: that list.
        first: whether the chain begins here, with ``start``.
        last: whether it ends here.
        start: what the other stream is at first: ``"zeros"`` (revlib's) or ``"input"``.

    Other arguments and errors are :class:`ReversibleModule`'s.

    >>> waiting = []
    >>> first = SingleBranchReversibleModule(waiting, nn.Linear(2, 2), first=True)
    >>> last = SingleBranchReversibleModule(waiting, nn.Linear(2, 2), last=True)
    >>> last(first(torch.ones(1, 2))).sum().backward()
    >>> waiting
    []
    """

    def __init__(
        self,
        secondary_branch_buffer: list[Any],
        wrapped_module: Any,
        coupling_forward: Any = None,
        coupling_inverse: Any = None,
        memory_savings: bool = True,
        cache: ReversibleModuleCache | None = None,
        target_device: Any = "",
        fused_optimizer: Any = None,
        first: bool = False,
        last: bool = False,
        start: str = "zeros",
    ) -> None:
        if start not in ("zeros", "input"):
            raise SpecError(f"start came as {start!r}, expected 'zeros' or 'input'")
        super().__init__(
            wrapped_module, coupling_forward, coupling_inverse, memory_savings, cache, target_device, fused_optimizer
        )
        self.secondary_branch_buffer = secondary_branch_buffer
        self.first, self.last, self.start = first, last, start

    def forward(self, x1: Tensor, *args: Any, **kwargs: Any) -> Any:
        waiting = self.secondary_branch_buffer
        linked_ = self.memory_savings and self.cache is None
        if self.first:
            waiting.clear()
            zeros = torch.zeros_like(x1)
            x0, slots = (x1 if self.start == "input" else zeros), (zeros, zeros) if linked_ else ()
        elif waiting:
            x0, *slots = waiting.pop()
        else:
            raise SpecError(
                "no stream is waiting for this module: call the modules of a chain in turn, from the one with "
                "first=True to the one with last=True"
            )
        x1, y, *slots = super().forward((x0, x1, *slots), *args, **kwargs)
        if not self.last:
            waiting.append((x1, *slots))
        elif linked_:
            y = on_first(y, lambda out: replace_grad(x1, out, *slots)[1])
        return y


class MergeCalls(nn.Module):
    """Modules one after the other; what they return beside their first output is handed to ``collate_fn``.

    Args:
        *modules: what is called in turn, each with all further arguments.
        collate_fn: makes the result of the last first output and a list of all ``[first, *extra]``; not called where
            nothing is extra.

    >>> MergeCalls(nn.Identity(), nn.Identity(), collate_fn=lambda y, outputs: [y])(torch.ones(1))
    tensor([1.])
    """

    def __init__(self, *modules: nn.Module, collate_fn: Callable[[Tensor, list[Any]], list[Any]]) -> None:
        super().__init__()
        self.wrapped_modules = nn.ModuleList(modules)
        self.collate_fn = collate_fn

    def forward(self, inp: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = []
        for module in self.wrapped_modules:
            inp = module(inp, *args, **kwargs)
            if not isinstance(inp, Tensor):
                outputs.append(list(inp))
                inp = inp[0]
        return self.collate_fn(inp, outputs) if outputs else inp


def reverse_and_swap(*given: Any) -> tuple[Any, ...]:
    """One step of a RevNet: what a :class:`ReversibleModule` calls, which see.

    - 1.7.2: ``(x0, x1, slot0, slot1, wrapper, target_device, cuda, optimizer_step, args, kwargs)`` returns
      ``(x1, y, slot0, slot1, extra outputs as a list, or None)``. ``cuda`` is not needed, and ``optimizer_step`` has to
      be ``None``.
    - 1.0.1: ``(x0, slot0, x1, slot1, block, coupling_forward, coupling_inverse)`` returns ``(x1, slot0, y, slot1)``.

    Raises:
        SpecError: another number of arguments, an ``optimizer_step``, and all that a module raises.

    >>> x, zeros = torch.ones(1), torch.zeros(1)
    >>> reverse_and_swap(x, zeros, x, zeros, torch.sin, additive_coupling_forward, momentum_coupling_inverse)[2]
    tensor([1.8415])
    """
    if len(given) == 7:
        x0, slot0, x1, slot1, block, forward, inverse = given
        coupling = coupling_of(forward, inverse)
        (x1, y), (slot0, slot1), extra = linked.step(coupling, block, (x0, x1), (slot0, slot1), (), {})
        return x1, slot0, ([y, *extra] if extra else y), slot1
    if len(given) != 10:
        raise SpecError(f"reverse_and_swap got {len(given)} arguments, expected 10 (revlib 1.7.2) or 7 (1.0.1)")
    x0, x1, slot0, slot1, wrapper, target_device, _, optimizer_step, args, kwargs = given
    if optimizer_step is not None:
        raise SpecError(
            "reverse_and_swap takes no optimizer_step: write ReversibleModule(block, fused_optimizer=make), where make "
            "is a function of parameters that makes the optimizer"
        )
    coupling, block = coupling_of(wrapper.coupling_forward, wrapper.coupling_inverse), wrapper.wrapped_module
    device = device_of(target_device)
    if device is not None:
        block = OnDevice(block, device)
    (x1, y), slots, extra = linked.step(coupling, block, (x0, x1), (slot0, slot1), tuple(args), dict(kwargs))
    return x1, y, *slots, (list(extra) or None)
