"""What the ``ReversibleSequential`` of every backend has in common: its program, and how streams are made and "
"joined."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from revcore.checks import check_program
from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.program import Program, revnet

SplitAndMerge = tuple[str, str]


def check_settings(
    program: Program | None,
    coupling: Any,
    coupling_forward: Any,
    coupling_inverse: Any,
    num_streams: int,
    asarray: Callable[[Any], Any],
) -> tuple[Coupling, ...]:
    """Return the couplings that were asked for in either way, to be cycled; refuse what contradicts itself.

    ``asarray`` makes the backend's array of a NumPy array, to try the functions on.

    >>> check_settings(None, None, lambda x, f: x + f, None, 2, lambda a: a)
    Traceback (most recent call last):
    ...
    revcore.SpecError: Coupling.from_functions: inverse came as None, but must be a function: a coupling needs both \
y = forward(x, f) and x = inverse(y, f), and neither can be derived from the other
    """
    if coupling_forward is not None or coupling_inverse is not None:
        if coupling is not None:
            raise SpecError("give either coupling, or coupling_forward and coupling_inverse")
        as_tuples = (tuple(f) if isinstance(f, (list, tuple)) else (f,) for f in (coupling_forward, coupling_inverse))
        coupling = _from_functions(*as_tuples, asarray)
    if program is not None and (coupling is not None or num_streams != 2):
        raise SpecError("give either program, or coupling and num_streams: a program says both")
    if program is not None:
        check_program(program)
    couplings = (coupling,) if isinstance(coupling, Coupling) else () if coupling is None else tuple(coupling)
    default_program(1, couplings, num_streams)  # says what is wrong with them
    return couplings


@lru_cache(maxsize=256)  # a Linen module asks anew with each of its clones
def _from_functions(forwards: Any, inverses: Any, asarray: Any) -> tuple[Coupling, ...]:
    from revcore.laws import couplings_from_functions  # needs NumPy

    return couplings_from_functions(forwards, inverses, asarray)


@lru_cache(maxsize=256)
def default_program(depth: int, couplings: tuple[Coupling, ...], num_streams: int) -> Program:
    """Return the ``revnet`` over ``depth`` blocks.

    >>> default_program(3, (), 2) == revnet(3)
    True
    """
    return revnet(depth, couplings or None, num_streams)


def split_and_merge(program: Program | None, axis: int | None, axis_name: str) -> SplitAndMerge:
    """Return how streams are made and joined: as ``program`` says, or along ``axis`` where none is given.

    >>> split_and_merge(None, 1, "dim"), split_and_merge(None, None, "dim")
    (('chunk', 'concat'), ('copy', 'mean'))
    """
    if program is None:
        return ("copy", "mean") if axis is None else ("chunk", "concat")
    if axis is None and (program.split == "chunk" or program.merge == "concat"):
        raise SpecError(f"the program parts its input or joins its streams along an axis: give {axis_name}")
    return program.split, program.merge


def check_axis(axis: int, shape: tuple[int, ...], num_streams: int, axis_name: str) -> None:
    """Refuse to part a shape along an axis that it does not have, or that does not divide.

    >>> check_axis(1, (4, 7), 2, "split_dim")
    Traceback (most recent call last):
    ...
    revcore.SpecError: the input has size 7 along split_dim 1, which does not part into 2 equal streams: use a size \
divisible by 2, another split_dim, or split_dim=None to give every stream the whole
    """
    if not -len(shape) <= axis < len(shape):
        raise SpecError(
            f"{axis_name} is {axis}, but the input has shape {tuple(shape)}: give one that it has, or "
            f"{axis_name}=None to give every stream the whole"
        )
    if shape[axis] % num_streams:
        raise SpecError(
            f"the input has size {shape[axis]} along {axis_name} {axis}, which does not part into {num_streams} equal "
            f"streams: use a size divisible by {num_streams}, another {axis_name}, or {axis_name}=None to give every "
            "stream the whole"
        )


def check_invertible(how: SplitAndMerge, instead: str) -> None:
    """Refuse to invert a module whose output does not tell its streams apart.

    >>> check_invertible(("chunk", "concat"), "inverse")
    """
    if how != ("chunk", "concat"):
        raise SpecError(
            f"inverse needs streams made by 'chunk' and joined by 'concat', but here they are made by {how[0]!r} and "
            f"joined by {how[1]!r}: use {instead} on the streams"
        )
