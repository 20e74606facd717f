"""Haiku functions through the functional core: hk.transform gives a block its parameters and its key."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import revcore_jax
from revcore import Chain, Couple, Program, Repeat, revnet
from tests.flax.nnx_models import Mode, modes

hk = pytest.importorskip("haiku", reason="dm-haiku is a test extra (dev)")

pytestmark = pytest.mark.usefixtures("x64")

D = 4


def function(x: Any) -> Any:
    """Linear, tanh, dropout, Linear, as Haiku writes them."""
    x = jnp.tanh(hk.Linear(D)(x))
    return hk.Linear(D)(hk.dropout(hk.next_rng_key(), 0.4, x))


BLOCK = hk.transform(function)


def block(params: Any, x: Any, key: Any) -> Any:
    return BLOCK.apply(params, key, x)


def setup(mode: Mode, n: int) -> tuple[list[Any], Any, Any]:
    x = mode.x(d=D), mode.x(d=D, seed=1)
    keys = jax.random.split(jax.random.key(0), (2, n))
    return [BLOCK.init(key, x[0]) for key in keys[0]], x, keys[1]


def total(out: Any) -> Any:
    return sum(jnp.sum(jnp.sin(y)) for y in out)


def plain(params: Any, x: Any, keys: Any) -> Any:
    a, b = x
    for p, key in zip(params, keys, strict=True):
        a, b = b, a + block(p, b, key)
    return total((a, b))


def gradient(mode: Mode, run: Any) -> Any:
    step = jax.value_and_grad(run, argnums=(0, 1))
    return jax.jit(step) if mode.jit else step


@modes
def test_transformed_functions(mode: Mode) -> None:
    params, x, keys = setup(mode, 4)

    def ours(params: Any, x: Any, keys: Any) -> Any:
        layerwise = [((key,), {}) for key in keys]
        return total(revcore_jax.reversible(revnet(4), [block] * 4, params, x, layerwise_args_kwargs=layerwise))

    mode.same(gradient(mode, ours)(params, x, keys), gradient(mode, plain)(params, x, keys))


@modes
def test_stacked_parameters_are_scanned(mode: Mode) -> None:
    params, x, keys = setup(mode, 6)
    program = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 3)])

    def ours(params: Any, x: Any, keys: Any) -> Any:
        stacked = [revcore_jax.stack(params[i::2]) for i in range(2)]
        layerwise = [((keys[i::2],), {}) for i in range(2)]
        return total(revcore_jax.reversible(program, [block] * 2, stacked, x, layerwise_args_kwargs=layerwise))

    mode.same(gradient(mode, ours)(params, x, keys), gradient(mode, plain)(params, x, keys), depth=6)


@modes
def test_state_leaves_as_an_extra_output(mode: Mode) -> None:
    """hk.transform_with_state: a block returns its new state beside its output, and it comes back once."""

    def normed(x: Any) -> Any:
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(D)(x), is_training=True)

    f = hk.without_apply_rng(hk.transform_with_state(normed))
    x = mode.x(d=D), mode.x(d=D, seed=1)
    params, states = zip(*(f.init(key, x[0]) for key in jax.random.split(jax.random.key(0), 4)), strict=True)

    def ours(params: Any, states: Any) -> Any:
        layerwise = [((state,), {}) for state in states]
        y, aux = revcore_jax.reversible(
            revnet(4), [lambda p, x, s: f.apply(p, s, x)] * 4, params, x, layerwise_args_kwargs=layerwise
        )
        return total(y), [state for (state,) in aux]

    def one_by_one(params: Any, states: Any) -> Any:
        (a, b), after = x, []
        for p, s in zip(params, states, strict=True):
            out, s = f.apply(p, s, b)
            a, b = b, a + out
            after.append(s)
        return total((a, b)), after

    grads = [jax.value_and_grad(run, has_aux=True) for run in (ours, one_by_one)]
    got, want = ((jax.jit(g) if mode.jit else g)(list(params), list(states)) for g in grads)
    mode.same(got, want)
