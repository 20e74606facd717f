"""A program that is run block by block, by a loop that is not ours: the one inside somebody else's model.

:func:`revcore_torch.tape.run` calls all blocks itself. Here each turn of the loop brings its block and arguments, and
gets the newest stream back; the tapes, and so the backward pass, are the same (T17).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from revcore.errors import SpecError
from revcore.policy import Checkpoint, Reverse, StepPolicy, StoreAll, segments
from revcore.program import Program
from revcore_torch import outside
from revcore_torch.drift import probing, warn_once
from revcore_torch.steps import Arguments, Call, Streams, check_contents, make_calls, narrowed, version, widened
from revcore_torch.tape import Stored, Tape, _can_record, _keep_dynamo_out, _take_back, run_stored


class Session:
    """One forward call of ``program``, whose steps are ``Couple`` alone.

    Args:
        program: what is run. A step without a block belongs to the block before it.
        policy: one for all blocks, or one for each; its counts are of blocks.
        streams: those of the start.
        stream_dtype: in which they are held between the blocks.
        join: makes the output of the last streams, which come in ``program.output`` order.
        determinism_check: how a block's second run is compared with its first.
    """

    def __init__(
        self,
        program: Program,
        policy: StepPolicy | Sequence[StepPolicy],
        streams: Streams,
        stream_dtype: Any,
        join: Callable[[Streams], Tensor],
        determinism_check: str,
    ) -> None:
        self.program, self.join, self.determinism_check = program, join, determinism_check
        self.done = 0
        self.groups = _by_block(make_calls(program, [None] * program.num_blocks))
        self.watch = self.groups[0][0].watch
        by_step = _by_step(policy, len(self.groups[0]))
        self.plan = segments([True] * len(program.unrolled), by_step if _can_record() else StoreAll())
        self.streams, self.dtypes = widened(streams, stream_dtype)
        self.given: Tensor = streams[self._source]  # what the loop holds of the newest stream
        self.tapes: list[Tape | Stored] = []
        self.tape: Tape | None = None
        self.first: Streams = ()
        self.glanced = outside.glance()
        self.probe = probing(program, self.streams, by_step)
        if self.records:
            _keep_dynamo_out()
            warn_once(program, [s.dtype for s in self.streams], by_step)
        if self.watch is not None:
            self.streams = self.watch.encode(self.streams, "the input")
        self.versions = self._versions()

    @property
    def records(self) -> bool:
        """Whether the backward pass will run any block again."""
        return any(segment.kind != "store" for segment in self.plan)

    @property
    def is_over(self) -> bool:
        return self.done == len(self.groups)

    @property
    def _source(self) -> int:
        step = self.groups[self.done][0].step
        return step.sources[0]  # type: ignore[union-attr]

    def call(self, block: Any, stream: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Run the next block; return the newest stream, or the output after the last block, and auxiliary outputs.

        Raises:
            SpecError: ``stream`` is not what the last call returned.
        """
        try:
            self._take(stream)
            aux = self._run(block, args, kwargs)
            self.done += 1
            if self.is_over:
                return self._finish(), *aux
            self.given = narrowed((self.streams[self._source],), self.dtypes)[0]
            self.versions = self._versions()
            return self.given, *aux
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Take back what the blocks did to buffers and generators; the session is of no use any more."""
        _take_back(self.tapes)
        outside.put_back(self.glanced)
        self.forget()

    def forget(self) -> None:
        """Let go of everything; the session is of no use any more."""
        for tape in self.tapes:
            if isinstance(tape, Tape):
                tape.forget()
        self.tapes, self.tape, self.streams, self.first = [], None, (), ()

    def _versions(self) -> list[int]:
        """Return how often what the loop may hold was changed in place: all streams, the older ones too."""
        return [version(tensor) for tensor in (self.given, *self.streams)]

    def _take(self, stream: Tensor) -> None:
        same = stream is self.given or _is_same(stream, self.given)
        if not same or self._versions() != self.versions:
            raise SpecError(
                f"layer {self.done} got other hidden states than the layers before it returned: something changes them "
                "between the layers, so they could not be rebuilt. Do it inside a layer, or make the model plain again"
            )
        if stream is self.given:
            return
        # engines (FSDP, ZeRO) and backward hooks put an identity of their own between layers, through which gradients
        # are to go
        i = self._source
        if self.dtypes is not None:
            wide = self.streams[i]
            stream = _Through.apply(wide, stream) if stream.requires_grad else wide.detach()  # type: ignore[assignment]
        self.streams = (*self.streams[:i], stream, *self.streams[i + 1 :])

    def _run(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        calls = self.groups[self.done]
        calls[0].block = block
        start, stop = calls[0].index, calls[-1].index + 1
        segment = next(segment for segment in self.plan if segment.start <= start < segment.stop)
        if start == segment.start:
            self.arguments = Arguments((), {}, {}, self.dtypes)
        self.arguments.add(self.done, args, kwargs)
        if segment.kind == "store":
            if self.records:
                self.tapes.append(Stored(calls, self.streams))
            self.streams, extra = run_stored(segment, calls, self.streams, self.arguments)
            return extra[0]
        if start == segment.start:
            self.tape = Tape(segment, self.streams, self.arguments, self.probe, self.determinism_check)
            self.tapes.append(self.tape)
            self.first = self.streams = self.tape.begin(self.streams)
        assert self.tape is not None
        own = Arguments(args, kwargs, None)
        self.tape.take_in(own.flat[0])
        contents = own.contents()
        aux: tuple[Any, ...] = ()
        self.tape.go_on()
        for call in calls:
            self.streams, extra = self.tape.step(call, self.streams, self.arguments)
            aux += extra
        check_contents(contents, own.contents())
        if stop == segment.stop:
            self.streams, _ = self.tape.finish(self.first, self.streams, (), self.arguments, alone=True)
            self.first = ()
        return aux

    def _finish(self) -> Tensor:
        streams = self.streams if self.watch is None else self.watch.settle(self.streams)
        if moved := outside.put_back(self.glanced) if self.records else []:
            outside.recorded += moved
            raise SpecError(
                f"a layer drew from {', '.join(moved)}, which is recorded from now on: call the model once more"
            )
        for tape in self.tapes:
            tape.keep()
        output = self.join(tuple(streams[i] for i in self.program.output))
        self.tapes, self.tape, self.streams = [], None, ()
        return narrowed(output, self.dtypes)


class _Through(torch.autograd.Function):
    """A wide stream, whose gradient goes by way of the narrow one that the loop holds, as far as that has digits.

    So hooks between the layers see the gradient of the ordinary network, and the wide stream gets all of it.
    """

    @staticmethod
    def forward(ctx: Any, wide: Tensor, narrow: Tensor) -> Tensor:
        ctx.narrow = narrow.dtype
        return wide.view_as(wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        shown = grad.to(ctx.narrow)
        return grad - shown.to(grad.dtype), shown


def _by_step(policy: StepPolicy | Sequence[StepPolicy], size: int) -> StepPolicy | Sequence[StepPolicy]:
    """Return a policy that counts steps for one that counts blocks, of ``size`` steps each."""
    if isinstance(policy, Reverse):
        every = policy.anchor_every and policy.anchor_every * size
        return dataclasses.replace(policy, anchor_every=every, keep_last=policy.keep_last * size)
    if isinstance(policy, Checkpoint):
        return dataclasses.replace(policy, every=policy.every * size)
    if isinstance(policy, Sequence):
        return tuple(_by_step(each, size) for each in policy for _ in range(size))  # type: ignore[misc]
    return policy


def _by_block(calls: Sequence[Call]) -> list[list[Call]]:
    groups: list[list[Call]] = []
    for call in calls:
        if call.step.block:
            groups.append([])
        groups[-1].append(call)
    return groups


def _is_same(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device) and (
        a.data_ptr() == b.data_ptr() and version(a) == version(b)
    )
