"""The backends under test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.conformance.backends import BACKENDS, Backend, load_backend


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Hundreds of small programs take gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn. One that is not installed is skipped at home, and an error where CI is set."""
    return load_backend(request.param)
