"""The list of compositions: each is a test, and a row of ``docs/compositions.md``.

    python -m tests.torch.registry    # writes the table

A row's outcome is what its test asserts: that nothing differs from the plain network, or the very words of an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.torch.harness import FAST, POLICIES, Case, Make, Setting, check, dropout_block

HERE = Path(__file__).parent
# in the order of the table
FILES = [
    "test_compositions_gradients",
    "test_compositions_hooks",
    "test_compositions_state",
    "test_compositions_blocks",
    "test_compositions_arguments",
    "test_compositions_numbers",
    "test_compositions_contexts",
    "test_compositions_func",
    "test_compositions_compile",
    "test_compositions_devices",
    "test_compositions_objects",
    "test_compositions_failures",
]
TABLE = HERE.parents[1] / "docs" / "compositions.md"


class Row(NamedTuple):
    what: str
    outcome: str
    note: str
    test: str


SECTIONS: dict[str, list[Row]] = {}


class Section:
    """One part of the table."""

    def __init__(self, title: str) -> None:
        self.rows = SECTIONS.setdefault(title, [])

    def _add(self, test: Any, what: str, outcome: str, note: str, bug: str) -> Any:
        self.rows.append(
            Row(
                what,
                f"**bug**: {bug}" if bug else outcome,
                note,
                f"{test.__module__.rpartition('.')[2]}::{test.__name__}",
            )
        )
        return pytest.mark.xfail(strict=True, reason=bug)(test) if bug else test

    def same(
        self,
        what: str,
        *,
        note: str = "",
        make: Make = dropout_block,
        settings: dict[str, Setting] = POLICIES,
        fast: Collection[str] = FAST,
        depth: int = 5,
        tolerance: float = 0,
        bug: str = "",
    ) -> Callable[[Case], Any]:
        """Make a case (a function of a model) a test: the plain network does the same under every setting.

        Settings that are not named in ``fast`` are for the long tier.
        """
        assert any(name in fast for name in settings), f"{what}: mark the test as long, not all of its settings"
        cases = [
            pytest.param(setting, id=name, marks=() if name in fast else pytest.mark.long)
            for name, setting in settings.items()
        ]

        def decorate(case: Case) -> Any:
            @pytest.mark.parametrize("setting", cases)
            def test(setting: Setting) -> None:
                check(case, make, setting, depth, tolerance)

            test.__name__ = test.__qualname__ = case.__name__  # type: ignore[attr-defined]
            test.__module__ = case.__module__
            test.pytestmark += getattr(case, "pytestmark", [])  # type: ignore[attr-defined]
            return self._add(test, what, "works", note, bug)

        return decorate

    def works(self, what: str, *, note: str = "", bug: str = "") -> Callable[[Any], Any]:
        """List a test that makes its own comparison."""
        return lambda test: self._add(test, what, "works", note, bug)

    def differs(self, what: str, how: str, *, note: str = "") -> Callable[[Any], Any]:
        """List a test that shows a limit: what comes out otherwise than in the plain network, and how."""
        return lambda test: self._add(test, what, f"**differs**: {how}", note, "")

    def refuses(self, what: str, error: type[BaseException], text: str, *, note: str = "") -> Callable[[Any], Any]:
        """List a test in which an error with that text is raised, inside ``with refused:``."""

        def decorate(function: Callable[..., Any]) -> Any:
            @functools.wraps(function)
            def test(**fixtures: Any) -> None:
                raised = []

                @contextlib.contextmanager
                def refused() -> Iterator[None]:
                    with pytest.raises(error, match=re.escape(text)):
                        yield
                    raised.append(text)

                function(refused(), **fixtures)
                assert raised, "the test raised nothing inside `with refused:`"

            # pytest fills in all but the first argument, by name
            signature = inspect.signature(function)
            test.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
            return self._add(test, what, f"`{error.__name__}`: {text}", note, "")

        return decorate


def load() -> None:
    for name in FILES:
        importlib.import_module(f"tests.torch.{name}")


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown() -> str:
    load()
    # tests may have been imported in any order
    sections = sorted(SECTIONS.items(), key=lambda section: FILES.index(section[1][0].test.split("::")[0]))
    rows = [row for _, section in sections for row in section]
    lines = [
        "# Compositions (PyTorch)",
        "",
        "What a person does around and inside a reversible network, and what comes of it. *Works* means: values,",
        "gradients, buffers, counts and order of hooks, and the random state afterwards are those of a network written",
        "out by hand that keeps everything; under `Reverse()`, with anchors, and under `Checkpoint()`. Other rows hold",
        "the words of the error that a user sees, or say how the result *differs*; a **bug** is known and not yet",
        "mended.",
        "",
        f"{len(rows)} compositions, each a test in `tests/torch`. This file is written by",
        "`python -m tests.torch.registry`, and a test compares it with the tests.",
    ]
    for title, section in sections:
        cells = [("what", "outcome", "test")]
        for row in section:
            outcome = f"{row.outcome}; {row.note}" if row.note else row.outcome
            cells.append((cell(row.what), cell(outcome), f"`{row.test.split('::')[1].removeprefix('test_')}`"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ("-" * widths[0], "-" * widths[1], "-" * widths[2]))
        lines += ["", f"## {title}", ""]
        lines += ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from tests.torch.registry import TABLE, markdown  # the module that the tests registered with

    TABLE.write_text(markdown())
