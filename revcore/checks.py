"""What engines check at their boundary, in one place so that every backend says the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from revcore.errors import SpecError
from revcore.program import Program
from revcore.step import Anchor, Bijection


def check_program(program: Any) -> Program:
    """Return ``program``, or say what was expected."""
    if not isinstance(program, Program):
        raise SpecError(
            f"program came as {program!r} ({type(program).__name__}), expected a revcore.Program: write revnet(depth), "
            "or Program.from_dict(data) for one that was saved"
        )
    return program


def check_has_inverse(program: Program) -> None:
    """Refuse to invert a program with an Anchor, before any block runs."""
    for index, step in enumerate(program.unrolled):
        if isinstance(step, Anchor):
            raise SpecError(f"step {index} is an Anchor, which has no inverse")


def check_streams(
    program: Program, streams: Any, is_array: Callable[[Any], bool], is_inexact: Callable[[Any], bool], kind: str
) -> tuple[Any, ...]:
    """Return ``streams`` as a tuple, or say which is none: count, kind, dtype (float or complex) and shape."""
    if is_array(streams) or not isinstance(streams, Sequence):
        raise SpecError(
            f"streams came as one {type(streams).__name__}, expected a tuple of {program.num_streams} {kind}s: part "
            "the input first, or use ReversibleSequential, which does"
        )
    streams = tuple(streams)
    if len(streams) != program.num_streams:
        raise SpecError(f"{len(streams)} streams came, but the program has {program.num_streams}")
    for i, stream in enumerate(streams):
        if not is_array(stream):
            raise SpecError(f"stream {i} came as {type(stream).__name__}, expected a {kind}")
        if not is_inexact(stream):
            raise SpecError(
                f"stream {i} came as a {kind} of {stream.dtype}, expected a floating-point or complex dtype: streams "
                "carry gradients, so embed or convert the input first"
            )
    shapes = [tuple(stream.shape) for stream in streams]
    # by comparison: the sizes of an exported or traced model have no hash
    if program.same_shape and any(shape != shapes[0] for shape in shapes):
        raise SpecError(
            f"streams came with shapes {', '.join(map(str, shapes))}, expected one shape for all (a program whose "
            "streams differ by design says Program(..., same_shape=False))"
        )
    return streams


def check_stream_dtype(given: Any, dtype: Any, is_inexact: bool) -> Any:
    """Return ``dtype``, which the engine made of ``given`` (``None``: it could not), or say what was expected."""
    if dtype is None or not is_inexact:
        raise SpecError(
            f"stream_dtype came as {given!r}, expected a floating-point (or complex) dtype of the framework or its "
            "name: write stream_dtype='float32', or None to hold streams as they come"
        )
    return dtype


def check_input_dtypes(dtypes: Sequence[Any], wide: Any, holds: Callable[[Any, Any], bool]) -> Any:
    """Return the one dtype of the streams that come in, to be held in ``wide``."""
    if any(dtype != dtypes[0] for dtype in dtypes):
        raise SpecError(
            f"streams came in {', '.join(map(str, dtypes))}, but with stream_dtype a block gets its sources in the "
            "dtype that came in, so it must be one: convert them first"
        )
    if not holds(wide, dtypes[0]):
        raise SpecError(
            f"streams came in {dtypes[0]}, but stream_dtype={wide} does not hold all of its values, and streams are "
            "widened, never rounded: give a wider stream_dtype, or convert the input"
        )
    return dtypes[0]


def check_held(step: str, dtype: Any, wide: Any, holds: Callable[[Any, Any], bool]) -> None:
    """Refuse a stream that an Anchor or a Bijection made, and that ``stream_dtype`` would round."""
    if not holds(wide, dtype):
        raise SpecError(
            f"{step} returned a stream of {dtype}, but stream_dtype={wide} does not hold all of its values: convert it "
            "in the block, or give a wider stream_dtype"
        )


def check_blocks(program: Program, blocks: Any, expected: int, *, repeats_once: bool = False) -> tuple[Any, ...]:
    """Return ``blocks`` as a tuple of ``expected``, or say how many came."""
    try:
        blocks = tuple(blocks)
    except TypeError:
        raise SpecError(f"blocks came as {type(blocks).__name__}, expected a sequence of {expected} blocks") from None
    if len(blocks) != expected:
        how = " (a Repeat's blocks once, their parameters stacked)" if repeats_once else ""
        raise SpecError(
            f"{len(blocks)} blocks came, but the program takes {expected}{how}: give one for each step that calls a "
            "block"
        )
    return blocks


def check_block_output(index: int, f: Any, target: Any, is_array: Callable[[Any], bool], kind: str) -> None:
    """Refuse a block whose output is no array of its target stream's shape."""
    parts: tuple[Any, ...] = f if isinstance(f, tuple) and f else (f,)
    for part in parts:
        if not is_array(part):
            raise SpecError(
                f"block {index} returned {type(part).__name__}, expected a {kind} (or a tuple that begins with it)"
            )
        if tuple(part.shape) != tuple(target.shape):
            raise SpecError(
                f"block {index} returned shape {tuple(part.shape)}, but the stream it is coupled with has shape "
                f"{tuple(target.shape)}: a block keeps the shape (change it in an Anchor or a Bijection)"
            )


def check_coupled(index: int, y: Any, target: Any) -> None:
    """Refuse a coupled stream that changed its shape or dtype: it could not be rebuilt as it was."""
    if tuple(y.shape) != tuple(target.shape) or y.dtype != target.dtype:
        raise SpecError(
            f"step {index} turned a stream of {target.dtype}, shape {tuple(target.shape)}, into {y.dtype}, shape "
            f"{tuple(y.shape)}: a stream keeps its dtype and shape. Convert the block's output to the stream's dtype, "
            "or hold the streams in the wider dtype from the start (float32 streams go with narrower blocks)"
        )


def check_stream_outputs(
    index: int | None, step: Anchor | Bijection, streams: Any, num_streams: int, *, inverse: bool = False
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split what an Anchor or Bijection returned into ``(streams, aux)``; two functions return streams alone.

    ``index`` is ``None`` where nobody knows which step of the program it is.
    """
    several = isinstance(streams, (tuple, list))
    if not several or len(streams) < num_streams or (len(streams) > num_streams and not step.block):
        got = f"{len(streams)} of them" if several else type(streams).__name__
        name = type(step).__name__ + ".inverse" * inverse
        place = f"step {index} ({name})" if index is not None else f"a step ({name})"
        hint = ""
        if not step.block:
            hint = (
                f": return exactly {num_streams} from a Bijection's two functions. For auxiliary outputs write "
                "Bijection() and give a block with forward and inverse"
            )
        raise SpecError(f"{place} must return its {num_streams} streams as a tuple, but returned {got}{hint}")
    return tuple(streams[:num_streams]), tuple(streams[num_streams:])
