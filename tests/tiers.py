"""Two tiers of tests: the fast one finds every mutant in ten minutes; the long one is the rest of each product.

A test or a parameter with ``@pytest.mark.long`` is in the long tier. README.md says which cases belong there.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

TIERS = "fast", "long", "all"


def product(*axes: Iterable[Any], fast: Callable[..., bool], name: Callable[[Any], str] = str) -> list[Any]:
    """Return what ``parametrize`` takes for all combinations; those that are not ``fast(*combination)`` are long.

    >>> cases = product([1, 2], "a", fast=lambda n, _: n < 2)
    >>> [(case.values, case.id, [mark.name for mark in case.marks]) for case in cases]
    [((1, 'a'), '1-a', []), ((2, 'a'), '2-a', ['long'])]
    """
    return [
        pytest.param(*case, id="-".join(map(name, case)), marks=() if fast(*case) else pytest.mark.long)
        for case in itertools.product(*axes)
    ]


def in_share(nodeid: str, share: str) -> bool:
    """Tell whether a long test is in a share like ``"3/10"``: each is in one of them, in every process the same.

    >>> [sum(in_share("tests/a.py::b", f"{i}/10") for i in range(10)), in_share("tests/a.py::b", "0/1")]
    [1, True]
    """
    which, of = map(int, share.split("/"))
    return zlib.crc32(nodeid.encode()) % of == which % of


def select(items: list[pytest.Item], tier: str, share: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests that run, and those that do not."""
    chosen, left = [], []
    for item in items:
        long = item.get_closest_marker("long") is not None
        wanted = tier == "all" or (
            in_share(item.nodeid, share) if long and tier == "long" else long == (tier == "long")
        )
        (chosen if wanted else left).append(item)
    return chosen, left


def ordered(items: Sequence[pytest.Item], order: str) -> list[pytest.Item]:
    """Return tests in the ``given`` order, in ``reverse``, or files and the tests of each shuffled by a seed."""
    if order == "given":
        return list(items)
    if order == "reverse":
        return list(items)[::-1]
    shuffled = random.Random(int(order))
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    for of_file in files.values():
        shuffled.shuffle(of_file)
    groups = list(files.values())
    shuffled.shuffle(groups)
    return [item for group in groups for item in group]
