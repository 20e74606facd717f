"""Equinox modules through the functional core, against the same modules one after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import revcore_jax
from revcore import Chain, Couple, Program, Repeat, Reverse, revnet
from tests.flax.nnx_models import Mode, modes

eqx = pytest.importorskip("equinox", reason="equinox is a test extra (dev)")

pytestmark = pytest.mark.usefixtures("x64")

D = 4


class Block(eqx.Module):
    """Linear layers, a function and a number among the leaves, and dropout with a key of the call."""

    first: Any
    dropout: Any
    second: Any
    activation: Any
    slope: float
    name: str = eqx.field(static=True)

    def __init__(self, key: Any, dtype: Any, name: str = "block") -> None:
        k1, k2 = jax.random.split(key)
        self.first, self.second = eqx.nn.Linear(D, D, dtype=dtype, key=k1), eqx.nn.Linear(D, D, dtype=dtype, key=k2)
        self.dropout = eqx.nn.Dropout(0.4)
        self.activation, self.slope, self.name = jnp.tanh, 0.5, name

    def __call__(self, x: Any, key: Any = None) -> Any:
        hidden = self.slope * self.activation(jax.vmap(self.first)(x))
        return jax.vmap(self.second)(self.dropout(hidden, key=key, inference=key is None))


def call(block: Any, x: Any, **kwargs: Any) -> Any:
    """Any callable pytree is its own parameters."""
    return block(x, **kwargs)


def blocks(dtype: Any, n: int = 4) -> list[Block]:
    return [Block(key, dtype) for key in jax.random.split(jax.random.key(0), n)]


def streams(mode: Mode) -> tuple[Any, Any]:
    return mode.x(d=D), mode.x(d=D, seed=1)


def plain(blocks: Any, a: Any, b: Any, keys: Any = None) -> Any:
    for i, block in enumerate(blocks):
        a, b = b, a + (block(b) if keys is None else block(b, key=keys[i]))
    return a, b


def total(out: Any) -> Any:
    return sum(jnp.sum(jnp.sin(y)) for y in out)


def gradient(mode: Mode, function: Any) -> Any:
    step = eqx.filter_value_and_grad(function)
    return eqx.filter_jit(step) if mode.jit else step


@modes
def test_modules_as_parameters(mode: Mode) -> None:
    """Their arrays get gradients; functions, numbers and strings in them are static."""
    program = revnet(4)

    def ours(blocks: Any, x: Any) -> Any:
        return total(revcore_jax.reversible(program, [call] * 4, blocks, x))

    got = gradient(mode, ours)(blocks(mode.dtype), streams(mode))
    want = gradient(mode, lambda blocks, x: total(plain(blocks, *x)))(blocks(mode.dtype), streams(mode))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    mode.same(got, want)


@modes
def test_partition_and_combine(mode: Mode) -> None:
    """As Equinox's own examples freeze a part: the trained half is the argument, the other is closed over."""
    program = revnet(4)
    which = [eqx.tree_at(lambda b: b.first.weight, jax.tree.map(lambda _: False, b), True) for b in blocks(mode.dtype)]
    trained, frozen = eqx.partition(blocks(mode.dtype), which)

    def ours(trained: Any, x: Any) -> Any:
        return total(revcore_jax.reversible(program, [call] * 4, eqx.combine(trained, frozen), x))

    got = gradient(mode, ours)(trained, streams(mode))
    want = gradient(mode, lambda t, x: total(plain(eqx.combine(t, frozen), *x)))(trained, streams(mode))
    mode.same(got, want)
    assert len(jax.tree.leaves(got[1])) == 4


@modes
def test_dropout_keys_of_each_layer(mode: Mode) -> None:
    keys = list(jax.random.split(jax.random.key(3), 4))

    def ours(blocks: Any, x: Any) -> Any:
        layerwise = [((), {"key": key}) for key in keys]
        policy = Reverse(keep_last=1)
        return total(
            revcore_jax.reversible(revnet(4), [call] * 4, blocks, x, layerwise_args_kwargs=layerwise, policy=policy)
        )

    got = gradient(mode, ours)(blocks(mode.dtype), streams(mode))
    want = gradient(mode, lambda b, x: total(plain(b, *x, keys=keys)))(blocks(mode.dtype), streams(mode))
    mode.same(got, want)


@modes
def test_stacked_modules_are_scanned(mode: Mode) -> None:
    """Made by eqx.filter_vmap, run in a Repeat."""
    keys = jax.random.split(jax.random.key(0), (2, 3))
    stacked = [eqx.filter_vmap(lambda key: Block(key, mode.dtype))(k) for k in keys]
    program = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 3)])

    def ours(blocks: Any, x: Any) -> Any:
        return total(revcore_jax.reversible(program, [call] * 2, blocks, x))

    def one_by_one(stacked: Any, x: Any) -> Any:
        take = [jax.tree.map(lambda a, i=i: a[i] if eqx.is_array(a) else a, b) for i in range(3) for b in stacked]
        return total(plain(take, *x))

    mode.same(gradient(mode, ours)(stacked, streams(mode)), gradient(mode, one_by_one)(stacked, streams(mode)))


def test_inside_an_equinox_model() -> None:
    """A trunk as a module, with filter_grad, filter_vmap over inputs, and apply_updates."""
    mode = Mode(jnp.float64, False)

    class Trunk(eqx.Module):
        blocks: list[Block]
        reversible: bool = eqx.field(static=True)

        def __call__(self, x: Any) -> Any:
            parts = tuple(jnp.split(x, 2, -1))
            if self.reversible:
                parts = revcore_jax.reversible(revnet(len(self.blocks)), [call] * len(self.blocks), self.blocks, parts)
            else:
                parts = plain(self.blocks, *parts)
            return jnp.concatenate(parts, -1)

    def cost(model: Any, x: Any) -> Any:
        return jnp.sum(jnp.sin(eqx.filter_vmap(model)(x)))

    models = []
    for reversible in (True, False):
        model = Trunk(blocks(jnp.float64), reversible)
        for _ in range(2):
            grads = eqx.filter_grad(cost)(model, mode.x(2))
            model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))
        models.append(eqx.filter(model, eqx.is_array))
    mode.same(jax.tree.leaves(models[0]), jax.tree.leaves(models[1]))
