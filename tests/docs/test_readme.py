"""What the README and the guides show runs."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("quickly_compiled_module")
ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/jax.md", "docs/migration.md", "docs/numerics.md")  # each block is complete, to be copied
# Read from the top: a block has the names of those above.
GUIDES = ("docs/guide-pytorch.md", "docs/guide-coupling.md", "docs/huggingface.md", "docs/trainers.md")


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


BLOCKS = [pytest.param(page, code, id=f"{page}, {i}") for page in PAGES for i, code in enumerate(blocks_of(page))]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_example_runs(page: str, code: str) -> None:
    exec(compile(code, page, "exec"), {"__name__": "page"})


# Lightning's own, with PyTorch 2.13 and on few cores
@pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:The '.*' does not have many workers")
@pytest.mark.parametrize("page", GUIDES)
def test_guide_runs(page: str) -> None:
    names = {"__name__": "page"}
    sys.modules["page"] = types.ModuleType("page")  # dataclasses look for the module of their class
    try:
        for code in blocks_of(page):
            exec(compile(code, page, "exec"), names)
    finally:
        del sys.modules["page"]


def test_there_are_examples_for_both_frameworks() -> None:
    shown = [str(block.values[1]) for block in BLOCKS if block.values[0] == "README.md"]
    assert len(shown) >= 3
    assert any("revcore_torch" in code for code in shown)
    assert any("revcore_jax" in code for code in shown)
