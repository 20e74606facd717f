"""Drift in JAX: a warning before training, and a probe of what a backward pass rebuilds."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from revcore.drift import foresee, warn_of_drift
from revcore.policy import Policy
from revcore.program import Program


def watched(program: Program, policy: Policy, streams: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return ``streams``, whose first derivative warns where gradients are predicted to be off by more than 1 %."""
    dtypes = tuple(stream.dtype.name for stream in streams)
    with jax.ensure_compile_time_eval():
        words = foresee(program, dtypes, policy, jnp.asarray)
    return streams if words is None else _watched((program, dtypes, policy, words), streams)


# Only what is differentiated is rebuilt, and JAX tells nobody else.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(warning: Any, streams: Any) -> Any:
    return streams


def _forward(warning: Any, streams: Any) -> Any:
    warn_of_drift(*warning)
    return streams, None


_watched.defvjp(_forward, lambda warning, _, g: (g,))
