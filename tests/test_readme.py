"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples_for_both_frameworks() -> None:
    assert len(BLOCKS) >= 3
    assert any("revcore_torch" in code for code in BLOCKS)
    assert any("revcore_jax" in code for code in BLOCKS)
