"""The plain network in Flax Linen."""

from __future__ import annotations

import operator
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tests.plain import Update


class Plain(nn.Module):
    """Two streams."""

    layers: Any
    update: Update = operator.add

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        a, b = jnp.split(x, 2, -1)
        for layer in self.layers:
            a, b = b, self.update(a, layer(b, **kwargs))
        return jnp.concatenate([a, b], -1)
