"""The networks that reversible ones must equal, in each framework alone: written out by hand, everything stored.

Each updates the oldest stream by what a block makes of the next one, and hands the others on. What only one folder's
tests need (a transformer on a mesh, a scan over stacked layers) is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Update = Callable[[Any, Any], Any]
"""The stream after the step, of the stream before it and what the block returned."""


@functools.cache  # one function, so that networks which have it are equal
def momentum(beta: float) -> Update:
    return lambda x, f: beta * x + (1 - beta) * f
