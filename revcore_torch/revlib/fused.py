"""``fused_optimizer``: a block's optimizer steps in the backward pass, as soon as that block's gradients are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revcore.errors import SpecError


class FusedOptimizer:
    """One optimizer for each block's parameters (one for several blocks, if they share some).

    A parameter's gradient is complete when autograd has added up all its uses, and not before: a shared one waits for
    all. When those of a block are complete, its optimizer steps and its gradients are freed, before the block below is
    run again. Parameters that got no gradient in a pass do not hold the others up beyond its end.

    It steps in every backward pass. After a step the weights are not those of the forward pass, so a second backward
    pass over one graph (``retain_graph``) is refused, as any change of weights is. Gradients are those that autograd
    adds up: what is done to them later (clipping by the norm of all, a ``GradScaler``, adding up several passes) comes
    too late, so do not combine it with these. Within ``DistributedDataParallel``, whose average would come too late, a
    forward pass is refused.

    Args:
        make: makes an optimizer of a list of parameters, such as ``functools.partial(torch.optim.SGD, lr=0.1)``.
        blocks: whose parameters.

    Raises:
        SpecError: ``make`` returns no optimizer; in :meth:`attach`, blocks with other parameters than these had, and a
            forward pass of ``DistributedDataParallel``.

    >>> block = nn.Linear(2, 2)
    >>> fused = FusedOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=1.0), [block])
    >>> fused.attach([block])
    >>> before = block.bias.detach().clone()
    >>> block(torch.ones(1, 2)).sum().backward()
    >>> block.bias.grad is None, (before - block.bias).tolist()
    (True, [1.0, 1.0])
    """

    def __init__(self, make: Callable[[Iterable[Tensor]], torch.optim.Optimizer], blocks: Sequence[nn.Module]) -> None:
        if not callable(make):
            raise SpecError(
                f"fused_optimizer came as {make!r}, expected a function of parameters that makes an optimizer: "
                "functools.partial(torch.optim.SGD, lr=0.1)"
            )
        self._groups = [_Group(make, parameters) for parameters in _grouped(blocks)]
        self._hooked: set[int] = set()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers in the blocks' order, for a learning-rate schedule or to save their state."""
        return [group.optimizer for group in self._groups]

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """See to it that gradients of ``blocks`` are waited for; called before each forward pass."""
        if DistributedDataParallel._get_active_ddp_module() is not None:
            raise SpecError(
                "a model with fused_optimizer came inside DistributedDataParallel (which Accelerate, Trainer and "
                "Lightning use for several processes): its optimizers would step before the ranks' gradients are "
                "averaged, and the ranks' weights would drift apart: leave fused_optimizer out, and give the trainer "
                "an optimizer"
            )
        known = {id(p) for group in self._groups for p in group.parameters}
        if {id(p) for block in blocks for p in block.parameters()} != known:
            raise SpecError(
                "the blocks have other parameters than fused_optimizer was given (a block was added or removed, or "
                "weights were replaced by other objects): make the model anew"
            )
        for group in self._groups:
            for p in group.parameters:
                if p.requires_grad and id(p) not in self._hooked:  # a frozen one takes no hook
                    self._hooked.add(id(p))
                    p.register_post_accumulate_grad_hook(group.arrived)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooked": set()}  # copies of parameters have no hooks


class _Group:
    """The parameters that step together."""

    def __init__(self, make: Any, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.optimizer: torch.optim.Optimizer = make(parameters)
        if not callable(getattr(self.optimizer, "step", None)):
            raise SpecError(f"fused_optimizer returned {type(self.optimizer).__name__}, expected a torch optimizer")
        self.task = -1
        self.waiting: set[int] = set()

    def arrived(self, parameter: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task = task
            self.waiting = {id(p) for p in self.parameters if p.requires_grad}
            torch.autograd.Variable._execution_engine.queue_callback(self._settle)  # type: ignore[attr-defined]
        self.waiting.discard(id(parameter))
        if not self.waiting:
            self._step()

    def _settle(self) -> None:
        """At the end of the pass: step, if a parameter that was not used has held the others up."""
        if self.waiting:
            self._step()
        self.task = -1

    def _step(self) -> None:
        self.waiting = set()
        self.optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None


def _grouped(blocks: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """Return the parameters by block; blocks that share some are one."""
    groups: list[dict[nn.Parameter, None]] = []
    for block in blocks:
        mine = dict.fromkeys(block.parameters())
        if not mine:
            continue
        shared = [group for group in groups if not group.keys().isdisjoint(mine)]
        if not shared:
            groups.append(mine)
            continue
        for other in (*shared[1:], mine):
            shared[0].update(other)
        groups = [group for group in groups if group not in shared[1:]]
    return [list(group) for group in groups]
