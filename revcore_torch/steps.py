"""One step of a program with its block: evaluate, merge, undo. What both a first and a second run are made of."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from revcore.checks import (
    check_block_output,
    check_coupled,
    check_held,
    check_input_dtypes,
    check_stream_dtype,
    check_stream_outputs,
)
from revcore.errors import InversionError, SpecError
from revcore.program import Program
from revcore.step import Anchor, Bijection, Couple, Primitive, SpaceToDepth
from revcore_torch.watch import Watch, is_known

Streams = tuple[Tensor, ...]
Dtypes = tuple[torch.dtype, torch.dtype]  # of the streams that came in, and of those that are held


# Bijections of two functions (weakly held) of which one was seen to return as many streams as it got.
_seen_forward: weakref.WeakSet[Bijection] = weakref.WeakSet()
_seen_inverse: weakref.WeakSet[Bijection] = weakref.WeakSet()


class Call:
    """One step of a program with the block it calls."""

    __slots__ = ("block", "index", "number", "step", "watch")

    def __init__(self, index: int, step: Primitive, block: Any, number: int | None, watch: Watch | None = None) -> None:
        self.index, self.step, self.block, self.number, self.watch = index, step, block, number, watch

    def evaluate(self, streams: Sequence[Tensor], arguments: Arguments) -> tuple[Any, tuple[Any, ...]]:
        """Return what the block makes of the streams (``f``, or all streams anew), and its auxiliary outputs."""
        step, (args, kwargs) = self.step, arguments.of(self)
        if not isinstance(step, Couple):
            given = arguments.seen(streams) if isinstance(step, Anchor) else streams
            out = self.block(*given, *args, **kwargs) if step.block else step.forward(*streams)  # type: ignore[union-attr, misc]
            after, aux = check_stream_outputs(self.index, step, out, len(streams))
            _note(_seen_forward, step)
            after = arguments.held(after, f"step {self.index} ({type(step).__name__})")
            return (self.watch.encode(after, f"step {self.index}") if self.watch and step.block else after), aux
        gathered = step.gather(streams)
        if self.number is None:
            return gathered[0], ()
        given = arguments.seen(gathered)
        versions = [version(t) for t in given]
        f, aux = step.split(self.block(*given, *args, **kwargs), gathered)
        if [version(t) for t in given] != versions:
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
        given = (streams[target], *(f if isinstance(f, tuple) else (f,)))
        versions = [version(t) for t in given]
        y, carry = self.step.coupling.advance(streams[target], f)
        if [version(t) for t in given] != versions:
            raise SpecError(
                f"step {self.index}: the coupling {type(self.step.coupling).__name__} changed its stream or f in "
                "place, which are still needed: use the form that is not in place (x + f for x.add_(f))"
            )
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
                    f"step {self.index}: the stream that was rebuilt is not the one that was there, bit for bit, so "
                    "its block returned something else the second time, by more than guard bits make good: write "
                    "program.exact(guard=1) (or 2, or 4), make the block deterministic (torch.use_deterministic_"
                    "algorithms), or use policy=Checkpoint()"
                )
            return (*streams[: step.target], x, *streams[step.target + 1 :])
        assert isinstance(step, Bijection)
        out = self.block.inverse(*streams, *args, **kwargs) if step.block else step.inverse(*streams)  # type: ignore[misc]
        before, _ = check_stream_outputs(self.index, step, out, len(streams), inverse=True)
        _note(_seen_inverse, step)
        return arguments.held(before, f"step {self.index} (Bijection.inverse)")

    def try_inverse(self, after: Streams, arguments: Arguments) -> None:
        """Refuse a Bijection's inverse that loses streams before a backward pass meets it, half of its gradients given.

        Once for each Bijection of two functions: it costs an inverse, and the memory of one.
        """
        if self._is_unseen(_seen_inverse) and is_known(after[0]):
            with torch.no_grad():
                self.undo(after, None, arguments)

    def may_lose_streams(self) -> bool:
        """Return whether the step is two functions, of which nobody has seen yet how many streams they return."""
        return self._is_unseen(_seen_forward)

    def _is_unseen(self, seen: weakref.WeakSet[Bijection]) -> bool:
        # SpaceToDepth returns what it gets, and its copies would count in the memory of whoever measures first
        mapped = isinstance(self.step, Bijection) and not self.step.block
        if not mapped or isinstance(self.step.inverse, SpaceToDepth):  # type: ignore[union-attr]
            return False
        try:
            return self.step not in seen
        except TypeError:  # functions without a hash: tried anew in every call
            return True


def _note(seen: weakref.WeakSet[Bijection], step: Bijection | Anchor) -> None:
    if isinstance(step, Bijection) and not step.block:
        with contextlib.suppress(TypeError):
            seen.add(step)


class Arguments:
    """What blocks get after their sources: some common to all, some for one block each.

    With ``dtypes`` streams are held in the second of them, and blocks get them in the first.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layerwise: Sequence[Any] | dict[int, Any] | None,
        dtypes: Dtypes | None = None,
    ) -> None:
        self.args, self.kwargs, self.layerwise, self.dtypes = args, kwargs, layerwise, dtypes

    def add(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Say what block ``number`` gets, where ``layerwise`` is a dict that grows as the blocks are called."""
        self.layerwise[number] = args, kwargs  # type: ignore[index]
        self.__dict__.pop("flat", None)

    @functools.cached_property
    def flat(self) -> tuple[list[Any], Any]:
        """The leaves, and what :meth:`unflatten` makes the arguments of again."""
        return pytree.tree_flatten((self.args, self.kwargs, self.layerwise, self.dtypes))

    @staticmethod
    def unflatten(leaves: list[Any], spec: Any) -> Arguments:
        return Arguments(*pytree.tree_unflatten(leaves, spec))

    def contents(self) -> tuple[list[Any], Any]:
        """Return all that a block could change by other means than in place, for :func:`check_contents`."""
        given = [*self.args, *self.kwargs.values()]
        layerwise = self.layerwise or ()
        for args, kwargs in layerwise.values() if isinstance(layerwise, dict) else layerwise:
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

    def seen(self, streams: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the streams as a block sees them: the one place where they are narrowed."""
        return streams if self.dtypes is None else narrowed(tuple(streams), self.dtypes)

    def held(self, streams: Sequence[Any], step: str) -> tuple[Any, ...]:
        """Return the streams that a block made anew, as they are held."""
        if self.dtypes is None:
            return tuple(streams)
        wide = self.dtypes[1]
        for stream in streams:
            if not isinstance(stream, Tensor):
                raise SpecError(f"{step} returned {type(stream).__name__} as a stream, expected a tensor")
            check_held(step, stream.dtype, wide, _holds)
        return tuple([stream.to(wide) for stream in streams])


def spread(x: Tensor, split: str, num_streams: int) -> Streams:
    """Return the streams of a program whose ``split`` does not part the input: ``"copy"`` or ``"zeros"``."""
    if split == "copy":
        return (x,) * num_streams
    return (*(torch.zeros_like(x) for _ in range(num_streams - 1)), x)


def gathered(streams: Streams, merge: str) -> Tensor:
    """Return the output of a program whose ``merge`` does not join streams: ``"last"``, ``"sum"`` or ``"mean"``."""
    if merge == "last":
        return streams[-1]
    total = functools.reduce(torch.add, streams)
    return total / len(streams) if merge == "mean" else total


def dtype_of(given: Any) -> torch.dtype | None:
    """Return the dtype that ``stream_dtype`` names."""
    if given is None:
        return None
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    dtype = dtype if isinstance(dtype, torch.dtype) else None
    return check_stream_dtype(given, dtype, dtype is not None and (dtype.is_floating_point or dtype.is_complex))


def widened(streams: Streams, stream_dtype: Any) -> tuple[Streams, Dtypes | None]:
    """Return the streams as they are held, and both dtypes, if ``stream_dtype`` is given."""
    wide = dtype_of(stream_dtype)
    if wide is None or not streams:
        return streams, None
    narrow = check_input_dtypes([s.dtype for s in streams], wide, _holds)
    return tuple([s.to(wide) for s in streams]), (narrow, wide)


def narrowed(result: Any, dtypes: Dtypes | None) -> Any:
    """Return streams, or what was made of them, in the dtype that came in."""
    if dtypes is None:
        return result
    return tuple([s.to(dtypes[0]) for s in result]) if isinstance(result, tuple) else result.to(dtypes[0])


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    if wide == narrow:
        return True
    if wide.is_complex != narrow.is_complex or not (narrow.is_floating_point or narrow.is_complex):
        return False
    there, here = torch.finfo(wide), torch.finfo(narrow)
    return there.eps <= here.eps and there.max >= here.max


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
            "another argument when it runs again: return the new value as an extra output, fill a cache before (a "
            "transformers model makes one by itself: pass use_cache=False), or "
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


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether a tensor's elements fill one piece of memory, each in a place of its own."""
    extent = 1
    for size, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if size != 1 and step != extent:
            return False
        extent *= size
    return True
