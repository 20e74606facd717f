"""One step of a program with its block: evaluate, merge, undo. What both a first and a second run are made of."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revcore.checks import check_block_output, check_coupled, check_stream_outputs
from revcore.errors import InversionError, SpecError
from revcore.program import Program
from revcore.step import Bijection, Couple, Primitive
from revcore_torch.watch import Watch, is_known

Streams = tuple[Tensor, ...]


class Call:
    """One step of a program with the block it calls."""

    __slots__ = ("block", "index", "number", "step", "watch")

    def __init__(self, index: int, step: Primitive, block: Any, number: int | None, watch: Watch | None = None) -> None:
        self.index, self.step, self.block, self.number, self.watch = index, step, block, number, watch

    def evaluate(self, streams: Sequence[Tensor], arguments: Arguments) -> tuple[Any, tuple[Any, ...]]:
        """Return what the block makes of the streams (``f``, or all streams anew), and its auxiliary outputs."""
        step, (args, kwargs) = self.step, arguments.of(self)
        if not isinstance(step, Couple):
            out = self.block(*streams, *args, **kwargs) if step.block else step.forward(*streams)  # type: ignore[union-attr, misc]
            after, aux = check_stream_outputs(self.index, type(step).__name__, out, len(streams))
            return (self.watch.encode(after, f"step {self.index}") if self.watch and step.block else after), aux
        gathered = step.gather(streams)
        if self.number is None:
            return gathered[0], ()
        versions = [version(t) for t in gathered]
        f, aux = step.split(self.block(*gathered, *args, **kwargs), gathered)
        if [version(t) for t in gathered] != versions:
            raise SpecError(
                f"block of step {self.index} changed its input in place, which is a stream that others still need: "
                "use the form that is not in place (nn.ReLU() for nn.ReLU(inplace=True)), or clone the input first"
            )
        check_block_output(self.number, f, streams[step.target], is_tensor, "tensor")
        return f, aux

    def first(self, streams: Sequence[Tensor], f: Any) -> tuple[Streams, tuple[Tensor, ...]]:
        """Return the streams after the step, and what the coupling needs to undo it; ``f`` is :meth:`evaluate`'s."""
        if not isinstance(self.step, Couple):
            return f, ()
        target = self.step.target
        y, carry = self.step.coupling.advance(streams[target], f)
        check_coupled(self.index, y, streams[target])
        if self.watch is not None:
            self.watch.note(f"step {self.index}", y)
        return (*streams[:target], y, *streams[target + 1 :]), carry

    def merge(self, streams: Sequence[Tensor], f: Any) -> Streams:
        """Return the streams after the step, for the second time."""
        if not isinstance(self.step, Couple):
            return f
        target = self.step.target
        y = self.step.coupling.forward(streams[target], f)
        check_coupled(self.index, y, streams[target])
        return (*streams[:target], y, *streams[target + 1 :])

    def undo(
        self, streams: Sequence[Tensor], f: Any, arguments: Arguments, carry: tuple[Tensor, ...] | None = None
    ) -> Streams:
        """Return the streams before the step; ``f`` is not used where the step calls no coupling.

        ``carry`` is what :meth:`first` returned, ``None`` where nobody knows it.
        """
        step, (args, kwargs) = self.step, arguments.of(self)
        if isinstance(step, Couple):
            y = streams[step.target]
            x, wrong = (step.coupling.inverse(y, f), None) if carry is None else step.coupling.restore(y, f, carry)
            if wrong is not None and is_known(wrong) and wrong:
                raise InversionError(
                    f"step {self.index}: the stream that was rebuilt is not the one that was there, bit for bit, so its "
                    "block returned something else the second time, by more than guard bits make good: write "
                    "program.exact(guard=1) (or 2, or 4), make the block deterministic (torch.use_deterministic_"
                    "algorithms), or use policy=Checkpoint()"
                )
            return (*streams[: step.target], x, *streams[step.target + 1 :])
        assert isinstance(step, Bijection)
        out = self.block.inverse(*streams, *args, **kwargs) if step.block else step.inverse(*streams)  # type: ignore[misc]
        return check_stream_outputs(self.index, "Bijection.inverse", out, len(streams))[0]


class Arguments:
    """What blocks get after their sources: some common to all, some for one block each."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], layerwise: Sequence[Any] | None) -> None:
        self.args, self.kwargs, self.layerwise = args, kwargs, layerwise

    @functools.cached_property
    def flat(self) -> tuple[list[Any], Any]:
        """The leaves, and what :meth:`unflatten` makes the arguments of again."""
        return pytree.tree_flatten((self.args, self.kwargs, self.layerwise))

    @staticmethod
    def unflatten(leaves: list[Any], spec: Any) -> Arguments:
        return Arguments(*pytree.tree_unflatten(leaves, spec))

    def contents(self) -> tuple[list[Any], Any]:
        """Return all that a block could change by other means than in place, for :func:`check_contents`."""
        given = [*self.args, *self.kwargs.values()]
        for args, kwargs in self.layerwise or ():
            given += [*args, *kwargs.values()]
        given = [value for value in given if not isinstance(value, _CONSTANTS)]
        if not given:
            return [], None
        leaves, spec = pytree.tree_flatten(given)
        return leaves + [tensor for leaf in leaves for tensor in tensors_within(leaf)], spec

    def of(self, call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the block of a step gets; ``call`` is what has its ``number``."""
        if self.layerwise is None or call.number is None:
            return self.args, self.kwargs
        args, kwargs = self.layerwise[call.number]
        return (*self.args, *args), {**self.kwargs, **kwargs}


_CONSTANTS = (Tensor, nn.Module, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def tensors_within(value: Any, depth: int = 2) -> Iterator[Tensor]:
    """Yield the tensors that an object holds in its attributes, such as a key-value cache."""
    if depth and not isinstance(value, _CONSTANTS) and not callable(value):
        for leaf in pytree.tree_leaves(getattr(value, "__dict__", {})):
            if isinstance(leaf, Tensor):
                yield leaf
            else:
                yield from tensors_within(leaf, depth - 1)


def check_contents(before: tuple[list[Any], Any], now: tuple[list[Any], Any]) -> None:
    """T15: refuse a forward pass in which a block put something into one of its arguments, or took something out."""
    if before[1] != now[1] or [*map(id, before[0])] != [*map(id, now[0])]:
        raise SpecError(
            "a block changed what an argument holds (a list, a dict, or an object with tensors), so it would meet "
            "another argument when it runs again: return the new value as an extra output, fill a cache before, or "
            "use policy=StoreAll()"
        )


def make_calls(program: Program, blocks: Sequence[Any]) -> list[Call]:
    """Give each step its block, in running order."""
    numbers = iter(range(len(blocks)))
    watch = Watch(program.lattice) if program.lattice is not None else None
    calls = []
    for index, step in enumerate(program.unrolled):
        number = next(numbers) if step.block else None
        calls.append(Call(index, step, None if number is None else blocks[number], number, watch))
    return calls


def run_plain(calls: Sequence[Call], streams: Streams, arguments: Arguments) -> tuple[Streams, list[tuple[Any, ...]]]:
    aux = []
    for call in calls:
        f, extra = call.evaluate(streams, arguments)
        streams, _ = call.first(streams, f)
        if call.step.block:
            aux.append(extra)
    return streams, aux


def version(tensor: Tensor) -> int:
    """Return how often ``tensor`` was changed in place; 0 where nobody counts (inference mode)."""
    return 0 if tensor.is_inference() else tensor._version


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
