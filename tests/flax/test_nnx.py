"""revcore_jax.nnx.ReversibleSequential against the same modules run one after the other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import revcore
from revcore import (
    Affine,
    Checkpoint,
    Couple,
    InversionError,
    Momentum,
    Program,
    Reverse,
    SpecError,
    StoreAll,
)
from revcore_jax.nnx import ReversibleSequential
from tests.flax.nnx_models import Mode
from tests.flax.nnx_models import arrays as parts
from tests.helpers import tree_error
from tests.plain import momentum
from tests.plain.nnx import Plain

D = 4


pytestmark = pytest.mark.usefixtures("x64")


def batch_norm() -> nnx.BatchNorm:
    """A BatchNorm wholly in float64; Flax makes the statistics float32."""
    norm = nnx.BatchNorm(D, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    norm.mean, norm.var = nnx.BatchStat(jnp.zeros(D)), nnx.BatchStat(jnp.ones(D))
    return norm


class Block(nnx.Module):
    """Linear, BatchNorm, tanh, Dropout, Linear; sows its input where somebody captures."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(D, D, param_dtype=jnp.float64, rngs=rngs)
        self.norm = batch_norm()
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.second = nnx.Linear(D, D, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "seen", x)
        return self.second(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def blocks(n: int = 4) -> list[Block]:
    rngs = nnx.Rngs(0)
    return [Block(rngs) for _ in range(n)]


def inputs(seed: int = 0, *lead: int, d: int = 2 * D) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((*lead, 6, d)))


def loss(model: Any, x: Any) -> Any:
    return jnp.sum(jnp.sin(model(x)))


F64 = Mode(jnp.float64, jit=False)


@pytest.mark.parametrize(
    ("policy", "jit"),
    [
        (Reverse(), False),
        *(
            pytest.param(policy, True, marks=pytest.mark.long)
            for policy in (Reverse(), Checkpoint(), Reverse(anchor_every=2, keep_last=1))
        ),
    ],
    ids=str,
)
def test_training_steps_equal_plain(policy: Any, jit: bool) -> None:
    """Gradients, statistics, masks and counts: all as without revcore, over several steps."""
    models = (
        ReversibleSequential(*blocks(), coupling=Momentum(0.9), policy=policy),
        Plain(*blocks(), update=momentum(0.9)),
    )
    step = nnx.value_and_grad(loss)
    step = nnx.jit(step) if jit else step
    for seed in range(2):
        (value, got), (other, want) = (step(model, inputs(seed)) for model in models)
        assert abs(value - other) <= 1e-12
        assert tree_error(parts(got), parts(want)) <= 1e-12
    F64.same(models[0], models[1])
    assert models[0].layers[0].dropout.rngs.count[...] == 2  # type: ignore[union-attr]


def test_batch_statistics_move_once() -> None:
    model = ReversibleSequential(*blocks(1))
    x = inputs()
    mean = model.layers[0].first(x[:, D:]).mean(0)  # type: ignore[operator, union-attr]
    nnx.jit(nnx.grad(loss))(model, x)
    assert tree_error(model.layers[0].norm.mean[...], 0.01 * mean) <= 1e-12  # type: ignore[union-attr]


def test_sown_values_are_captured_once() -> None:
    captured = []
    for model in (ReversibleSequential(*blocks(2), coupling=Momentum(0.9)), Plain(*blocks(2), update=momentum(0.9))):

        def run(model: Any, x: Any) -> Any:
            value, seen = nnx.capture(loss, nnx.Intermediate)(model, x)
            return value, seen

        _, (_, seen) = nnx.grad(lambda m, x: run(m, x), has_aux=True)(model, inputs()), run(model, inputs())
        captured.append(seen)
    assert [len(v) for v in jax.tree.leaves(captured[0], is_leaf=lambda v: isinstance(v, tuple))] == [1] * 2
    assert tree_error(parts(captured[0]), parts(captured[1])) <= 1e-12


def test_shared_parameters_train_and_shared_statistics_are_refused() -> None:
    linear = nnx.Linear(D, D, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    shared = ReversibleSequential(linear, linear, coupling=Momentum(0.9)), Plain(linear, linear, update=momentum(0.9))
    got, want = (nnx.grad(loss)(model, inputs()) for model in shared)
    assert tree_error(parts(got), parts(want)) <= 1e-12

    class Normed(nnx.Module):
        def __init__(self, norm: Any) -> None:
            self.norm = norm

        def __call__(self, x: Any) -> Any:
            return self.norm(x)

    norm = batch_norm()
    model = ReversibleSequential(Normed(norm), Normed(norm))
    before = norm.mean[...]
    with pytest.raises(SpecError, match=r"block 0 changes its state 'norm.mean', which block 1 holds too"):
        model(inputs())
    assert norm.mean[...] is before
    norm.use_running_average = True
    model(inputs())  # nothing changes, so nothing is lost


def test_modules_as_arguments_are_refused_and_keys_taken() -> None:
    class Noisy(nnx.Module):
        def __init__(self) -> None:
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x: Any, key: Any) -> Any:
            return self.dropout(x, rngs=key)

    model = ReversibleSequential(Noisy(), Noisy())
    with pytest.raises(SpecError, match="an argument came as Rngs, but blocks get copies"):
        model(inputs(), nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 2)
    layerwise = [((), {"key": key}) for key in keys]
    grads = []
    for policy in (Reverse(), StoreAll()):
        model.policy = policy
        grads.append(jax.grad(lambda x: jnp.sum(model(x, layerwise_args_kwargs=layerwise) ** 2))(inputs()))
    assert tree_error(*grads) <= 1e-12


