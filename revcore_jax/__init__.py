"""revcore for JAX: reversible networks whose activation memory does not grow with depth.

>>> import jax, jax.numpy as jnp, revcore, revcore_jax
>>> program = revcore.Program([revcore.Repeat(revcore.Chain([revcore.Couple(0, 1), revcore.Couple(1, 0)]), 12)])
>>> def block(w, x):
...     return jnp.tanh(x @ w)
>>> params = [0.1 * jnp.ones((12, 4, 4))] * 2
>>> loss = lambda params, x: sum(y.sum() for y in revcore_jax.reversible(program, [block] * 2, params, (x, x)))
>>> jax.grad(loss)(params, jnp.ones((2, 4)))[0].shape
(12, 4, 4)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from revcore.policy import Checkpoint, Reverse, StoreAll
from revcore_jax.engine import check_inverse, inverse, reversible
from revcore_jax.probe import DriftProbe
from revcore_jax.trees import stack, unstack

if TYPE_CHECKING:
    from revcore_jax import linen as linen
    from revcore_jax import nnx as nnx
    from revcore_jax.neutral import from_neutral as from_neutral
    from revcore_jax.neutral import to_neutral as to_neutral

__all__ = [
    "Checkpoint",
    "DriftProbe",
    "Reverse",
    "StoreAll",
    "check_inverse",
    "from_neutral",
    "inverse",
    "linen",
    "nnx",
    "reversible",
    "stack",
    "to_neutral",
    "unstack",
]


# These need flax, which the engine does not.
_LAZY = {"from_neutral": "neutral", "linen": "linen", "nnx": "nnx", "to_neutral": "neutral"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'revcore_jax' has no attribute {name!r}")
    module = importlib.import_module(f"revcore_jax.{_LAZY[name]}")
    return module if _LAZY[name] == name else getattr(module, name)
