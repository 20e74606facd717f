"""A small Linen network by revcore_jax and as ordinary Linen, and how a training step of both is held together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from revcore import Chain, Couple, Momentum, Program, Repeat
from revcore_jax.linen import ReversibleSequential
from tests.helpers import assert_close, tree_error
from tests.plain import momentum
from tests.plain.linen import Plain
from tests.tiers import product

D, ROWS = 4, 6
BETA = 0.9
BODY = Chain([Couple(0, 1, Momentum(BETA)), Couple(1, 0, Momentum(BETA))])

Mode = Literal["float64", "float32-jit"]
MODES: tuple[Mode, ...] = ("float64", "float32-jit")
# one of them in the fast tier: under jit, which compiles once what would be thirty operations
in_both_modes = pytest.mark.parametrize("mode", product(MODES, fast=lambda mode: mode == "float32-jit"))
step_by_step = pytest.mark.parametrize("mode", product(MODES, fast=lambda mode: mode == "float64"))


class Block(nn.Module):
    """BatchNorm, Dense, tanh, Dropout; sows its input."""

    train: bool = True

    @nn.compact
    def __call__(self, x: Any, train: bool | None = None) -> Any:
        train = self.train if train is None else train
        self.sow("intermediates", "seen", x)
        x = jnp.tanh(nn.Dense(D)(nn.BatchNorm(use_running_average=not train)(x)))
        return nn.Dropout(0.4, deterministic=not train)(x)


class Using(nn.Module):
    """A block with a Dense of somebody else's before its own."""

    dense: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return jnp.tanh(nn.Dense(D)(self.dense(x)))


class Small(nn.Module):
    """Dense and tanh."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return jnp.tanh(nn.Dense(D)(x))


class PlainScan(nn.Module):
    """``n`` times two blocks, by ``nn.scan``."""

    layers: Any
    n: int
    settings: Any = ()

    def __call__(self, x: Any, layerwise: Any = None, **kwargs: Any) -> Any:
        def body(mdl: Any, streams: Any, layerwise: Any) -> Any:
            a, b = streams
            more = layerwise or ({}, {})
            a = BETA * a + (1 - BETA) * mdl.layers[0](b, **kwargs, **more[0])
            b = BETA * b + (1 - BETA) * mdl.layers[1](a, **kwargs, **more[1])
            return (a, b), ()

        settings = {"variable_axes": {True: 0}, "split_rngs": {True: True}, **dict(self.settings)}
        # the check for constants runs the body once more, which counts random numbers twice
        check = self.is_initializing()
        scan = nn.scan(body, length=self.n, check_constancy_invariants=check, **settings)
        (a, b), _ = scan(self, tuple(jnp.split(x, 2, -1)), layerwise)
        return jnp.concatenate([a, b], -1)


Net = Callable[..., Any]  # makes a network of its blocks
NETS: tuple[Net, Net] = partial(ReversibleSequential, coupling=Momentum(BETA)), partial(Plain, update=momentum(BETA))


def repeated(n: int = 3) -> Program:
    return Program([Repeat(BODY, n)])


def scans(make: Callable[[], Any], n: int = 3, **settings: Any) -> tuple[Any, Any]:
    """Return the scanned network by revcore and by ``nn.scan``."""
    # pairs: Linen sorts the keys of dictionaries among a module's attributes
    pairs = tuple(settings.items())
    return ReversibleSequential(make(), program=repeated(n), **settings), PlainScan(make(), n, pairs)


def inputs(*lead: int, seed: int = 0, d: int = 2 * D) -> Any:
    return np.random.default_rng(seed).standard_normal((*lead, ROWS, d))


def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda a: jnp.asarray(a, dtype) if jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating) else a, tree
    )


def start(model: Any, x: Any, dtype: Any = jnp.float64, **kwargs: Any) -> Any:
    """Return variables of the shapes that ``init`` makes, of numbers that are all unlike."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(partial(model.init, **kwargs), keys, jnp.asarray(x, dtype))
    rng = np.random.default_rng(5)
    filled = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.2, 0.8, s.shape), dtype), shapes)
    return {name: tree for name, tree in filled.items() if name != "intermediates"}


def train_step(
    model: Any, variables: Any, x: Any, mutable: Any = ("batch_stats", "intermediates"), **kwargs: Any
) -> dict[str, Any]:
    """Return gradients by parameters and by ``x``, and changed collections, of one step."""
    state = {k: v for k, v in variables.items() if k != "params"}
    rngs = {"dropout": jax.random.key(7)}

    def loss(params: Any, x: Any) -> Any:
        y = model.apply({"params": params, **state}, x, rngs=rngs, mutable=mutable, **kwargs)
        y, changed = y if mutable is not False else (y, {})
        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y)), changed

    (value, changed), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return {"value": value, "gradients": gradients, "changed": changed}


def check_step(
    ours: Any, plain: Any, mode: Mode, x: Any = None, depth: int = 4, variables: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """Fail unless a training step of both is one, in structure and numbers; return both."""
    dtype = jnp.float64 if mode == "float64" else jnp.float32
    x = jnp.asarray(inputs() if x is None else x, dtype)
    variables = start(plain, x, dtype) if variables is None else cast(variables, dtype)
    results = []
    for model in (ours, plain):
        step = partial(train_step, model, **kwargs)
        results.append((jax.jit(step) if mode != "float64" else step)(variables, x))
    got, want = (unboxed(r) for r in results)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    if mode == "float64":
        assert tree_error(got, want) <= 1e-12
    else:
        assert_close(got, want, depth=depth, dtype="float32")
    return results[0], results[1]


def unboxed(tree: Any) -> Any:
    return nn.meta.unbox(tree)
