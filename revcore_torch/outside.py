"""The generators of Python's ``random`` and of ``numpy.random``, which a block may draw from without torch's knowing.

To see whether they moved costs little once in a forward pass, and too much at each step. So at first they are only
looked at. When a pass moved one, that pass is taken back and runs again; from then on its state is recorded at each
step, as those of torch's generators are (T6). A thread that draws from them meanwhile costs time, and changes no
gradient.
"""

from __future__ import annotations

import ctypes
import random
import sys
from typing import Any

Glance = dict[str, Any]

recorded: list[str] = []


def glance(everything: bool = False) -> Glance:
    """Return the states of the generators that are not recorded at each step, as cheaply as they can be had."""
    return {name: look() for name, (look, _, _) in _GENERATORS.items() if everything or name not in recorded}


def put_back(glanced: Glance) -> list[str]:
    """Put those that moved since then into the states that they had, and return their names."""
    now = {name: _GENERATORS[name][0]() for name in glanced}
    moved = [name for name, state in glanced.items() if state is not None and state != now.get(name)]
    for name in moved:
        _GENERATORS[name][2](glanced[name])
    return moved


def states() -> tuple[Any, ...]:
    """Return the states of those that are recorded: more of them as time goes on, the new ones last."""
    return tuple(_GENERATORS[name][1]() for name in recorded)


def set_states(states: tuple[Any, ...]) -> None:
    for name, state in zip(recorded, states, strict=False):
        _GENERATORS[name][2](state)


def _numpy_glance() -> bytes | None:
    bits: Any = _numpy().get_bit_generator() if _numpy() is not None else None
    # its key and its place in it, for a hundredth of what get_state takes
    return ctypes.string_at(bits.ctypes.state_address, 4 * 625) if type(bits).__name__ == "MT19937" else None


def _numpy_state() -> tuple[Any, ...]:
    _, key, *rest = _numpy().get_state()
    return key.tobytes(), *rest


def _set_numpy_state(state: Any) -> None:
    key, *rest = (state[:-4], int.from_bytes(state[-4:], sys.byteorder)) if isinstance(state, bytes) else state
    _numpy().set_state(("MT19937", memoryview(key).cast("I"), *rest))


def _numpy() -> Any:
    return sys.modules.get("numpy.random")


# how to look at each, how to read it, how to set it
_GENERATORS: dict[str, tuple[Any, Any, Any]] = {
    "random": (random.getstate, random.getstate, random.setstate),
    "numpy.random": (_numpy_glance, _numpy_state, _set_numpy_state),
}
