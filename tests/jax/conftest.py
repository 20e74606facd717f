"""What the JAX tests share: float64, and little time spent on compiling small programs well."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """Switch float64 on, and XLA's optimisations off: they cost more than they save here, and move no result's law."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def quick() -> Iterator[None]:
    """XLA's optimisations off, for tests that do not depend on what it makes of two runs of a block."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
