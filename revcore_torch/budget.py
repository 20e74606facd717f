"""``MemoryBudget``: choose for each step whether to keep it or to rebuild it, so that the peak stays within a budget.

Three passes on fake tensors (every step kept, every step rebuilt, every step checkpointed) tell what each step adds to
what is held, what its backward pass takes for a while, and what running it again costs: less from a checkpoint, which
stops where the last tensor is saved. The backward pass comes to a step when everything after it is freed, so the peak
there is

    (what the steps before it hold) + (what it takes for a while)  ≤  budget,

and a dynamic program over the steps finds the cheapest choice. A fourth pass checks that choice; where steps share what
they hold, the estimate is mended by what the check finds. What is returned has kept the budget on fake tensors, which
count byte for byte as real ones do.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revcore.errors import SpecError
from revcore.policy import Checkpoint, MemoryBudget, Reverse, StepPolicy, StoreAll
from revcore.program import Program
from revcore.step import Anchor
from revcore_torch import replay
from revcore_torch.fakes import faking, real_gradients_kept
from revcore_torch.memory import Meter
from revcore_torch.reach import modules_of
from revcore_torch.steps import Arguments
from revcore_torch.tape import run

BYTE_COST = 10
"""A byte written costs as much as so many FLOPs: processors do 10 to 100 while they move one."""
CHECKS = 6
"""How many choices are tried on fake tensors, beyond the three passes that measure."""
CACHED = 64

Assignment = tuple[StepPolicy, ...]


def choose(
    budget: MemoryBudget,
    program: Program,
    blocks: Sequence[Any],
    given: Any,
    arguments: Arguments,
    split: Callable[[Any], Any],
    join: Callable[[Any], Any],
) -> Assignment:
    """Return one policy for each step, at the least recomputation within ``budget``.

    The peak is that of ``join(program(split(given)))`` and its backward pass: all that they allocate, the output (held
    to the end) and the gradient that comes in among it. A choice is kept for the next call of the same kind.

    Raises:
        SpecError: no choice keeps the budget, or the network cannot run on fake tensors; nothing has run then.
    """
    owners = [program, *(b.__self__ if isinstance(b, MethodType) else b for b in blocks)]
    key = tuple(map(id, owners)), _situation(blocks, given, arguments)
    known = _cache.get(key)
    if known is None or any(ref() is not owner for ref, owner in zip(known.owners, owners, strict=True)):
        known = _cache[key] = _Known(tuple(map(weakref.ref, owners)))
        if len(_cache) > CACHED:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    if budget not in known.chosen:
        passes = _Passes(program, tuple(blocks), given, arguments, split, join)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real pass says the same
            known.chosen[budget] = _Search(passes, known.tried).within(budget)
    return known.chosen[budget]


@dataclass
class _Known:
    """What was found for calls of one kind; it keeps no module alive."""

    owners: tuple[weakref.ref[Any], ...]
    tried: dict[tuple[int, ...], Pass] = field(default_factory=dict)
    chosen: dict[MemoryBudget, Assignment] = field(default_factory=dict)


_cache: OrderedDict[Any, _Known] = OrderedDict()


def _situation(blocks: Sequence[Any], given: Any, arguments: Arguments) -> Any:
    """Return all that memory depends on, beside the objects themselves."""
    leaves, spec = pytree.tree_flatten((given, arguments.flat[0]))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    modules = [module for block in blocks for module in modules_of(block)]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None]
    return (
        tuple(_form(leaf) for leaf in leaves),
        str(spec),
        str(arguments.flat[1]),
        tuple((id(module), module.training) for module in modules),
        tuple((*_form(p), p.grad is None) for p in parameters),
        replay.autocast_state(replay.random_devices((*tensors, *parameters))),
    )


def _form(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    try:
        hash(leaf)
    except TypeError:
        return (id(leaf),)
    return (type(leaf), leaf)


# --- passes on fake tensors -------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """A moment of a pass: what lives there, and the most that lived since the mark before."""

    what: str
    unit: int
    live: int
    top: int


class Timeline(Meter):
    """Counts bytes between marks, and what is done."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[Mark] = []
        self._top = 0

    @property
    def work(self) -> int:
        return self.flops + BYTE_COST * self.made

    def mark(self, what: str, unit: int = -1) -> None:
        self.marks.append(Mark(what, unit, self.live, self._top))
        self._top = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._top = max(self._top, self.live)
        return result


