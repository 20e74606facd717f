"""The functional form: a program run on streams, its inverse, and a check of how well it inverts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from revcore.checks import check_blocks, check_has_inverse, check_program, check_streams
from revcore.errors import InversionError, SpecError
from revcore.laws import InverseReport, relative_error
from revcore.policy import MemoryBudget, Policy, Reverse, StoreAll, check_policy
from revcore.program import Program
from revcore.step import Anchor, Couple
from revcore_torch import budget, replay
from revcore_torch.determinism import check_name
from revcore_torch.reach import held_by
from revcore_torch.steps import Arguments, Call, Dtypes, is_tensor, make_calls, narrowed, widened
from revcore_torch.tape import _can_record, run

Layerwise = Sequence[tuple[Sequence[Any], dict[str, Any]]] | None


def reversible(
    program: Program,
    blocks: Sequence[Any],
    streams: Sequence[Tensor],
    *args: Any,
    layerwise_args_kwargs: Layerwise = None,
    policy: Policy = Reverse(),  # noqa: B008 - frozen
    stream_dtype: torch.dtype | str | None = None,
    determinism_check: str = "values",
    **kwargs: Any,
) -> Any:
    """Run ``program`` on ``streams``; the backward pass rebuilds what ``policy`` did not keep.

    Values, gradients, buffers and random state are those of the ordinary, store-everything network.

    Args:
        program: what to run.
        blocks: ``program.num_blocks`` modules or functions, one for each step that calls one, in running order. A
            block gets its sources, then ``*args`` and ``**kwargs``, and returns ``f`` or ``(f, *aux)``.
        streams: ``program.num_streams`` tensors of a floating-point or complex dtype, of one shape.
        layerwise_args_kwargs: one ``(args, kwargs)`` pair for each block, added to the common ones.
        policy: what the backward pass keeps and rebuilds; never changes a value.
        stream_dtype: a dtype or its name (``"float32"``), in which streams are held between steps. Blocks get their
            sources in the dtype that came in, which must be one for all streams and no wider; what they return is
            coupled in ``stream_dtype``, and the result is in the dtype that came in. An ``Anchor``'s block gets and
            returns streams as any block does; a ``Bijection``'s gets them as they are held, for what it rounded away
            its inverse could not bring back. ``None``: streams as they come.
        determinism_check: how a block's second run is compared with its first. ``"values"``: a few values of its
            output, its sources and its saved tensors, within what rounding and measured drift explain; ``"shapes"``:
            number, shapes and dtypes of its saved tensors, as ``torch.utils.checkpoint`` does; ``"none"``: not at all.
            In a network that ``torch.compile`` takes as a whole there is no second run to look at. See "What is
            checked" in ``docs/numerics.md``.

    Returns:
        The streams as a tuple in ``program.output`` order; ``(streams, aux)`` if any block returned more than its
        ``f``, ``aux`` being a list with one tuple for each block.

    Raises:
        SpecError: wrong number of blocks or streams, streams of integers or of different shapes, an unknown policy, a
            block that changes shape or dtype or writes into its input, a ``stream_dtype`` of integers, or one that
            would round a stream.
        InversionError: (in the backward pass) a block did not do the second time what it did the first.

    Under ``torch.no_grad``, ``torch.func`` and ``torch.export`` nothing is rebuilt, and the result is the same.

    >>> import revcore, torch
    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> y0, y1 = reversible(revcore.revnet(2), [torch.sin, torch.cos], (x, x))
    >>> (y0 + y1).sum().backward()
    >>> torch.allclose(x.grad, 2 + torch.cos(x) - torch.sin(x + torch.sin(x)) * (1 + torch.cos(x)))
    True

    bfloat16 blocks over float32 streams:

    >>> x = torch.ones(2, 3, dtype=torch.bfloat16)
    >>> reversible(revcore.revnet(2), [torch.sin, torch.cos], (x, x), stream_dtype="float32")[0].dtype
    torch.bfloat16
    """
    return joined(
        program, blocks, streams, args, kwargs, layerwise_args_kwargs, policy, as_is, as_is, stream_dtype,
        check_name(determinism_check),
    )  # fmt: skip


def joined(*call: Any) -> Any:
    """:func:`eager`, or what dynamo sees in its place; they take the same."""
    if torch.compiler.is_dynamo_compiling():
        from revcore_torch import compiled  # loads dynamo

        return compiled.joined(*call)
    return eager(*call)


def as_is(streams: Any) -> Any:
    """Neither part nor join."""
    return streams


@torch._disable_dynamo  # T10  # pyright: ignore[reportPrivateImportUsage]
def eager(*call: Any) -> Any:
    """What :func:`wide` returns, in the dtype that came in; auxiliary outputs only where there are any."""
    result, aux, dtypes = wide(*call)
    result = narrowed(result, dtypes)
    return (result, aux) if any(aux) else result


def wide(
    owner: Any,
    blocks: Sequence[Any],
    given: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layerwise: Layerwise,
    policy: Policy,
    split: Callable[[Any], Any],
    join: Callable[[Any], Any],
    stream_dtype: Any,
    determinism_check: str,
) -> tuple[Any, list[tuple[Any, ...]], Dtypes | None]:
    """Run :func:`reversible` on the streams that ``split`` makes of ``given``; ``join`` makes one output of the last.

    ``owner`` is a program, or what has one. Returns the output as its streams are held, auxiliary outputs, and the
    dtypes to narrow it by.
    """
    program, blocks, streams, arguments = check(
        getattr(owner, "program", owner), blocks, split(given), args, kwargs, layerwise, stream_dtype
    )
    policy = check_policy(policy)
    if isinstance(policy, MemoryBudget):
        recorded = _can_record()
        ways = lambda x: widened(split(x), stream_dtype)[0], lambda y: narrowed(join(y), arguments.dtypes)
        policy = budget.choose(policy, program, blocks, given, arguments, *ways) if recorded else StoreAll()
    streams, aux = run(program, blocks, streams, arguments, policy, determinism_check=determinism_check)
    return join(tuple(streams[i] for i in program.output)), aux, arguments.dtypes


def inverse(
    program: Program,
    blocks: Sequence[Any],
    streams: Sequence[Tensor],
    *args: Any,
    layerwise_args_kwargs: Layerwise = None,
    stream_dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """Return the input streams from which :func:`reversible` made ``streams``.

    An ordinary differentiable computation: it changes no buffer, and keeps what autograd needs.

    Args:
        program: what was run.
        blocks: the blocks it was run with.
        streams: the output streams, in ``program.output`` order.
        *args: what the blocks got, as did ``**kwargs`` and ``layerwise_args_kwargs``.
        stream_dtype: what it was run with; the streams that come back are in the dtype of those that came.

    Raises:
        SpecError: as :func:`reversible`, or ``program`` holds an :class:`revcore.Anchor`, which has no inverse.
        InversionError: a block draws random numbers, which are not known afterwards.

    >>> import revcore, torch
    >>> x = torch.ones(2), torch.zeros(2)
    >>> y = reversible(revcore.revnet(3), [torch.sin] * 3, x)
    >>> torch.allclose(inverse(revcore.revnet(3), [torch.sin] * 3, y)[0], x[0])
    True
    """
    program, blocks, streams, arguments = check(
        program, blocks, streams, args, kwargs, layerwise_args_kwargs, stream_dtype
    )
    check_has_inverse(program)
    current = tuple(streams[program.output.index(i)] for i in range(program.num_streams))
    for call in reversed(make_calls(program, blocks)):
        current = _undo(call, current, arguments)
    return narrowed(current, arguments.dtypes)


def inverse_report(
    program: Program,
    blocks: Sequence[Any],
    streams: Sequence[Tensor],
    *args: Any,
    layerwise_args_kwargs: Layerwise = None,
    stream_dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> InverseReport:
    """The functional form of :func:`revcore_torch.check_inverse`."""
    program, blocks, streams, arguments = check(
        program, blocks, streams, args, kwargs, layerwise_args_kwargs, stream_dtype
    )
    calls = make_calls(program, blocks)
    local, drift, carries = [], [], []
    with torch.no_grad():
        if calls and calls[0].watch is not None:
            streams = calls[0].watch.encode(streams, "the input")
        states = [streams]
        for call in calls:
            with _without_trace(call, states[-1]):
                after, carry = call.first(states[-1], call.evaluate(states[-1], arguments)[0])
            states.append(after)
            carries.append(carry)
        current = states[-1]
        for call, carry, before, after in reversed(list(zip(calls, carries, states[:-1], states[1:], strict=True))):
            if isinstance(call.step, Anchor):  # its input is kept, so the walk starts anew there
                exact = current = before
            else:
                exact, current = (_undo(call, streams, arguments, carry) for streams in (after, current))
            local.append(_error(exact, before))
            drift.append(_error(current, before))
    return InverseReport(tuple(type(c.step).__name__ for c in calls), tuple(local[::-1]), tuple(drift[::-1]))


def _undo(
    call: Call, streams: tuple[Tensor, ...], arguments: Arguments, carry: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    with _without_trace(call, streams):
        f = call.evaluate(streams, arguments)[0] if isinstance(call.step, Couple) else None
        return call.undo(streams, f, arguments, carry)


@contextlib.contextmanager
def _without_trace(call: Call, streams: tuple[Tensor, ...]) -> Iterator[None]:
    """Let the block run, put its buffers back, and refuse it if it drew random numbers."""
    devices = replay.random_devices(streams)
    random = replay.random_state(devices)
    with replay.Buffers(held_by(call.block)).as_now():
        yield
    if replay.random_state(devices) != random:
        replay.set_random_state(devices, random)
        raise InversionError(
            f"block of step {call.index} draws random numbers, and those of the forward pass are not known: call "
            "eval() before both the forward pass and its inverse"
        )


def _error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    def wide(tensors: Sequence[Tensor]) -> list[Any]:
        return [t.detach().to(torch.complex128).cpu().numpy() for t in tensors]

    return relative_error(wide(got), wide(expected))


def check(
    program: Any,
    blocks: Any,
    streams: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layerwise: Any,
    stream_dtype: Any = None,
) -> tuple[Program, tuple[Any, ...], tuple[Tensor, ...], Arguments]:
    program = check_program(program)
    blocks = check_blocks(program, blocks, program.num_blocks)
    for i, block in enumerate(blocks):
        if not callable(block):
            raise SpecError(f"block {i} came as {type(block).__name__}, expected a module or function")
    streams = check_streams(program, streams, is_tensor, _is_inexact, "tensor")
    if layerwise is not None:
        layerwise = tuple(layerwise)
        if len(layerwise) != len(blocks) or not all(_is_pair(pair) for pair in layerwise):
            raise SpecError(
                f"layerwise_args_kwargs came with {len(layerwise)} entries, expected one (args, kwargs) pair for each "
                f"of the {len(blocks)} blocks: write [((), {{'mask': m}}) for m in masks]"
            )
    streams, dtypes = widened(streams, stream_dtype)
    return program, blocks, streams, Arguments(args, kwargs, layerwise, dtypes)


def _is_pair(pair: Any) -> bool:
    return len(pair) == 2 and isinstance(pair[0], (tuple, list)) and isinstance(pair[1], dict)


def _is_inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
