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
    """A node ``n`` times, its parameters stacked along a leading axis."""

    node: Node
    n: int


@dataclass(frozen=True)
class Parts:
    """A ``Repeat`` in pieces: piece ``i`` takes the next ``prod(shapes[i])`` of the stacked parameters, so shaped."""

    nodes: tuple[Node, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Stored:
    """A node whose backward pass uses what its forward pass saved."""

    node: Node


@dataclass(frozen=True)
class Anchored:
    """A node whose input is kept beside, so that what comes before does not inherit its rounding errors."""

    node: Node


@dataclass(frozen=True)
class Recomputed:
    """A node whose input is kept, and which is run again from there (``jax.checkpoint``)."""

    node: Node


Node = Primitive | Seq | Loop | Parts | Stored | Anchored | Recomputed


@lru_cache(maxsize=4096)
def stores(node: Node) -> bool:
    """Return whether the backward pass of a node, or of one inside it, uses what its forward pass saved."""
    match node:
        case Stored():
            return True
        case Seq(nodes) | Parts(nodes):
            return any(map(stores, nodes))
        case Loop(inner) | Anchored(inner):
            return stores(inner)
        case _:
            return False


@lru_cache(maxsize=4096)
def width(node: Node | Step) -> int:
    """Return how many slots (blocks as written) a node or step takes."""
    match node:
        case Couple() | Bijection() | Anchor():
            return int(node.block)
        case Seq(nodes) | Chain(nodes):
            return sum(map(width, nodes))
        case Parts(nodes):
            return width(nodes[0])
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
    if isinstance(policy, Checkpoint):
        return Seq(tuple(_cut(steps, policy.every, Recomputed)))
    if not isinstance(policy, Reverse):
        return Seq(tuple(map(_plain, _flat(steps))))
    head, tail = list(_flat(steps)), []
    keep, split = policy.keep_last, []
    while keep > 0 and head:
        last = head.pop()
        if isinstance(last, Repeat) and (kept := ceil(keep / size(last.step))) < last.n:
            split = [_pieces(last, policy.anchor_every, Anchored, kept)]
            break
        tail.insert(0, _plain(last))
        keep -= size(last)
    nodes = list(_cut(head, policy.anchor_every, Anchored)) + split
    if nodes and isinstance(nodes[0], Anchored):  # nothing comes before it that would need a fresh start
        nodes[0] = nodes[0].node
    return Seq((*nodes, Stored(Seq(tuple(tail)))) if tail else tuple(nodes))


def size(step: Step) -> int:
    """Return how many primitive steps a step performs."""
    return sum(1 for _ in unroll(step))


def _flat(steps: Iterable[Step]) -> Iterator[Step]:
    for step in steps:
        if isinstance(step, Chain):
            yield from _flat(step.steps)
        else:
            yield step


def _plain(step: Step) -> Node:
    match step:
        case Repeat():
            return Loop(_plain(step.step), step.n)
        case Chain():
            return Seq(tuple(map(_plain, _flat((step,)))))
        case Anchor():
            return Stored(step)
        case _:
            return step


def _cut(steps: Iterable[Step], every: int | None, wrap: Callable[[Node], Node]) -> Iterator[Node]:
    """Yield nodes of at most ``every`` steps, each wrapped; a ``Repeat`` and an ``Anchor`` stand alone."""
    group: list[Node] = []
    for step in _flat(steps):
        if every is None:
            yield _plain(step)
            continue
        alone = isinstance(step, (Repeat, Anchor))
        if group and (alone or len(group) == every):
            yield wrap(_one(group))
            group = []
        if isinstance(step, Repeat):
            yield _pieces(step, every, wrap, 0)
        elif isinstance(step, Anchor):
            yield Stored(step) if wrap is Anchored else wrap(step)
        else:
            group.append(_plain(step))
    if group:
        yield wrap(_one(group))


def _one(nodes: list[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else Seq(tuple(nodes))


def _pieces(step: Repeat, every: int | None, wrap: Callable[[Node], Node], kept: int) -> Node:
    """Return a ``Repeat`` cut after every so many steps, its last ``kept`` iterations stored."""
    body, n = _plain(step.step), step.n - kept
    pieces: list[tuple[Node, tuple[int, ...]]] = []
    if every is None:
        pieces.append((Loop(body, n), (n,)))
    elif every < size(step.step):
        pieces.append((Loop(_one(list(_cut((step.step,), every, wrap))), n), (n,)))
    else:
        k = every // size(step.step)
        whole, rest = divmod(n, k)
        if k == 1:
            pieces.append((Loop(wrap(body), n), (n,)))
        elif whole:
            pieces.append((Loop(wrap(Loop(body, k)), whole), (whole, k)))
        if rest:
            pieces.append((wrap(Loop(body, rest)), (rest,)))
    if kept:
        pieces.append((Stored(Loop(body, kept)), (kept,)))
    if len(pieces) == 1 and len(pieces[0][1]) == 1:
        return pieces[0][0]
    return Parts(tuple(node for node, _ in pieces), tuple(shape for _, shape in pieces))


def written(steps: tuple[Step, ...]) -> tuple[Primitive, ...]:
    """Return the steps that call a block, as written: one for each slot."""
    return tuple(step for step in slots(Chain(steps)) if step.block)
