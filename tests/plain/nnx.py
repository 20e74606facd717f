"""The plain network in Flax NNX."""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tests.plain import Update


class Plain(nnx.Module):
    """Two streams; ``rngs`` goes to blocks that have the keyword (``takes``), as in ``nnx.Sequential``."""

    def __init__(self, *layers: Any, takes: bool = False, update: Update = operator.add) -> None:
        self.layers = nnx.List(layers)
        self.takes, self.update = takes, update

    def __call__(self, x: Any, rngs: Any = None) -> Any:
        a, b = jnp.split(x, 2, -1)
        for layer in self.layers:
            a, b = b, self.update(a, layer(b, rngs=rngs) if self.takes else layer(b))
        return jnp.concatenate([a, b], -1)
