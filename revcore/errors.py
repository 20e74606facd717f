"""The two errors a user of revcore meets, and nothing else."""

from __future__ import annotations


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
