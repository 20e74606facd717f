"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Interrupt:
    """Whether the user (Ctrl-C) or the system (SIGTERM) asked to stop.

    >>> with listening() as interrupt:
    ...     signal.raise_signal(signal.SIGINT)
    ...     interrupt.asked
    True
    """

    asked: bool = False


@contextlib.contextmanager
def listening() -> Iterator[Interrupt]:
    """Note the first SIGINT or SIGTERM instead of raising in the midst of a step; a second one acts as ever."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        interrupt.asked = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
