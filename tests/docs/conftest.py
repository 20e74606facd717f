"""What the tests of documentation share: little time spent on compiling programs that run a few times."""

from __future__ import annotations

from tests.tools.conftest import quick_compilation

__all__ = ["quick_compilation"]
