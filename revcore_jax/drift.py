"""Drift in JAX: a warning before training, and a probe of what a backward pass rebuilds."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from revcore.drift import foresee, warn_of_drift
from revcore.policy import Policy
from revcore.program import Program
from revcore_jax.trees import is_inexact


def watched(program: Program, policy: Policy, streams: tuple[Any, ...], given: Any) -> Any:
    """Return ``given``, whose first derivative warns where gradients are predicted to be off by more than 1 %.

    ``given`` is all that gets a gradient: a network's first streams often get none.
    """
    dtypes = tuple(stream.dtype.name for stream in streams)
    with jax.ensure_compile_time_eval():
        words = foresee(program, dtypes, policy, jnp.asarray)
    if words is None:
        return given
    leaves, tree = jax.tree.flatten(given)
    places = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
    through: Any = _watched((program, dtypes, policy, words), [leaves[i] for i in places])
    for i, leaf in zip(places, through, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)


# Only what is differentiated is rebuilt, and JAX tells nobody else.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watched(warning: Any, leaves: Any) -> Any:
    return leaves


def _forward(warning: Any, leaves: Any) -> Any:
    warn_of_drift(*warning)
    return leaves, None


_watched.defvjp(_forward, lambda warning, _, g: (g,))
