"""A Linen ReversibleSequential in training: TrainState, optax, donated buffers, Orbax, flax.serialization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import serialization
from flax.training.train_state import TrainState

import revcore_jax
from revcore import Program
from revcore_jax.linen import ReversibleSequential
from revcore_jax.neutral import from_neutral, linen_layers, to_neutral
from tests.flax.linen_models import BODY, NETS, Block, D, Small, inputs, scans, start
from tests.helpers import tree_error

pytestmark = pytest.mark.usefixtures("x64")

N = 3


class State(TrainState):
    """With BatchNorm's statistics and a key."""

    batch_stats: Any
    key: Any


def train(model: Any, variables: Any, steps: int = 3) -> State:
    state = State.create(
        apply_fn=model.apply,
        params=jax.tree.map(jnp.copy, variables["params"]),
        tx=optax.adamw(1e-2),
        batch_stats=jax.tree.map(jnp.copy, variables["batch_stats"]),
        key=jax.random.key(3),
    )

    def step(state: State, x: Any) -> State:
        def loss(params: Any) -> Any:
            y, changed = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                rngs={"dropout": jax.random.fold_in(state.key, state.step)},
                mutable=["batch_stats"],
            )
            return jnp.mean((y - jnp.sin(x)) ** 2), changed

        gradients, changed = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradients, batch_stats=changed["batch_stats"])

    step = jax.jit(step, donate_argnums=0)
    for seed in range(steps):
        before = state
        state = step(state, jnp.asarray(inputs(seed=seed)))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.batch_stats)))
    return state


@pytest.mark.parametrize("repeat", [pytest.param(False, marks=pytest.mark.long), True])
def test_train_state(repeat: bool) -> None:
    """Three steps of AdamW with donated buffers end where the plain network ends."""
    make = lambda: [Block(), Small()]  # noqa: E731
    ours, plain = scans(make) if repeat else (net(make()) for net in NETS)
    variables = start(plain, inputs())
    got, want = (train(m, variables) for m in (ours, plain))
    assert int(got.step) == 3
    assert tree_error([got.params, got.batch_stats], [want.params, want.batch_stats]) <= 1e-12
    adam: Any = [state.opt_state[0] for state in (got, want)]  # type: ignore[index]
    assert tree_error(adam[0].nu, adam[1].nu) <= 1e-12
    assert tree_error(got.params, variables["params"]) > 1e-3


def stacked() -> Any:
    return scans(lambda: [Block(train=False), Block(train=False)], n=N)[0]


def to_stack(variables: Any) -> Any:
    """From ``layers_0`` … ``layers_5`` to two layers with three iterations each."""
    return {
        name: {f"layers_{k}": revcore_jax.stack([tree[f"layers_{2 * i + k}"] for i in range(N)]) for k in range(2)}
        for name, tree in variables.items()
    }


def to_list(variables: Any) -> Any:
    parts = {name: [revcore_jax.unstack(tree[f"layers_{k}"]) for k in range(2)] for name, tree in variables.items()}
    return {name: {f"layers_{2 * i + k}": p[k][i] for i in range(N) for k in range(2)} for name, p in parts.items()}


def test_stacked_and_listed_layouts_are_one_network() -> None:
    layers = [Block(train=False) for _ in range(2 * N)]
    apart: Any = ReversibleSequential(layers, program=Program([BODY] * N))
    variables = start(apart, inputs())
    got, want = stacked().apply(to_stack(variables), inputs()), apart.apply(variables, inputs())
    assert tree_error(got, want) <= 1e-12
    back = to_list(to_stack(variables))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(variables)))


def test_orbax_across_layouts(tmp_path: Path) -> None:
    """Saved layer by layer, restored for a Repeat, and the other way."""
    apart: Any = ReversibleSequential([Block(train=False) for _ in range(2 * N)], program=Program([BODY] * N))
    variables, x = start(apart, inputs()), jnp.asarray(inputs())
    want = apart.apply(variables, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "listed", variables)
        checkpointer.save(tmp_path / "stacked", to_stack(variables))
        checkpointer.wait_until_finished()
        shapes = jax.eval_shape(lambda: variables)
        restored = checkpointer.restore(tmp_path / "listed", shapes)
        assert tree_error(stacked().apply(to_stack(restored), x), want) <= 1e-12
        restored = checkpointer.restore(tmp_path / "stacked", jax.eval_shape(to_stack, shapes))
        assert tree_error(apart.apply(to_list(restored), x), want) <= 1e-12


@pytest.mark.parametrize("repeat", [pytest.param(False, marks=pytest.mark.long), True])
def test_flax_serialization(repeat: bool) -> None:
    model = stacked() if repeat else NETS[0]([Block(train=False), Small()])
    variables, x = start(model, inputs()), inputs()
    empty = jax.tree.map(jnp.zeros_like, variables)
    restored = serialization.from_bytes(empty, serialization.to_bytes(variables))
    assert np.array_equal(model.apply(restored, x), model.apply(variables, x))


def test_the_neutral_form_of_a_repeat() -> None:
    """The names of the layer by layer network, a leading axis on every array, and each in the neutral layout."""
    model = scans(lambda: [nn.Sequential([nn.Dense(D), jnp.tanh]), Small()], n=N)[0]
    variables = start(model, inputs())
    layers = linen_layers(model, jnp.asarray(inputs()))
    neutral = to_neutral(variables, layers=layers)
    assert set(neutral) == {"0.0.weight", "0.0.bias", "1.Dense_0.weight", "1.Dense_0.bias"}
    kernel = variables["params"]["layers_0"]["layers_0"]["kernel"]
    assert np.array_equal(neutral["0.0.weight"], np.swapaxes(kernel, 1, 2))
    empty = jax.tree.map(jnp.zeros_like, variables)
    back = from_neutral(empty, neutral, layers=layers)
    assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(variables)))

    apart: Any = ReversibleSequential(
        [layer for _ in range(N) for layer in (nn.Sequential([nn.Dense(D), jnp.tanh]), Small())],
        program=Program([BODY] * N),
    )
    shapes = jax.eval_shape(apart.init, jax.random.key(0), jnp.asarray(inputs()))
    names = {name.partition(".")[2] for name in to_neutral(jax.tree.map(jnp.zeros_like, shapes), layers=linen_layers(
        apart, jnp.asarray(inputs())))}  # fmt: skip
    assert names == {name.partition(".")[2] for name in neutral}
