"""What the NNX and the Linen module share: their program, and how an array becomes streams and streams an array."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax.numpy as jnp

from revcore.checks import check_program, check_split
from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.laws import check_coupling
from revcore.program import Program, revnet
from revcore_jax.trees import is_array


def check_settings(
    program: Program | None, coupling: Any, coupling_forward: Any, coupling_inverse: Any, num_streams: int
) -> tuple[Coupling, ...]:
    """Return the couplings that were asked for in either way; refuse what contradicts itself."""
    if coupling_forward is not None or coupling_inverse is not None:
        if coupling is not None:
            raise SpecError("give either coupling, or coupling_forward and coupling_inverse")
        as_tuples = (tuple(f) if isinstance(f, (list, tuple)) else (f,) for f in (coupling_forward, coupling_inverse))
        coupling = _from_functions(*as_tuples)
    if program is not None and (coupling is not None or num_streams != 2):
        raise SpecError("give either program, or coupling and num_streams: a program says both")
    if program is not None:
        check_program(program)
    couplings = (coupling,) if isinstance(coupling, Coupling) else () if coupling is None else tuple(coupling)
    default_program(1, couplings, num_streams)  # says what is wrong with them
    return couplings


@lru_cache(maxsize=256)  # a Linen module asks anew with each of its clones
def _from_functions(forwards: tuple[Any, ...], inverses: tuple[Any, ...]) -> list[Coupling]:
    if len(forwards) != len(inverses):
        raise SpecError(
            f"{len(forwards)} coupling_forward and {len(inverses)} coupling_inverse came, expected as many of one as "
            "of the other: they are used in pairs"
        )
    couplings: list[Coupling] = [Coupling.from_functions(f, g) for f, g in zip(forwards, inverses, strict=True)]
    for coupling in couplings:
        check_coupling(coupling, asarray=jnp.asarray)
    return couplings


@lru_cache(maxsize=256)
def default_program(depth: int, couplings: tuple[Coupling, ...], num_streams: int) -> Program:
    return revnet(depth, couplings or None, num_streams)


def split_and_merge(given: Program | None, axis: int | None) -> tuple[str, str]:
    """Return how streams are made and joined: as ``given`` says, or along ``axis``."""
    if given is None:
        return ("copy", "mean") if axis is None else ("chunk", "concat")
    if axis is None and (given.split == "chunk" or given.merge == "concat"):
        raise SpecError("the program parts its input or joins its streams along an axis: give axis")
    return given.split, given.merge


def split(x: Any, how: str, num_streams: int, axis: int | None) -> tuple[Any, ...]:
    """Make streams of an array."""
    if not is_array(x):
        raise SpecError(f"the input came as {type(x).__name__}, expected a JAX array")
    if how == "copy":
        return (x,) * num_streams
    if how == "zeros":
        return (*(jnp.zeros_like(x) for _ in range(num_streams - 1)), x)
    assert axis is not None
    if not -x.ndim <= axis < x.ndim:
        raise SpecError(
            f"axis is {axis}, but the input has shape {x.shape}: give an axis it has, or axis=None to give every "
            "stream the whole"
        )
    check_split(x.shape[axis], num_streams, "axis", axis)
    return tuple(jnp.split(x, num_streams, axis))


def merge(streams: Sequence[Any], how: str, axis: int | None) -> Any:
    """Make an array of streams."""
    if how == "concat":
        assert axis is not None
        return jnp.concatenate(streams, axis)
    if how == "last":
        return streams[-1]
    total = sum(streams[1:], streams[0])
    return total / len(streams) if how == "mean" else total


def check_invertible(how: tuple[str, str], owner: str) -> None:
    if how != ("chunk", "concat"):
        raise SpecError(
            f"inverse needs streams made by 'chunk' and joined by 'concat', but here they are made by {how[0]!r} and "
            f"joined by {how[1]!r}: use {owner} on the streams"
        )
