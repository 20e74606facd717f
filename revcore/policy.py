"""Policies: what the backward pass keeps and what it makes again. A policy never changes a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    Raises:
        SpecError: a field is not such a number.

    >>> Reverse(anchor_every=16)
    Reverse(anchor_every=16, keep_last=0)
    """

    anchor_every: int | None = None
    keep_last: int = 0

    def __post_init__(self) -> None:
        if self.anchor_every is not None:
            check_count("Reverse", "anchor_every", self.anchor_every, 1, " (of steps)")
        check_count("Reverse", "keep_last", self.keep_last, 0, " (of steps)")


@dataclass(frozen=True)
class StoreAll:
    """Keep everything, as an ordinary network does: the fastest, and the yardstick for the others.

    >>> StoreAll()
    StoreAll()
    """


@dataclass(frozen=True)
class Checkpoint:
    """Keep the streams before every ``every`` steps and run those steps again on the way back.

    Activation checkpointing (Chen et al., arXiv 1604.06174): needs no inverse, and memory grows with depth.

    Args:
        every: how many steps are run again at once; at least 1.

    Raises:
        SpecError: ``every`` is not such a number.

    >>> Checkpoint(every=2)
    Checkpoint(every=2)
    """

    every: int = 1

    def __post_init__(self) -> None:
        check_count("Checkpoint", "every", self.every, 1, " (of steps)")


Policy = Reverse | StoreAll | Checkpoint


def check_policy(policy: Any) -> Policy:
    """Return ``policy``, or say what was expected.

    >>> check_policy("reverse")
    Traceback (most recent call last):
    ...
    revcore.SpecError: policy came as 'reverse' (str), expected an instance of Reverse, StoreAll or Checkpoint: \
write policy=revcore.Reverse()
    """
    if isinstance(policy, (Reverse, StoreAll, Checkpoint)):
        return policy
    raise SpecError(
        f"policy came as {policy!r} ({type(policy).__name__}), expected an instance of Reverse, StoreAll or "
        "Checkpoint: write policy=revcore.Reverse()"
    )


@dataclass(frozen=True)
class Segment:
    """Steps ``start … stop − 1`` of an unrolled program, and how their backward pass gets their inputs.

    ``kind`` is ``"reverse"`` (from the outputs), ``"checkpoint"`` (again from the inputs) or ``"store"`` (kept).
    """

    kind: Literal["reverse", "checkpoint", "store"]
    start: int
    stop: int


def segments(invertible: Sequence[bool], policy: Policy) -> tuple[Segment, ...]:
    """Cut steps into the runs that an engine treats alike; ``invertible[i]`` tells whether step ``i`` can be undone.

    >>> [(s.kind, s.start, s.stop) for s in segments([True, True, False, True, True], Reverse(keep_last=1))]
    [('reverse', 0, 2), ('store', 2, 3), ('reverse', 3, 4), ('store', 4, 5)]
    >>> [(s.kind, s.start, s.stop) for s in segments([True] * 5, Checkpoint(every=2))]
    [('checkpoint', 0, 2), ('checkpoint', 2, 4), ('checkpoint', 4, 5)]
    """
    n = len(invertible)
    if isinstance(policy, StoreAll):
        return (Segment("store", 0, n),) if n else ()
    if isinstance(policy, Checkpoint):
        return tuple(Segment("checkpoint", i, min(i + policy.every, n)) for i in range(0, n, policy.every))
    result: list[Segment] = []
    kept_from = n - policy.keep_last
    for i, can_undo in enumerate(invertible):
        kind: Literal["reverse", "store"] = "reverse" if can_undo and i < kept_from else "store"
        last = result[-1] if result else None
        full = last is not None and kind == "reverse" and last.stop - last.start == policy.anchor_every
        if last is not None and last.kind == kind and not full:
            result[-1] = Segment(kind, last.start, i + 1)
        else:
            result.append(Segment(kind, i, i + 1))
    return tuple(result)