class _Marked(nn.Module):
    """A block that marks when it is called and when its gradient arrives."""

    def __init__(self, block: Any, unit: int, timeline: Timeline, repeats: list[int]) -> None:
        super().__init__()
        self.block, self.unit, self.timeline, self.repeats = block, unit, timeline, repeats
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self._run(self.block, args, kwargs)
        if self.calls == 1:
            first = next((t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad), None)
            if first is not None:
                first.register_hook(lambda _: self.timeline.mark("gradient", self.unit))
        return result

    def inverse(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self.block.inverse, args, kwargs)

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        self.timeline.mark("again" if self.calls else "call", self.unit)
        before, self.calls = self.timeline.work, self.calls + 1
        try:
            return function(*args, **kwargs)
        finally:  # a checkpointed run stops in the middle
            if self.calls > 1:
                self.repeats[self.unit] += self.timeline.work - before


class _Incoming(torch.autograd.Function):
    """A loss whose gradient is a new tensor for each output, as a real loss's is."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.forms = [(t.shape, t.dtype, t.device) for t in outputs]
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return tuple(torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.forms)


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass took."""

    peak: int
    marks: tuple[Mark, ...]
    repeats: tuple[int, ...]  # the work of running each unit again
    streams: int  # the bytes of the last streams


@dataclass
class _Passes:
    """Runs the network on fake tensors. A unit is a step that calls a block."""

    program: Program
    blocks: tuple[Any, ...]
    given: Any
    arguments: Arguments
    split: Callable[[Any], Any]
    join: Callable[[Any], Any]
    steps: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = self.program.unrolled

    def units(self) -> list[int]:
        """Return the steps that call a block."""
        return [i for i, step in enumerate(self.steps) if step.block]

    def run(self, assignment: Assignment) -> Pass:
        repeats = [0] * len(self.blocks)
        with faking("MemoryBudget") as fakes:
            leaves, spec = self.arguments.flat
            blocks, given, leaves = fakes.copy((self.blocks, self.given, leaves))
            arguments = Arguments.unflatten(leaves, spec)
            with Timeline() as timeline:
                marked = [_Marked(block, i, timeline, repeats) for i, block in enumerate(blocks)]
                streams, aux = run(self.program, marked, self.split(given), arguments, assignment)
                timeline.mark("end")
                border = sum(t.numel() * t.element_size() for t in streams)
                out = self.join(tuple(streams[i] for i in self.program.output)), aux
                del streams, aux
                wanting = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
                if wanting:
                    loss = _Incoming.apply(*wanting)
                    with real_gradients_kept(loss):
                        loss.backward()
                timeline.mark("done")
                del out, wanting
        return Pass(timeline.peak, tuple(timeline.marks), tuple(repeats), border)


# --- the choice -------------------------------------------------------------------------------------------------------

KEPT: int = 0
REBUILT: int = 1
AGAIN: int = 2
"""What may be done with a unit: kept whole, rebuilt from what follows, run again from its kept input."""

Three = tuple[int, int, int]


