"""The backends under test."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from backends import BACKENDS, Backend


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Hundreds of small programs take gigabytes."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


_made: dict[str, Backend] = {}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn. One that is not installed is skipped at home, and an error where CI is set."""
    return load_backend(request.param)


def load_backend(name: str, environ: Any = os.environ) -> Backend:
    if name not in _made:
        try:
            importlib.import_module(f"revcore_{name}")
        except ImportError as error:
            if environ.get("CI"):
                raise
            pytest.skip(f"no {name} here: {error}")
        _made[name] = BACKENDS[name]()
    return _made[name]
