"""From what a program says and a policy wants to what the JAX engine runs: a tree of nodes, framework-free.

The leaves are the specification's ``Couple``, ``Bijection`` and ``Anchor``. A ``Repeat`` stays one loop (a scan), so
places inside it fall between whole iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

from revcore.policy import Checkpoint, Reverse, StepPolicy
from revcore.step import Anchor, Bijection, Chain, Couple, Primitive, Repeat, Step, slots, unroll


@dataclass(frozen=True)
class Seq:
    """Nodes one after the other."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Loop:
    """A node ``n`` times, with the first ``n`` of the stacked parameters; inputs ``every``, ``2·every``, … are kept."""

    node: Node
    n: int
    every: int | None = None


@dataclass(frozen=True)
class Split:
    """A ``Repeat`` whose last iterations differ: ``head`` reads its parameters out of the whole stack, uncopied."""

    head: Node
    tail: Node
    n: int


@dataclass(frozen=True)
class Parts:
    """A ``Repeat`` in pieces: piece ``i`` gets a copy of the next ``prod(shapes[i])`` parameters, so shaped."""

    nodes: tuple[Node, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Stored:
    """A node whose backward pass uses what its forward pass saved."""

    node: Node


@dataclass(frozen=True)
class Selected:
    """A step whose block is evaluated again but for the operations that ``recompute`` wants kept."""

    node: Primitive
    recompute: Any  # a policy, or what it said of each operation


@dataclass(frozen=True)
class Offloaded:
    """A node that keeps what it keeps in the host's memory."""

    node: Node


@dataclass(frozen=True)
class Anchored:
    """A node whose input is kept beside, so that what comes before does not inherit its rounding errors."""

    node: Node


@dataclass(frozen=True)
class Recomputed:
    """A node whose input is kept, and which is run again from there (``jax.checkpoint``)."""

    node: Node
    recompute: Callable[..., Any] | None = None
    offload: bool = False


Node = Primitive | Seq | Loop | Split | Parts | Stored | Selected | Offloaded | Anchored | Recomputed


@lru_cache(maxsize=4096)
def stores(node: Node) -> bool:
    """Return whether the backward pass of a node, or of one inside it, uses what its forward pass saved."""
    match node:
        case Stored():
            return True
        case Seq(nodes) | Parts(nodes):
            return any(map(stores, nodes))
        case Split(head):
            return stores(head)
        case Loop(inner) | Anchored(inner) | Offloaded(inner):
            return stores(inner)
        case _:
            return False


def width(node: Node | Step) -> int:
    """Return how many slots (blocks as written) a node or step takes."""
    match node:
        case Couple() | Bijection() | Anchor():
            return int(node.block)
        case Seq(nodes) | Chain(nodes):
            return sum(map(width, nodes))
        case Parts(nodes):
            return width(nodes[0])
        case Split(head):
            return width(head)
        case Repeat(step):
            return width(step)
        case _:
            return width(node.node)


def children(nodes: Iterable[Any]) -> Iterator[tuple[Any, slice]]:
    """Yield each node or step with its place among the slots."""
    start = 0
    for node in nodes:
        stop = start + width(node)
        yield node, slice(start, stop)
        start = stop


@lru_cache(maxsize=256)
def make_plan(steps: tuple[Step, ...], policy: StepPolicy) -> Node:
    """Return the node that runs ``steps`` under ``policy``.

    >>> from revcore import revnet
    >>> [type(n).__name__ for n in make_plan(revnet(4).steps, Reverse(anchor_every=2, keep_last=1)).nodes]
    ['Seq', 'Anchored', 'Stored']
    """
    how = _Planner(policy)
    if not isinstance(policy, Reverse):
        every = policy.every if isinstance(policy, Checkpoint) else None
        return Seq(tuple(how.cut(steps, every)))
    head, tail = list(flat(steps)), []
    keep, split = policy.keep_last, []
    while keep > 0 and head:
        last = head.pop()
        if isinstance(last, Repeat) and (kept := ceil(keep / size(last.step))) < last.n:
            split = [how.loop(last, policy.anchor_every, kept)]
            break
        tail.insert(0, _plain(last))
        keep -= size(last)
    nodes = list(how.cut(head, policy.anchor_every)) + split
    if nodes:
        nodes[0] = _unanchored(nodes[0])
    return Seq((*nodes, how.kept(Stored(Seq(tuple(tail))))) if tail else tuple(nodes))


def size(step: Step) -> int:
    """Return how many primitive steps a step performs."""
    return sum(1 for _ in unroll(step))


def flat(steps: Iterable[Step]) -> Iterator[Step]:
    for step in steps:
        if isinstance(step, Chain):
            yield from flat(step.steps)
        elif next(unroll(step), None):  # a Repeat of nothing has no iterations to cut between
            yield step


def _plain(step: Step) -> Node:
    """Return a step as an ordinary network runs it."""
    match step:
        case Repeat():
            return Loop(_plain(step.step), step.n)
        case Chain():
            return Seq(tuple(map(_plain, flat((step,)))))
        case _:
            return step


def _one(nodes: list[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else Seq(tuple(nodes))


def _unanchored(node: Node) -> Node:
    """Return a program's first node without an anchor: nothing comes before it that would need a fresh start."""
    match node:
        case Anchored(inner) | Offloaded(Anchored(inner)):
            return inner
        case Split(head, tail, n):
            return Split(_unanchored(head), tail, n)
        case _:
            return node


@dataclass(frozen=True)
class _Planner:
    """How steps become nodes under one policy."""

    policy: StepPolicy

    def kept(self, node: Node) -> Node:
        return Offloaded(node) if self.policy.offload else node

    def wrapped(self, node: Node) -> Node:
        """Return a group of steps as the policy has it that cuts them."""
        if isinstance(self.policy, Checkpoint):
            return Recomputed(node, self.policy.recompute, self.policy.offload)  # type: ignore[arg-type]
        return self.kept(Anchored(node))

    def inner(self, step: Step) -> Node:
        """Return a step as it stands inside a group."""
        if not isinstance(self.policy, Reverse):
            return _plain(step)
        match step:
            case Repeat():
                return Loop(self.inner(step.step), step.n)
            case Chain():
                return Seq(tuple(map(self.inner, flat((step,)))))
            case Anchor():
                return self.kept(Stored(step))
            case _ if step.block and self.policy.recompute:
                return self.kept(Selected(step, self.policy.recompute))  # type: ignore[arg-type]
            case _:
                return step

    def cut(self, steps: Iterable[Step], every: int | None) -> Iterator[Node]:
        """Yield nodes of at most ``every`` steps, each wrapped; a ``Repeat`` and an ``Anchor`` stand alone."""
        group: list[Node] = []
        for step in flat(steps):
            if every is None:
                yield self.inner(step)
                continue
            alone = isinstance(step, (Repeat, Anchor))
            if group and (alone or len(group) == every):
                yield self.wrapped(_one(group))
                group = []
            if isinstance(step, Repeat):
                yield self.loop(step, every, 0)
            elif isinstance(step, Anchor):
                yield self.inner(step) if isinstance(self.policy, Reverse) else self.wrapped(step)
            else:
                group.append(self.inner(step))
        if group:
            yield self.wrapped(_one(group))

    def loop(self, step: Repeat, every: int | None, kept: int) -> Node:
        """Return a ``Repeat`` cut after every so many steps, its last ``kept`` iterations stored."""
        if isinstance(self.policy, Checkpoint) or self.policy.offload:
            return self._pieces(step, every, kept)
        body, n = self.inner(step.step), step.n - kept
        head: Node = Loop(body, n)
        if every is not None and every < size(step.step):
            head = Loop(_one(list(self.cut((step.step,), every))), n)
        elif every is not None:
            k = every // size(step.step)
            head = Anchored(Loop(body, n, k if k < n else None))
        return Split(head, Stored(Loop(_plain(step.step), kept)), n) if kept else head

    def _pieces(self, step: Repeat, every: int | None, kept: int) -> Node:
        # What goes to the host, or through jax.checkpoint, must leave a loop as its output: groups of iterations are
        # loops of their own then, and get copies of their parameters.
        body, n = self.inner(step.step), step.n - kept
        pieces: list[tuple[Node, tuple[int, ...]]] = []
        if every is None:
            pieces.append((Loop(body, n), (n,)))
        elif every < size(step.step):
            pieces.append((Loop(_one(list(self.cut((step.step,), every))), n), (n,)))
        else:
            k = every // size(step.step)
            whole, rest = divmod(n, k)
            if k == 1:
                pieces.append((Loop(self.wrapped(body), n), (n,)))
            elif whole:
                pieces.append((Loop(self.wrapped(Loop(body, k)), whole), (whole, k)))
            if rest:
                pieces.append((self.wrapped(Loop(body, rest)), (rest,)))
        if kept:
            pieces.append((self.kept(Stored(Loop(_plain(step.step), kept))), (kept,)))
        if len(pieces) == 1 and len(pieces[0][1]) == 1:
            return pieces[0][0]
        return Parts(tuple(node for node, _ in pieces), tuple(shape for _, shape in pieces))


def written(steps: tuple[Step, ...]) -> tuple[Primitive, ...]:
    """Return the steps that call a block, as written: one for each slot."""
    return tuple(step for step in slots(Chain(steps)) if step.block)


Lengths = tuple[int, ...]  # of the Repeats around a slot, the outermost first


def lengths(step: Step, around: Lengths = ()) -> list[Lengths]:
    """Return the lengths of the ``Repeat``s around each slot of ``step``.

    >>> from revcore import Couple
    >>> lengths(Chain([Couple(0, 1), Repeat(Chain([Couple(0, 1), Repeat(Couple(1, 0), 3)]), 2)]))
    [(), (2,), (2, 3)]
    """
    match step:
        case Chain(steps):
            return [found for child in steps for found in lengths(child, around)]
        case Repeat(body, n):
            return lengths(body, (*around, n))
        case _:
            return [around] * step.block
