"""Peak memory by policy, planned on fake tensors: for models far too large for the machine that plans.

>>> model = ReversibleSequential(*[nn.Linear(64, 64) for _ in range(8)])
>>> print(plan(model, torch.empty(512, 128), policies=[StoreAll(), Reverse()]))
depth 8: parameters 130.0 KiB, gradients 0 B, optimizer 0 B; forward 33.55 MFLOP = 1 F
policy           held       peak      total    work
StoreAll()  896.0 KiB  1.250 MiB  1.377 MiB  2.88 F
Reverse()   256.0 KiB  ...  3.88 F
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revcore.errors import SpecError
from revcore.policy import Checkpoint, MemoryBudget, Policy, Reverse, StepPolicy, StoreAll, check_policy
from revcore_torch.fakes import Fakes, faking, real_gradients_kept
from revcore_torch.memory import Meter
from revcore_torch.modules import ReversibleSequential

OPTIMIZERS = {"none": 0, "sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}
"""How many numbers an optimizer keeps for each parameter, in the parameter's dtype."""


@dataclass(frozen=True)
class Row:
    """What one training step takes under one policy.

    Attributes:
        policy: of every ``ReversibleSequential`` and reversible stack of layers in the model.
        held: bytes that the forward pass leaves for the backward pass, beyond the model and its inputs.
        peak: the most bytes that live at once, beyond the same; gradients that the pass makes are among them.
        flops: of the forward pass.
        work: FLOPs of both passes, in forward passes: 3 for an ordinary network; ``nan`` where none are counted.
    """

    policy: Policy
    held: int
    peak: int
    flops: int
    work: float


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` returns: printed, it is a table.

    Attributes:
        parameters: bytes of the model's parameters and buffers.
        gradients: bytes of the gradients that are there before the pass.
        optimizer: bytes of the optimizer's state.
        depth: steps of the longest ``ReversibleSequential``, or layers of the longest stack.
        rows: one for each policy.

    >>> found = plan(ReversibleSequential(nn.Linear(4, 4)), torch.empty(2, 8), policies=[Reverse()], optimizer="adam")
    >>> found.parameters, found.optimizer, found.total(found.rows[0]) - found.rows[0].peak
    (80, 160, 240)
    """

    parameters: int
    gradients: int
    optimizer: int
    depth: int
    rows: tuple[Row, ...]

    def total(self, row: Row) -> int:
        """Return the bytes at the peak, those of model, gradients and optimizer among them."""
        return self.parameters + self.gradients + self.optimizer + row.peak

    def table(self) -> str:
        """Return the rows as text."""
        cells = [("policy", "held", "peak", "total", "work")]
        for row in self.rows:
            figures = (in_bytes(row.held), in_bytes(row.peak), in_bytes(self.total(row)))
            cells.append((name_of(row.policy), *figures, "–" if math.isnan(row.work) else f"{row.work:.2f} F"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join(
            "  ".join((line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))))
            for line in cells
        )

    def __str__(self) -> str:
        fixed = {"parameters": self.parameters, "gradients": self.gradients, "optimizer": self.optimizer}
        head = ", ".join(f"{name} {in_bytes(size)}" for name, size in fixed.items())
        return f"depth {self.depth}: {head}; forward {in_flops(self.rows[0].flops)} = 1 F\n{self.table()}"

    def plot(self, path: Any) -> None:
        """Draw the table as bars into a file (PNG, SVG or PDF by its ending).

        Raises:
            SpecError: matplotlib is not installed.
        """
        from revcore_torch.chart import bars

        bars(path, self)


def plan(
    model: nn.Module,
    *inputs: Any,
    policies: Sequence[Policy] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: str = "none",
    gradients: bool | None = None,
    device: str = "cpu",
    progress: Callable[[Policy], None] | None = None,
    **kwargs: Any,
) -> Plan:
    """Return the memory of one forward and backward pass of ``model`` by policy, without running it.

    A copy of it runs on fake tensors, and the bytes that live are counted after every operation: exactly what
    :class:`revcore_torch.memory.LiveBytes` counts on a real run. The model stays as it is; what its code does beyond
    tensors and its own attributes, it does (a hook that prints, prints). Compiled parts run eagerly.

    Args:
        model: any module with a ``ReversibleSequential`` in it, or one made reversible by
            :func:`revcore_torch.hf.make_reversible`: a real one, or one without data, made on the ``meta`` device or
            under ``FakeTensorMode``.
        *inputs: what the model is called with, as are ``**kwargs``; their tensors may be real, meta or fake, too.
        policies: what to compare; a sensible choice by default. Each is given to all of them.
        loss: makes a scalar of the model's output; by default the sum over all its floating-point tensors.
        optimizer: adds its state to the totals: ``"none"``, ``"sgd"``, ``"momentum"``, ``"adam"`` or ``"adamw"``.
        gradients: whether the parameters' gradients are there before the pass (``True``: accumulated into; ``False``:
            set to ``None``); ``None`` leaves that as in the model.
        device: what is planned for where the model is on the ``meta`` device; another than ``"cpu"`` needs a PyTorch
            that has it.
        progress: called with each policy before it is planned.

    Raises:
        SpecError: no ``ReversibleSequential`` in the model, nothing that needs a gradient, an operation that needs data
            or has no fake implementation, a model that cannot be copied.

    >>> with torch.device("meta"):  # nothing is allocated
    ...     model = ReversibleSequential(*[nn.Linear(8192, 8192) for _ in range(64)])
    ...     x = torch.empty(4096, 16384)
    >>> found = plan(model, x, policies=[StoreAll(), Reverse()], gradients=True)
    >>> in_bytes(found.rows[0].peak), found.rows[0].peak > 8 * found.rows[1].peak
    ('8.250 GiB', True)
    """
    if optimizer not in OPTIMIZERS:
        raise SpecError(f"optimizer came as {optimizer!r}, expected one of {', '.join(map(repr, OPTIMIZERS))}")
    networks = _networks(model)
    if not networks:
        raise SpecError(
            f"there is no ReversibleSequential in the {type(model).__name__}, and hf.make_reversible made none of its "
            "layers reversible, so no policy to plan for"
        )
    depth = max(getattr(network, "depth", 0) or len(network.program.unrolled) for network in networks)
    chosen = default_policies(depth) if policies is None else tuple(map(check_policy, policies))
    rows = []
    for policy in chosen:
        if progress is not None:
            progress(policy)
        with faking("the planner", device) as fakes:
            rows.append(_row(fakes, model, inputs, kwargs, policy, loss, gradients))
    learned = [p for p in model.parameters() if p.requires_grad]
    there = [p for p in learned if (p.grad is not None if gradients is None else gradients)]
    return Plan(
        parameters=sum(map(_size, {*model.parameters(), *model.buffers()})),
        gradients=sum(map(_size, there)),
        optimizer=OPTIMIZERS[optimizer] * sum(map(_size, learned)),
        depth=depth,
        rows=tuple(rows),
    )


def default_policies(depth: int) -> tuple[StepPolicy, ...]:
    """Return the policies that are worth a look, from the most memory to the least.

    >>> [name_of(policy) for policy in default_policies(16)]
    ['StoreAll()', 'Reverse(keep_last=8)', 'Checkpoint(every=4)', 'Checkpoint()', 'Reverse(keep_last=1)', 'Reverse()']
    """
    half, root = max(2, depth // 2), max(2, round(math.sqrt(depth)))
    first = StoreAll(), Reverse(keep_last=half), Checkpoint(every=root), Checkpoint()
    return *first, Reverse(keep_last=1), Reverse()


def _row(
    fakes: Fakes, model: nn.Module, inputs: Any, kwargs: Any, policy: Policy, loss: Any, gradients: bool | None
) -> Row:
    net, args, kw = fakes.copy((model, inputs, kwargs))
    for network in _networks(net):
        network.policy = policy
    for parameter in net.parameters() if gradients is not None else ():
        parameter.grad = torch.empty_like(parameter) if gradients and parameter.requires_grad else None
    with torch.enable_grad(), Meter() as meter:
        total = (loss or _sum)(net(*args, **kw))
        if not isinstance(total, Tensor) or total.numel() != 1 or not total.requires_grad:
            raise SpecError(
                "the planner needs a scalar loss that has a gradient: give loss=, a function that makes one of the "
                f"model's output (here came {_describe(total)})"
            )
        held, forward = meter.live, meter.flops
        with real_gradients_kept(total):
            total.backward()
    return Row(policy, held, meter.peak, forward, meter.flops / forward if forward else math.nan)


def _networks(model: nn.Module) -> list[Any]:
    """Return what in a model has a policy."""
    found: list[Any] = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    hf = sys.modules.get("revcore_torch.hf.convert")  # which imports transformers, where it is in use
    return found + (hf.stacks(model) if hf is not None else [])


def _sum(output: Any) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    sums: Iterator[Tensor] = (
        (torch.view_as_real(leaf) if leaf.is_complex() else leaf).sum()
        for leaf in leaves
        if leaf.is_floating_point() or leaf.is_complex()
    )
    first = next(sums, None)
    return output if first is None else sum(sums, first)


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of shape {tuple(value.shape)}, requires_grad={value.requires_grad}"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def name_of(policy: Policy) -> str:
    """Return a policy as it would be written, without what is the default.

    >>> name_of(Reverse(keep_last=2)), name_of((Reverse(), Reverse(), StoreAll()))
    ('Reverse(keep_last=2)', '2 × Reverse(), 1 × StoreAll()')
    """
    if isinstance(policy, Sequence):
        return ", ".join(f"{len(list(run))} × {name}" for name, run in groupby(map(name_of, policy)))
    given = [
        f"{field.name}={_written(getattr(policy, field.name))}"
        for field in dataclasses.fields(policy)
        if getattr(policy, field.name) != field.default
    ]
    if isinstance(policy, MemoryBudget) and policy.bytes is not None:
        given = [in_bytes(policy.bytes)]
    return f"{type(policy).__name__}({', '.join(given)})"


def _written(value: Any) -> str:
    if isinstance(value, tuple):  # operators
        return f"[{', '.join(map(str, value))}]"
    return value.__name__ if hasattr(value, "__name__") else repr(value)


def in_bytes(size: int) -> str:
    """Return a size to read.

    >>> in_bytes(989 * 2**20), in_bytes(3_000_000_000_000)
    ('989.0 MiB', '2.728 TiB')
    """
    if size < 1024:
        return f"{size} B"
    power = 1
    while size >= 1000 * 1024**power and power < 5:  # four digits at the most
        power += 1
    return f"{size / 1024**power:#.4g}".rstrip(".") + f" {'KMGTP'[power - 1]}iB"


def in_flops(number: int) -> str:
    """Return a number of operations to read.

    >>> in_flops(3_020_000_000_000)
    '3.020 TFLOP'
    """
    power = 0
    while number >= 1000 ** (power + 1) and power < 6:
        power += 1
    return f"{number / 1000**power:#.4g}".rstrip(".") + f" {' kMGTPE'[power].strip()}FLOP"