@dataclass(frozen=True)
class Model:
    """An estimate of the peak for any choice; threes are by what is done with a unit.

    Attributes:
        holds: what a unit adds to what is held.
        takes: the most that it takes beyond what the units before it hold, in either pass.
        costs: the work of running it again.
        end: what output and incoming gradient take beyond what is held, by what is done with the last unit.
        border: the bytes of all streams, which are held for a run of rebuilt units that others follow.
        start: what lives before the first unit.
        streams: how many there are.
    """

    holds: tuple[Three, ...]
    takes: tuple[Three, ...]
    costs: tuple[Three, ...]
    end: Three
    border: int
    start: int
    streams: int

    def solve(self, limit: float) -> tuple[int, ...] | None:
        """Return the cheapest choice whose estimated peak is within ``limit``; ``None`` if there is none."""
        # a label: (held before the next unit, cost, rebuilt units just before, (choices so far, linked))
        labels: list[tuple[int, int, int, Any]] = [(self.start, 0, 0, None)]
        for holds, takes, costs in zip(self.holds, self.takes, self.costs, strict=True):
            following = []
            for held, spent, length, chosen in labels:
                # a run of rebuilt units ends where another follows; each of its units made one new stream
                before = held + self.border * length // self.streams
                following += [
                    (before + holds[c], spent + costs[c], 0, (c, chosen))
                    for c in (KEPT, AGAIN)
                    if before + takes[c] <= limit
                ]
                if held + takes[REBUILT] <= limit:
                    length = min(length + 1, self.streams)
                    following.append((held, spent + costs[REBUILT], length, (REBUILT, chosen)))
            labels = self._undominated(following, limit)
        ending = [label for label in labels if label[0] + self.end[label[3][0] if label[3] else KEPT] <= limit]
        if not ending:
            return None
        _, _, _, chosen = min(ending, key=lambda label: (label[1], label[0]))
        result = []
        while chosen is not None:
            choice, chosen = chosen
            result.append(choice)
        return tuple(result[::-1])

    def estimate(self, choice: Sequence[int]) -> int:
        """Return the peak that is to be expected of a choice."""
        held, length, top = self.start, 0, 0
        for holds, takes, c in zip(self.holds, self.takes, choice, strict=True):
            if c == REBUILT:
                length = min(length + 1, self.streams)
            else:
                held, length = held + self.border * length // self.streams, 0
            top = max(top, held + takes[c])
            held += holds[c]
        return max(top, held + self.end[choice[-1] if choice else KEPT])

    def _undominated(self, labels: list[Any], limit: float) -> list[Any]:
        """Drop each label that another beats in bytes and in cost, and thin them out where they are very many."""
        kept = []
        for length in range(self.streams + 1):
            cheapest, bucket = math.inf, -1
            for label in sorted((label for label in labels if label[2] == length), key=lambda label: label[:2]):
                if label[1] < cheapest:
                    place = int(512 * label[0] / limit)
                    if place == bucket and len(labels) > 2048:
                        kept.pop()
                    kept.append(label)
                    cheapest, bucket = label[1], place
        return kept

    def cost(self, choice: Sequence[int]) -> int:
        return sum(costs[c] for costs, c in zip(self.costs, choice, strict=True))


