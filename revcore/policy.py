"""Policies: what the backward pass keeps and what it makes again. A policy never changes a value.

A policy for a whole program is one of :class:`Reverse`, :class:`StoreAll`, :class:`Checkpoint`, a sequence of them with
one for each step, or a :class:`MemoryBudget`, which an engine turns into such a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from revcore.errors import SpecError, check_count


@dataclass(frozen=True)
class Reverse:
    """Keep the last streams; rebuild every step's input from its output on the way back.

    Memory after the forward pass: one copy of the streams, at any depth. Work: one more evaluation of each
    block (4 forward passes' worth of a training step instead of 3).

    Args:
        anchor_every: also keep the streams after every so many steps, so that rounding errors of the inverse
            stop there; ``None`` keeps none in between.
        keep_last: run the last so many steps as an ordinary network: they are not evaluated again, and what
            they saved is the first to be freed.
        recompute: which operations inside a block are kept, and so are not run again: the framework's own selective
            policy (in torch, what ``torch.utils.checkpoint.create_selective_checkpoint_contexts`` takes: a list of
            operators to keep, or a function). ``None`` keeps none.
        offload: keep what is kept in the host's memory.

    Raises:
        SpecError: a field is not such a value.

    >>> Reverse(anchor_every=16).keep_last
    0
    """

    anchor_every: int | None = None
    keep_last: int = 0
    recompute: Callable[..., Any] | Sequence[Any] | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.anchor_every is not None:
            check_count("Reverse", "anchor_every", self.anchor_every, 1, " (of steps)")
        check_count("Reverse", "keep_last", self.keep_last, 0, " (of steps)")
        _check_selection(self)


@dataclass(frozen=True)
class StoreAll:
    """Keep everything, as an ordinary network does: the fastest, and the yardstick for the others.

    Args:
        offload: keep it in the host's memory.

    >>> StoreAll()
    StoreAll(offload=False)
    """

    offload: bool = False

    def __post_init__(self) -> None:
        _check_flag(self)


@dataclass(frozen=True)
class Checkpoint:
    """Keep the streams before every ``every`` steps and run those steps again on the way back.

    Activation checkpointing (Chen et al., arXiv 1604.06174): needs no inverse, and memory grows with depth.

    Args:
        every: how many steps are run again at once; at least 1.
        recompute: which operations are kept nevertheless, as for :class:`Reverse`.
        offload: keep what is kept in the host's memory.

    Raises:
        SpecError: a field is not such a value.

    >>> Checkpoint(every=2).every
    2
    """

    every: int = 1
    recompute: Callable[..., Any] | Sequence[Any] | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        check_count("Checkpoint", "every", self.every, 1, " (of steps)")
        _check_selection(self)


@dataclass(frozen=True)
class MemoryBudget:
    """Choose for each step whether to keep it or to make it again: the peak stays within a budget, at the least work.

    The peak is that of one forward and backward pass through the network: all the bytes of tensors that live at once,
    over what lived before the call. The output, held to the end, and the gradient that comes in count among them, and
    so do parameter gradients where ``p.grad`` is ``None``, for then the pass makes them. What an allocator or a
    kernel takes beyond tensors does not: leave it some room.

    With ``held(i)`` for what step ``i`` keeps, if it is kept, and ``takes(j)`` for what step ``j`` needs for a while on
    the way back, the choice satisfies ``Σ_{i<j} held(i) + takes(j) ≤ budget`` for every ``j``, and makes the sum of the
    repeated steps' work as small as these estimates allow; it is checked before it is used. The first call of each kind
    (shapes, dtypes, gradients there or not) plans it on fake tensors, which takes seconds for a deep network; the
    choice holds for all calls alike. PyTorch only.

    Args:
        bytes: the budget in bytes.
        fraction: the budget as a share of the peak under :class:`StoreAll`, more than 0 and at most 1. One of the two.

    Raises:
        SpecError: none or both are given, or out of range; on a call, before anything has run, a budget that no policy
            can keep, with the least that one could.

    >>> MemoryBudget(fraction=0.5)
    MemoryBudget(bytes=None, fraction=0.5)
    """

    bytes: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.fraction is None):
            raise SpecError(
                f"MemoryBudget came with bytes={self.bytes!r}, fraction={self.fraction!r}, expected one of the two: "
                "write MemoryBudget(bytes=8 * 2**30) or MemoryBudget(fraction=0.3)"
            )
        if self.bytes is not None:
            check_count("MemoryBudget", "bytes", self.bytes, 1)
        elif not isinstance(self.fraction, (int, float)) or not 0 < self.fraction <= 1:
            raise SpecError(
                f"MemoryBudget: fraction came as {self.fraction!r}, expected a number more than 0 and at most 1 (of "
                "the peak under StoreAll)"
            )


StepPolicy = Reverse | StoreAll | Checkpoint
Policy = StepPolicy | Sequence[StepPolicy] | MemoryBudget


def _check_flag(policy: StepPolicy) -> None:
    if not isinstance(policy.offload, bool):
        raise SpecError(f"{type(policy).__name__}: offload came as {policy.offload!r}, expected True or False")


def _check_selection(policy: Reverse | Checkpoint) -> None:
    _check_flag(policy)
    recompute = policy.recompute
    if isinstance(recompute, list):  # a policy is a value: it can be compared, and used as a key
        object.__setattr__(policy, "recompute", tuple(recompute))
    elif not (recompute is None or callable(recompute) or isinstance(recompute, tuple)):
        raise SpecError(
            f"{type(policy).__name__}: recompute came as {recompute!r} ({type(recompute).__name__}), expected a list "
            "of operators to keep, or a function that says so of each"
        )


def check_policy(policy: Any) -> Policy:
    """Return ``policy``, a sequence of one for each step as a tuple, or say what was expected.

    >>> check_policy("reverse")
    Traceback (most recent call last):
    ...
    revcore.SpecError: policy came as 'reverse' (str), expected an instance of Reverse, StoreAll, Checkpoint or \
MemoryBudget, or a sequence of the first three: write policy=revcore.Reverse()
    """
    if isinstance(policy, (Reverse, StoreAll, Checkpoint, MemoryBudget)):
        return policy
    if isinstance(policy, (list, tuple)):
        for i, each in enumerate(policy):
            if not isinstance(each, (Reverse, StoreAll, Checkpoint)):
                raise SpecError(
                    f"policy {i} came as {each!r} ({type(each).__name__}), expected an instance of Reverse, StoreAll "
                    "or Checkpoint for each step"
                )
        return tuple(policy)
    raise SpecError(
        f"policy came as {policy!r} ({type(policy).__name__}), expected an instance of Reverse, StoreAll, Checkpoint "
        "or MemoryBudget, or a sequence of the first three: write policy=revcore.Reverse()"
    )


@dataclass(frozen=True)
class Segment:
    """Steps ``start … stop − 1`` of an unrolled program, and how their backward pass gets their inputs.

    ``kind`` is ``"reverse"`` (from the outputs), ``"checkpoint"`` (again from the inputs) or ``"store"`` (kept);
    ``recompute`` and ``offload`` are those of the policy it comes from.
    """

    kind: Literal["reverse", "checkpoint", "store"]
    start: int
    stop: int
    recompute: Callable[..., Any] | Sequence[Any] | None = None
    offload: bool = False


def segments(invertible: Sequence[bool], policy: StepPolicy | Sequence[StepPolicy]) -> tuple[Segment, ...]:
    """Cut steps into the runs that an engine treats alike; ``invertible[i]`` tells whether step ``i`` can be undone.

    Neighbours with an equal policy are cut as one program would be: ``keep_last`` means the last of such a run.

    Raises:
        SpecError: a sequence of policies that are not one for each step.

    >>> [(s.kind, s.start, s.stop) for s in segments([True, True, False, True, True], Reverse(keep_last=1))]
    [('reverse', 0, 2), ('store', 2, 3), ('reverse', 3, 4), ('store', 4, 5)]
    >>> [(s.kind, s.start, s.stop) for s in segments([True] * 5, Checkpoint(every=2))]
    [('checkpoint', 0, 2), ('checkpoint', 2, 4), ('checkpoint', 4, 5)]
    >>> [(s.kind, s.start, s.stop) for s in segments([True] * 4, [Reverse(), Reverse(), StoreAll(), Checkpoint()])]
    [('reverse', 0, 2), ('store', 2, 3), ('checkpoint', 3, 4)]
    """
    n = len(invertible)
    if not isinstance(policy, Sequence):
        return tuple(_cut(invertible, 0, n, policy))
    if len(policy) != n:
        raise SpecError(f"policy came with {len(policy)} entries, expected one for each of the {n} steps")
    result: list[Segment] = []
    for each, run in groupby(range(n), policy.__getitem__):
        places = list(run)
        result += _cut(invertible, places[0], places[-1] + 1, each)
    return tuple(result)


def _cut(invertible: Sequence[bool], start: int, stop: int, policy: StepPolicy) -> list[Segment]:
    if isinstance(policy, StoreAll):
        return [Segment("store", start, stop, None, policy.offload)] if stop > start else []
    selection = policy.recompute, policy.offload
    if isinstance(policy, Checkpoint):
        return [
            Segment("checkpoint", i, min(i + policy.every, stop), *selection) for i in range(start, stop, policy.every)
        ]
    result: list[Segment] = []
    kept_from = stop - policy.keep_last
    for i in range(start, stop):
        last = result[-1] if result else None
        if invertible[i] and i < kept_from:
            if last is not None and last.kind == "reverse" and last.stop - last.start != policy.anchor_every:
                result[-1] = Segment("reverse", last.start, i + 1, *selection)
            else:
                result.append(Segment("reverse", i, i + 1, *selection))
        elif last is not None and last.kind == "store":
            result[-1] = Segment("store", last.start, i + 1, None, policy.offload)
        else:
            result.append(Segment("store", i, i + 1, None, policy.offload))
    return result
