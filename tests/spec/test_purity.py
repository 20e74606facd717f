"""``import revcore`` loads no array library, and the test that says so would notice one."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("numpy", "torch", "jax")


def loaded_by(statement: str) -> set[str]:
    """Run ``statement`` in a fresh interpreter and return which of the array libraries it loaded."""
    code = f"import sys\n{statement}\nprint(*({set(HEAVY)!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(result.stdout.split())


USE = """
import revcore
program = revcore.revnet(4, revcore.Momentum(0.9), 3)
assert revcore.Program.from_dict(program.to_dict()) == program
revcore.Reverse(anchor_every=2), revcore.StoreAll(), revcore.Checkpoint(2)
"""


@pytest.mark.parametrize("statement", ["import revcore", USE], ids=["import", "use"])
def test_revcore_loads_no_array_library(statement: str) -> None:
    assert loaded_by(statement) == set()


@pytest.mark.parametrize("statement", ["import numpy, revcore", "import revcore; revcore.check_coupling"])
def test_the_test_above_would_notice(statement: str) -> None:
    assert loaded_by(statement) == {"numpy"}


def test_reference_and_parity_load_no_framework() -> None:
    assert loaded_by("import revcore.reference, revcore.parity, revcore.weights, revcore.laws") == {"numpy"}


def test_every_public_name_is_there() -> None:
    import revcore

    assert [name for name in revcore.__all__ if getattr(revcore, name, None) is None] == []
    with pytest.raises(AttributeError, match="module 'revcore' has no attribute 'colour'"):
        _ = revcore.colour  # type: ignore[attr-defined]