def test_inverse() -> None:
    model = ReversibleSequential(*blocks(), coupling=[Momentum(0.9), revcore.Additive()])
    with pytest.raises(InversionError, match="draws random numbers"):
        model.inverse(inputs())
    model.eval()
    before = parts(model)
    assert tree_error(model.inverse(model(inputs())), inputs()) <= 1e-12
    assert all(a is b or np.array_equal(a, b) for a, b in zip(before, parts(model), strict=True))
    with pytest.raises(SpecError, match="joined by 'mean'"):
        ReversibleSequential(jnp.tanh, axis=None).inverse(inputs())


def test_couplings_from_functions_are_proved() -> None:
    def forward(x: Any, f: Any) -> Any:
        return 0.9 * x + 0.1 * f

    model = ReversibleSequential(
        *blocks(2), coupling_forward=forward, coupling_inverse=lambda y, f: (y - 0.1 * f) / 0.9
    )
    got, want = (nnx.jit(nnx.grad(loss))(m, inputs()) for m in (model, Plain(*blocks(2), update=momentum(0.9))))
    assert tree_error(parts(got), parts(want)) <= 1e-12
    with pytest.raises(SpecError, match="inverse"):
        ReversibleSequential(*blocks(), coupling_forward=forward, coupling_inverse=lambda y, f: y / 0.9 - 0.1 * f)


def test_split_and_merge() -> None:
    x = inputs()
    assert jnp.allclose(ReversibleSequential(jnp.sin, axis=None)(x), (x + x + jnp.sin(x)) / 2)
    residual = dataclasses.replace(revcore.momentum_net(1, 0.5), split="zeros", merge="last")
    assert jnp.allclose(ReversibleSequential(jnp.sin, program=residual)(x), x + 0.5 * jnp.sin(x))
    assert ReversibleSequential(jnp.sin, jnp.cos, axis=0, num_streams=3)(x).shape == x.shape
    assert ReversibleSequential()(x) is not None


def test_aux_outputs_and_learned_bijections() -> None:
    class Shift(nnx.Module):
        def __init__(self) -> None:
            self.by = nnx.Param(jnp.full(D, 0.3))

        def forward(self, a: Any, b: Any) -> Any:
            return a + self.by[...] * b, b

        def inverse(self, a: Any, b: Any) -> Any:
            return a - self.by[...] * b, b

    def pair(x: Any) -> Any:
        return 0.1 * x, jnp.sin(x), jnp.sum(x)

    class Swap:
        """No module, but something with the two methods."""

        def forward(self, a: Any, b: Any) -> Any:
            return b, a

        inverse = forward

    program = Program((Couple(0, (1,), Affine()), *[revcore.Bijection()] * 2, Couple(1, (0,), Affine())))
    model = ReversibleSequential(pair, Shift(), Swap(), pair, program=program)
    y, aux = model(inputs())
    assert [len(extra) for extra in aux] == [1, 0, 0, 1]
    assert tree_error(model.inverse(y), inputs()) <= 1e-12


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReversibleSequential(jnp.sin)(inputs(d=5)), "does not part into 2 equal streams"),
        (lambda: ReversibleSequential(jnp.sin)([1.0]), "the input came as list"),
        (lambda: ReversibleSequential(jnp.sin, axis=3)(inputs()), "axis is 3, but the input has shape"),
        (lambda: ReversibleSequential(jnp.sin, policy="reverse"), "policy came as 'reverse'"),  # type: ignore[arg-type]
        (lambda: ReversibleSequential(jnp.sin, program=revcore.revnet(1), num_streams=3), "give either program"),
        (lambda: ReversibleSequential(jnp.sin, program=revcore.revnet(1), axis=None), "give axis"),
        (lambda: ReversibleSequential(jnp.sin, program=revcore.revnet(2))(inputs()), "1 blocks came"),
        (lambda: ReversibleSequential(3)(inputs()), "block 0 came as 3, expected an NNX module or a function"),
        (
            lambda: ReversibleSequential(lambda a, b: (b, a), program=Program((revcore.Bijection(),)))(inputs()),
            r"its step of the program needs inverse\(\*streams\)",
        ),
    ],
)
def test_bad_input_is_told(make: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
