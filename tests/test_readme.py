"""What the README and the guides show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/jax.md", "docs/migration.md", "docs/numerics.md")
BLOCKS = [
    pytest.param(page, code, id=f"{page}, {i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE))
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_example_runs(page: str, code: str) -> None:
    exec(compile(code, page, "exec"), {"__name__": "page"})


def test_there_are_examples_for_both_frameworks() -> None:
    shown = [str(block.values[1]) for block in BLOCKS if block.values[0] == "README.md"]
    assert len(shown) >= 3
    assert any("revcore_torch" in code for code in shown)
    assert any("revcore_jax" in code for code in shown)