class _Search:
    def __init__(self, passes: _Passes, tried: dict[tuple[int, ...], Pass]) -> None:
        self.passes, self.tried = passes, tried
        self.units = passes.units()

    def within(self, budget: MemoryBudget) -> Assignment:
        """Return the cheapest choice found that keeps the budget."""
        all_kept, all_rebuilt, all_again = ((c,) * len(self.units) for c in (KEPT, REBUILT, AGAIN))
        most = self.peak(all_kept)
        size = int(budget.fraction * most) if budget.bytes is None and budget.fraction else budget.bytes or 0
        if most <= size:
            return self.assignment(all_kept)
        for choice in (all_rebuilt, all_again):
            self.peak(choice)
        model = self.model(self.tried[all_kept], self.tried[all_rebuilt], self.tried[all_again])
        self.refine(model, size)
        self.keep_last(model, size)
        fitting = [choice for choice, taken in self.tried.items() if taken.peak <= size]
        if not fitting:
            # The same whatever the budget, so that a budget of the least finds it again.
            least = self.least(model, (all_kept, all_rebuilt, all_again))
            if self.peak(least) > size:
                raise SpecError(
                    f"MemoryBudget: the budget is {size:,} bytes, but the least that this network takes on this input "
                    f"is {self.peak(least):,}: write MemoryBudget(bytes={self.peak(least)}), or use a smaller batch"
                    + (f" (keeping everything takes {most:,})" if budget.bytes is not None else "")
                )
            fitting = [least]
        return self.assignment(min(fitting, key=model.cost))

    def refine(self, model: Model, size: int) -> None:
        """Try choices, moving the estimate's limit by what it is wrong, until little room is left."""
        limit, under, over, checks = float(size), None, None, 0
        for _ in range(4 * CHECKS):
            choice = model.solve(limit)
            checks += choice is not None and choice not in self.tried
            if checks > CHECKS or limit > 2 * size:
                return
            room = size // 50 if choice is None else size - self.peak(choice)
            if choice is None or room >= 0:
                under = limit
            else:
                over = min(limit, model.estimate(choice))
            if under is None or over is None:
                limit = over + room if over is not None else limit + max(room, size // 200, 1)
            elif over - under < size / 500:
                return
            else:
                limit = (under + over) / 2

    def keep_last(self, model: Model, size: int) -> None:
        """Try to keep the last units alone, where that promises to be cheaper than what was found."""
        number = len(self.units)
        last = [(REBUILT,) * (number - k) + (KEPT,) * k for k in range(number + 1)]
        k = max((k for k in range(number) if model.estimate(last[k]) <= size), default=0)
        for _ in range(3):
            costs = [model.cost(choice) for choice, taken in self.tried.items() if taken.peak <= size]
            if not 0 < k < number or model.cost(last[k]) >= min(costs, default=math.inf):
                return
            k += 1 if self.peak(last[k]) <= size else -1

    def least(self, model: Model, known: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
        """Return the choice of the lowest peak that there is to find."""
        low, high = 0.0, 2.0 * max(self.peak(choice) for choice in known) + 1
        while high - low > 1e-4 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if model.solve(middle) is not None else (middle, high)
        found = model.solve(high)
        return min((*known, *([] if found is None else [found])), key=self.peak)

    def peak(self, choice: tuple[int, ...]) -> int:
        if choice not in self.tried:
            self.tried[choice] = self.passes.run(self.assignment(choice))
        return self.tried[choice].peak

    def assignment(self, choice: tuple[int, ...]) -> Assignment:
        """Return a policy for each step; one without a block goes with the step before it."""
        result: list[StepPolicy] = []
        by_step = dict(zip(self.units, choice, strict=True))
        last = choice[0] if choice else KEPT
        for i, step in enumerate(self.passes.steps):
            last = by_step.get(i, last)
            if last == REBUILT and isinstance(step, Anchor) and step.block:  # it has no inverse
                result.append(Checkpoint())
            else:
                result.append((StoreAll(), Reverse(), Checkpoint())[last])
        return tuple(result)

    def model(self, kept: Pass, rebuilt: Pass, again: Pass) -> Model:
        """Return the estimate that three passes lead to: in each, one thing is done with all units."""
        number = len(self.units)
        border = kept.streams
        kept_at, rebuilt_at, again_at = (_Moments(each, number) for each in (kept, rebuilt, again))
        start = kept_at.held[0]
        holds = tuple((kept_at.holds(i), 0, again_at.holds(i)) for i in range(number))
        costs = tuple((0, rebuilt.repeats[i], again.repeats[i]) for i in range(number))
        # what the runs before hold in the second pass
        held, earlier = [], 0
        for place, unit in enumerate(self.units):
            if place and isinstance(self.passes.steps[unit], Anchor) != isinstance(
                self.passes.steps[self.units[place - 1]], Anchor
            ):
                earlier += border
            held.append(earlier)
        takes = tuple(
            (
                kept_at.takes(i),
                max(rebuilt_at.forward[i], rebuilt_at.backward[i]) - held[i] - start,
                again_at.takes(i),
            )
            for i in range(number)
        )
        end = (
            kept_at.end - kept_at.held[-1],
            rebuilt_at.end - (held[-1] if held else 0) - start,
            again_at.end - again_at.held[-1],
        )
        return Model(holds, takes, costs, end, border, start, self.passes.program.num_streams)


class _Moments:
    """What lived in a pass by unit: held before each and after the last, the tops of both passes, the top between."""

    def __init__(self, taken: Pass, number: int) -> None:
        self.forward, self.backward = [0] * number, [0] * number
        self.held: list[int] = []
        self.end = 0
        what, unit = "", -1
        for mark in taken.marks:
            if what == "call":
                self.forward[unit] = max(self.forward[unit], mark.top)
            elif what in ("gradient", "again"):
                self.backward[unit] = max(self.backward[unit], mark.top)
            elif what == "end":
                self.end = mark.top
            if mark.what in ("call", "end"):
                self.held.append(mark.live)
            what, unit = mark.what, mark.unit

    def holds(self, i: int) -> int:
        return self.held[i + 1] - self.held[i]

    def takes(self, i: int) -> int:
        return max(self.forward[i], self.backward[i]) - self.held[i]
