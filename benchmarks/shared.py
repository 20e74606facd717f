"""What the benchmarks share: turns in a new order each round, ratios within a round, tables, and room for labels."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table


class Clock(Protocol):
    """Where steps run, and how time is read there."""

    def seconds(self, step: Any, repeats: int) -> float: ...


def interleaved(
    steps: Mapping[str, Any], where: Clock, rounds: int, least: float = 0.02, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Return seconds a step, one number a round: in each round every way takes one turn, in a new order.

    A turn is as many steps as last ``least`` seconds.
    """
    repeats = {name: max(1, round(least / where.seconds(step, 1))) for name, step in steps.items()}
    order, seconds = list(steps), {name: [] for name in steps}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(where.seconds(steps[name], repeats[name]))
            tick()
    return seconds


@dataclass(frozen=True)
class Ratio:
    """The median of ratios, and the quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, seconds: list[float], base: list[float]) -> Ratio:
        """Compare two ways round by round.

        >>> Ratio.of([2.0, 3.0, 8.0], [1.0, 1.0, 2.0])
        Ratio(low=2.5, median=3.0, high=3.5)
        """
        ratios = [a / b for a, b in zip(seconds, base, strict=True)]
        if len(ratios) == 1:
            return cls(*ratios * 3)
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.2f}"


@dataclass(frozen=True)
class Claim:
    """A figure and its bound."""

    text: str
    value: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.value <= self.bound


def verdict(title: str, claims: list[Claim]) -> str:
    """Return a table of claims, each with its bound and whether it holds."""
    made = table(title, "measured", "bound", "")
    for claim in claims:
        made.add_row(claim.text, f"{claim.value:.3f}", f"≤ {claim.bound:.2f}", "yes" if claim.ok else "**no**")
    return markdown(made)


def machine(*packages: str) -> str:
    """Return where this runs, and the versions of ``packages``: what a record begins with.

    >>> machine("numpy").split(", ")[2:]
    ['Python 3...', 'numpy ...']
    """
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", f"Python {platform.python_version()}", *versions])


def table(*columns: str) -> Table:
    """Return an empty table for :func:`markdown`, all but its first column flush right."""
    made = Table(*columns, box=box.MARKDOWN, pad_edge=True)
    for column in made.columns[1:]:
        column.justify = "right"
    return made


def markdown(made: Table) -> str:
    """Return a table as Markdown."""
    out = io.StringIO()
    Console(file=out, width=240).print(made)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip())


def apart(heights: list[float], gap: float) -> list[float]:
    """Move labels apart by ``gap``, as little as goes, their order kept.

    >>> apart([9.0, 1.0, 1.0], gap=1.0)
    [9.0, 0.5, 1.5]
    """
    groups: list[list[int]] = []  # labels that touch, from the lowest up, each group about its mean

    def middle(group: list[int]) -> float:
        return sum(heights[i] for i in group) / len(group)

    def reach(group: list[int]) -> float:
        return gap * (len(group) - 1) / 2

    for i in sorted(range(len(heights)), key=heights.__getitem__):
        groups.append([i])
        while len(groups) > 1 and middle(groups[-2]) + reach(groups[-2]) + gap > middle(groups[-1]) - reach(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = {i: middle(g) - reach(g) + gap * k for g in groups for k, i in enumerate(g)}
    return [placed[i] for i in range(len(heights))]
