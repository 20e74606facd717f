"""The two errors a user of revcore meets, and the check that most often raises one."""

from __future__ import annotations

from typing import Any


class SpecError(ValueError):
    """What was asked for cannot be right: a program, coupling, policy, block, stream or checkpoint.

    Raised before any state has changed, or with what blocks changed meanwhile put back (where everything is stored, an
    ordinary network runs, and leaves what an ordinary network leaves). The message says what came, what was
    expected and what to write instead.

    >>> from revcore import Momentum
    >>> Momentum(0.0)
    Traceback (most recent call last):
    ...
    revcore.SpecError: Momentum: beta came as 0.0, but must lie strictly between 0 and 1 \
(0 forgets the stream, so nothing could be rebuilt; 1 ignores the block): write Momentum(0.9)
    """

    __module__ = "revcore"


class InversionError(RuntimeError):
    """A layer's input could not be rebuilt from its output.

    Raised when the second run of a block differs from the first (other tensors saved, parameters or
    arguments changed in between, random numbers that cannot be replayed). The message names the step
    and the likely cause.

    >>> issubclass(InversionError, RuntimeError)
    True
    """

    __module__ = "revcore"


def check_count(owner: str, name: str, value: Any, least: int, unit: str = "") -> int:
    """Return ``value`` if it is a whole number of at least ``least``, or say what came.

    >>> check_count("Repeat", "n", 0, 1)
    Traceback (most recent call last):
    ...
    revcore.SpecError: Repeat: n came as 0, but must be a whole number of at least 1
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{owner}: {name} came as {value!r}, but must be a whole number of at least {least}{unit}")
    return value
