"""Orbax saves and restores reversible NNX models, in the layout of a list of blocks and of stacked ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from revcore import Chain, Couple, Program, Repeat
from revcore_jax.nnx import ReversibleSequential, stack, unstack
from tests.flax.nnx_models import Mode, arrays, blocks, loss

pytestmark = pytest.mark.usefixtures("x64")

MODE = Mode(jnp.float64, jit=False)
SCAN = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 2)])


def as_list() -> ReversibleSequential:
    return ReversibleSequential(*blocks(jnp.float64, 4))


def as_stack() -> ReversibleSequential:
    layers = blocks(jnp.float64, 4)
    return ReversibleSequential(stack(layers[::2]), stack(layers[1::2]), program=SCAN)


def trained(make: Any) -> tuple[Any, Any]:
    model = make()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    step(model, optimizer, 0)
    return model, optimizer


@nnx.jit
def _step(model: Any, optimizer: Any, x: Any) -> None:
    optimizer.update(model, nnx.grad(loss)(model, x))


def step(model: Any, optimizer: Any, seed: int) -> None:
    _step(model, optimizer, MODE.x(seed=seed))


def saved(folder: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
    return folder / "state"


@pytest.mark.parametrize("make", [as_list, pytest.param(as_stack, marks=pytest.mark.long)])
def test_training_goes_on_from_a_checkpoint(make: Any, tmp_path: Path) -> None:
    """Model, optimizer and random counts are restored into an abstract model; the next step is the same to the bit."""
    model, optimizer = trained(make)

    def both() -> Any:
        model = make()
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    where = saved(tmp_path, _plain(nnx.state((model, optimizer))))
    graph, abstract = nnx.split(nnx.eval_shape(both))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(where, _plain(abstract))
    again, optimizer_again = nnx.merge(graph, _filled(abstract, restored))
    step(model, optimizer, 1)
    step(again, optimizer_again, 1)
    assert all(jnp.array_equal(a, b) for a, b in zip(arrays(model), arrays(again), strict=True))


@pytest.mark.parametrize("make", [pytest.param(as_list, marks=pytest.mark.long), as_stack])
def test_one_layout_is_restored_into_the_other(make: Any, tmp_path: Path) -> None:
    model, _ = trained(make)
    where = saved(tmp_path, _plain(nnx.state(model)))
    graph, abstract = nnx.split(nnx.eval_shape(make))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = nnx.merge(graph, _filled(abstract, checkpointer.restore(where, _plain(abstract))))
    if make is as_list:
        other = ReversibleSequential(*(stack(list(restored.layers)[i::2]) for i in range(2)), program=SCAN)
    else:
        other = ReversibleSequential(*(m for two in zip(*map(unstack, restored.layers), strict=True) for m in two))
    assert jnp.allclose(other(MODE.x()), model(MODE.x()), rtol=1e-12)
    ours, theirs = (m if make is as_stack else n for m, n in ((model, other), (other, model)))
    flat = [m for two in zip(*map(unstack, ours.layers), strict=True) for m in two]
    MODE.same([nnx.state(m) for m in flat], [nnx.state(m) for m in theirs.layers])


def _plain(state: Any) -> Any:
    """Return a state as nested dicts, keys as their data: Orbax knows neither NNX's variables nor typed keys."""
    return jax.tree.map(_data, nnx.to_pure_dict(state))


def _data(leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return (
        jax.eval_shape(jax.random.key_data, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        else jax.random.key_data(leaf)
    )


def _filled(abstract: Any, data: Any) -> Any:
    def back(leaf: Any, new: Any) -> Any:
        return jax.random.wrap_key_data(new) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else new

    pure = jax.tree.map(back, nnx.to_pure_dict(abstract), data)
    nnx.replace_by_pure_dict(abstract, pure)
    return abstract
