"""revcore_jax.linen.ReversibleSequential against the same layers run one after the other."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import revcore
from revcore import Checkpoint, InversionError, Momentum, Reverse, SpecError, StoreAll
from revcore_jax.linen import ReversibleSequential
from tests.helpers import tree_error
from tests.plain import momentum
from tests.plain.linen import Plain

D = 4


pytestmark = pytest.mark.usefixtures("x64")


class Block(nn.Module):
    """Dense, BatchNorm, tanh, Dropout, Dense; sows its input."""

    train: bool = True

    @nn.compact
    def __call__(self, x: Any, train: bool | None = None) -> Any:
        train = self.train if train is None else train
        self.sow("intermediates", "seen", x)
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(D)(x)))
        return nn.Dense(D, name="second")(nn.Dropout(0.4, deterministic=not train)(x))


def inputs(seed: int = 0, d: int = 2 * D) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((6, d)))


def ours(n: int = 4, **settings: Any) -> ReversibleSequential:
    return ReversibleSequential([Block() for _ in range(n)], coupling=Momentum(0.9), **settings)


def plain(n: int = 4) -> Plain:
    return Plain([Block() for _ in range(n)], update=momentum(0.9))


def start(model: Any) -> Any:
    """Return variables in float64, but for what ``init`` sowed."""
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, inputs())
    return {k: jax.tree.map(jnp.float64, v) for k, v in variables.items() if k != "intermediates"}


def train_step(model: Any, variables: Any, x: Any, twice: bool = False) -> Any:
    """Return ``(gradients, changed collections)`` of one step."""

    class Twice(nn.Module):
        inner: Any

        def __call__(self, x: Any) -> Any:
            return self.inner(self.inner(x))

    state = {k: v for k, v in variables.items() if k != "params"}

    def loss(params: Any) -> Any:
        given = {"params": params, **state}
        if twice:
            given = {k: {"inner": v} for k, v in given.items()}
        y, changed = (Twice(model) if twice else model).apply(
            given, x, rngs={"dropout": jax.random.key(7)}, mutable=["batch_stats", "intermediates"]
        )
        return jnp.sum(jnp.sin(y)), changed

    return jax.grad(loss, has_aux=True)(variables["params"])


def test_the_tree_of_variables_is_ordinary() -> None:
    got, want = start(ours()), start(plain())
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert sorted(got["params"]) == [f"layers_{i}" for i in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


@pytest.mark.parametrize(
    ("policy", "jit"),
    [
        (Reverse(), False),
        *(
            pytest.param(policy, True, marks=pytest.mark.long)
            for policy in (Reverse(), StoreAll(), Checkpoint(), Reverse(anchor_every=2, keep_last=1))
        ),
    ],
    ids=str,
)
def test_a_training_step_equals_plain(policy: Any, jit: bool) -> None:
    """Gradients, statistics that moved once, dropout masks, and values sown once: all as without revcore."""
    variables = start(plain())
    wrap = jax.jit if jit else lambda f: f
    got = wrap(lambda v, x: train_step(ours(policy=policy), v, x))(variables, inputs())
    want = jax.jit(lambda v, x: train_step(plain(), v, x))(variables, inputs())
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert tree_error(got, want) <= 1e-12


def test_a_model_called_twice_draws_new_masks_as_plain_does() -> None:
    variables = start(plain(2))
    got, want = (
        jax.jit(lambda v, x, model=model: train_step(model, v, x, twice=True))(variables, inputs())
        for model in (ours(2), plain(2))
    )
    assert tree_error(got, want) <= 1e-12


def test_arguments_reach_the_blocks() -> None:
    variables = start(ours())
    got = [m.apply(variables, inputs(), train=False) for m in (ours(), plain())]
    assert tree_error(*got) <= 1e-12
    got = ours().apply(variables, inputs(), layerwise_args_kwargs=[((), {"train": False})] * 4)
    assert tree_error(got, plain().apply(variables, inputs(), train=False)) <= 1e-12


def test_inverse() -> None:
    variables, model = start(ours()), ours()
    y = model.apply(variables, inputs(), train=False)
    assert tree_error(model.apply(variables, y, train=False, method="inverse"), inputs()) <= 1e-12
    with pytest.raises(InversionError, match="Block draws random numbers"):
        model.apply(
            variables, y, train=True, method="inverse", rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
        )


def test_functions_aux_outputs_and_other_programs() -> None:
    class Paired(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(D, param_dtype=jnp.float64)(x), jnp.sum(x)

    model = ReversibleSequential([Paired(), jnp.sin, Paired()], program=revcore.revnet(3, Momentum(0.5)))
    (y, aux), variables = model.init_with_output(jax.random.key(0), inputs())
    assert [len(extra) for extra in aux] == [1, 0, 1]
    again, extras = model.apply(variables, inputs())
    assert tree_error([again, extras], [y, aux]) <= 1e-12
    mean: Any = ReversibleSequential([jnp.sin], axis=None).apply({}, inputs())
    assert tree_error(mean, inputs() + jnp.sin(inputs()) / 2) <= 1e-12


def test_a_block_used_twice() -> None:
    """Shared parameters are well; shared statistics and masks are refused."""
    dense = nn.Dense(D, param_dtype=jnp.float64)
    models = ReversibleSequential([dense, dense], coupling=Momentum(0.9)), Plain([dense, dense], update=momentum(0.9))
    variables = models[1].init(jax.random.key(0), inputs())

    def loss(variables: Any, model: Any) -> Any:
        return jnp.sum(jnp.sin(model.apply(variables, inputs())))

    grads = [jax.grad(loss)(variables, model) for model in models]
    assert tree_error(*grads) <= 1e-12
    block = Block()
    model = ReversibleSequential([block, block])
    variables = start(model)
    model.apply(variables, inputs(), train=False)
    with pytest.raises(SpecError, match="block 0 changes its variables or draws random numbers"):
        model.apply(variables, inputs(), rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])
    drop = nn.Dropout(0.5, deterministic=False)
    with pytest.raises(SpecError, match="block 0 changes its variables or draws random numbers"):
        ReversibleSequential([drop, drop]).apply({}, inputs(), rngs={"dropout": jax.random.key(0)})


def test_equal_layers_are_traced_once_in_each_call() -> None:
    traced = []

    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            traced.append(1)
            return nn.Dense(D)(x)

    variables = ReversibleSequential([Counting(), Counting()]).init(jax.random.key(0), inputs())
    seen = []
    for _ in range(3):
        traced.clear()
        ReversibleSequential([Counting(), Counting()]).apply(variables, inputs())
        seen.append(len(traced))
    assert seen == [1, 1, 1]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ReversibleSequential([jnp.sin], policy="reverse"), "policy came as 'reverse'"),  # type: ignore[arg-type]
        (ReversibleSequential([jnp.sin], num_streams=3), "does not part into 3 equal streams"),
        (ReversibleSequential([jnp.sin], program=revcore.revnet(2)), "1 blocks came"),
        (
            ReversibleSequential([jnp.sin], coupling_forward=lambda x, f: x + f, coupling_inverse=lambda y, f: y + f),
            "inverse",
        ),
    ],
)
@pytest.mark.parametrize("initialising", [True, False])
def test_bad_input_is_told(model: Any, message: str, initialising: bool) -> None:
    with pytest.raises(SpecError, match=message):
        model.init(jax.random.key(0), inputs()) if initialising else model.apply({}, inputs())
