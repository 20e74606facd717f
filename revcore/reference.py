"""The oracle: a program run in NumPy float64, and differentiated by the complex step.

``Im F(x + i·h·d) / h`` with ``h = 1e-20`` is the derivative of an analytic ``F`` along ``d`` to the last digit: there
is no difference to cancel and no hand-written adjoint to be wrong (Squire and Trapp, SIAM Review 40, 1998). Blocks must
be analytic functions of NumPy arrays: tanh, not ReLU; and no ``abs``, comparison or conjugate.

>>> import revcore
>>> streams = np.array([1.0]), np.array([0.5])
>>> y = forward(revcore.revnet(2), [np.tanh] * 2, streams)
>>> all(map(np.allclose, inverse(revcore.revnet(2), [np.tanh] * 2, y), streams))
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from revcore.checks import (
    check_block_output,
    check_blocks,
    check_coupled,
    check_has_inverse,
    check_stream_outputs,
    check_streams,
)
from revcore.errors import InversionError
from revcore.lattice import out_of_range
from revcore.program import Program
from revcore.step import Anchor, Bijection, Couple

_STEP = 1e-20

__all__ = ["directional", "forward", "gradient", "inverse"]


def forward(program: Program, blocks: Sequence[Any], streams: Sequence[np.ndarray], *args: Any, **kwargs: Any) -> Any:
    """Run ``program`` and return its streams in output order; ``(streams, aux)`` where a block returned more.

    Args:
        program: what to run.
        blocks: one function for each step that calls a block, in running order (``program.num_blocks`` of them).
        streams: ``program.num_streams`` arrays, float64 or complex128.
        *args: handed to every block after its sources, as are ``**kwargs``.

    Raises:
        SpecError: the wrong number of blocks or streams, or a block that changes shape or dtype.
        InversionError: a stream of an exact program left the lattice's range.

    >>> import revcore
    >>> forward(revcore.revnet(1), [np.tanh], (np.array([1.0]), np.array([0.0])))
    (array([0.]), array([1.]))
    """
    current = list(check_streams(program, streams, _is_array, _is_inexact, "NumPy array"))
    current = _on_lattice(program, current, "the input")
    queue = iter(check_blocks(program, blocks, program.num_blocks))
    aux: list[tuple[Any, ...]] = []
    for index, step in enumerate(program.unrolled):
        if isinstance(step, Couple):
            given = step.gather(current)
            f: Any = given[0]
            extra: tuple[Any, ...] = ()
            if step.block:
                f, extra = step.split(next(queue)(*given, *args, **kwargs), given)
                check_block_output(len(aux), f, current[step.target], _is_array, "NumPy array")
            y = step.coupling.forward(current[step.target], f)
            check_coupled(index, y, current[step.target])
            current[step.target] = y
            _check_range(program, [y], f"step {index}")
        else:
            block = next(queue) if step.block else None
            move = _map_of(step, block)
            out = move(*current, *args, **kwargs) if block is not None else move(*current)
            moved, extra = check_stream_outputs(index, step, out, program.num_streams)
            current = _on_lattice(program, moved, f"step {index}") if isinstance(step, Anchor) else list(moved)
        if step.block:
            aux.append(extra)
    result = tuple(current[i] for i in program.output)
    return (result, aux) if any(aux) else result


def inverse(
    program: Program, blocks: Sequence[Any], streams: Sequence[np.ndarray], *args: Any, **kwargs: Any
) -> tuple[np.ndarray, ...]:
    """Return the input streams from which :func:`forward` made ``streams``.

    Raises:
        SpecError: as :func:`forward`, or the program holds an :class:`~revcore.Anchor`, which has no inverse.

    >>> import revcore
    >>> inverse(revcore.revnet(1), [np.cosh], (np.array([0.0]), np.array([2.0])))
    (array([1.]), array([0.]))
    """
    check_has_inverse(program)
    outputs = check_streams(program, streams, _is_array, _is_inexact, "NumPy array")
    queue = iter(reversed(check_blocks(program, blocks, program.num_blocks)))
    current = [outputs[program.output.index(i)] for i in range(program.num_streams)]
    for index, step in reversed(list(enumerate(program.unrolled))):
        block = next(queue) if step.block else None
        if not isinstance(step, Couple):
            assert isinstance(step, Bijection)
            undo = step.inverse if block is None else block.inverse  # type: ignore[attr-defined]
            assert undo is not None
            out = undo(*current) if block is None else undo(*current, *args, **kwargs)
            current = list(check_stream_outputs(index, step, out, program.num_streams, inverse=True)[0])
            continue
        gathered = step.gather(current)
        f = gathered[0] if block is None else step.split(block(*gathered, *args, **kwargs), gathered)[0]
        current[step.target] = step.coupling.inverse(current[step.target], f)
    return tuple(current)


def directional(function: Callable[[Any], Any], arrays: Any, direction: Any) -> float:
    """Return the derivative of a real scalar ``function`` at ``arrays`` along ``direction``, by the complex step.

    Args:
        function: takes a tree (dicts, lists, tuples) of complex arrays, returns one number.
        arrays: the tree of float64 arrays at which to differentiate.
        direction: a tree of the same form.

    >>> directional(lambda a: (a["w"] ** 3).sum(), {"w": np.array([2.0])}, {"w": np.array([1.0])})
    12.0
    """
    moved = _zip_map(lambda a, d: np.asarray(a) + 1j * _STEP * np.asarray(d), arrays, direction)
    return float(np.imag(function(moved)) / _STEP)


def gradient(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Return the gradient of a real scalar ``function`` at ``arrays``, a tree of the same form, by the complex step.

    One evaluation for each number in ``arrays``: for small networks.

    >>> gradient(lambda a: (a[0] * a[1]).sum(), [np.array([2.0, 3.0]), np.array([5.0, 7.0])])
    [array([5., 7.]), array([2., 3.])]
    """
    moved = _zip_map(lambda a, _: np.array(a, dtype=np.complex128), arrays, arrays)

    def leaf(array: np.ndarray, _: Any) -> np.ndarray:
        result = np.empty(array.shape)
        for index in np.ndindex(array.shape):
            array[index] += 1j * _STEP
            result[index] = np.imag(function(moved)) / _STEP
            array[index] -= 1j * _STEP
        return result

    return _zip_map(leaf, moved, moved)


