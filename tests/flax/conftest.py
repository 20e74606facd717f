"""The Flax tests run in the JAX tests' float64."""

from tests.jax.conftest import x64

__all__ = ["x64"]
