"""What tests share: trees of arrays held against each other by :mod:`revcore.parity`, which fails what must fail."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from revcore import cli
from revcore.parity import Record, compare

# ``compiler_options`` that undo conftest.py's XLA_FLAGS: XLA's own defaults on the CPU.
AS_USERS_COMPILE = (
    {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
    if os.environ.get("JAX_PLATFORMS") == "cpu"
    else None
)


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Return the arrays of nested dicts, lists and tuples by dotted name; ``None`` is no array.

    >>> flat({"a": [1.0, (2.0, None)]})
    {'a.0': 1.0, 'a.1.0': 2.0}
    """
    if tree is None:
        return {}
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        items = list(enumerate(tree))
    else:
        return {name or "array": tree}
    return {key: value for k, v in items for key, value in flat(v, f"{name}.{k}" if name else str(k)).items()}


def name_of(value: Any) -> str:
    """Return ``str(value)`` without addresses: the same in every process, as the names of tests must be.

    >>> name_of([name_of])
    '[name_of]'
    """
    return re.sub(r"<function (\S+) at 0x[0-9a-f]+>", r"\1", str(value))


def tree_error(a: Any, b: Any) -> float:
    """Return ``‖a − b‖ / ‖b‖`` over two whole trees; what is missing, not finite, all zero or misshapen fails.

    >>> tree_error({"w": [3.0, 4.0]}, {"w": [3.0, 4.0]})
    0.0
    """
    report = compare(Record(gradients=flat(a), dtype="float64"), Record(gradients=flat(b), dtype="float64"))
    assert not report.problems, f"\n{report}"
    assert report.gradient_error is not None
    return report.gradient_error


def assert_close(a: Any, b: Any, *, depth: int = 1, dtype: str = "float64", limit: float = 16.0) -> None:
    """Fail unless ``‖a − b‖ ≤ limit·depth·eps(dtype)·‖b‖`` over the two whole trees; the failure shows the table.

    >>> assert_close([1.0], [1.0 + 1e-15])
    """
    left, right = (Record(gradients=flat(tree), depth=depth, dtype=dtype) for tree in (a, b))
    report = compare(left, right, limit=limit)
    assert report.ok, f"\n{report}"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["revcore", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None], limit: float = 600.0) -> Path:
    """Return a folder that ``make`` filled, in one of pytest's workers alone; the others wait for it, idle.

    For processes that a whole file of tests looks at. (xdist's own ``--dist loadgroup`` groups nothing in pytest 9.2.)
    """
    base = factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder, done = shared / f"once-{name}", shared / f"once-{name}.done"
    try:
        folder.mkdir()
    except FileExistsError:
        end = time.monotonic() + limit
        while not done.exists():
            assert time.monotonic() < end, f"another worker did not finish {folder} within {limit:.0f} s"
            time.sleep(0.1)
    else:
        try:
            make(folder)
        finally:
            done.touch()
    return folder