def _on_lattice(program: Program, streams: Sequence[np.ndarray], where: str) -> list[np.ndarray]:
    if program.lattice is None:
        return list(streams)
    for i, stream in enumerate(streams):
        program.lattice.check_dtype(np.real(stream).dtype, f"stream {i} of {where}")
    result = [program.lattice.encode(stream) for stream in streams]
    _check_range(program, result, where)
    return result


def _check_range(program: Program, streams: Sequence[np.ndarray], where: str) -> None:
    if program.lattice is None:
        return
    for stream in streams:
        values = np.real(stream)
        peak, limit = float(np.max(np.abs(values), initial=0)), program.lattice.limit(values.dtype)
        if not peak <= limit:
            raise InversionError(out_of_range(where, peak, limit, program.lattice.bits))


def _map_of(step: Anchor | Bijection, block: Any) -> Callable[..., Any]:
    if block is None:
        assert isinstance(step, Bijection)
        assert step.forward is not None
        return step.forward
    return block.forward if hasattr(block, "forward") else block


def _zip_map(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    if isinstance(a, Mapping):
        return {k: _zip_map(function, v, b[k]) for k, v in a.items()}
    if isinstance(a, (list, tuple)):
        return type(a)([_zip_map(function, v, w) for v, w in zip(a, b, strict=True)])
    return function(a, b)


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic))


def _is_inexact(array: Any) -> bool:
    return np.issubdtype(array.dtype, np.inexact)
