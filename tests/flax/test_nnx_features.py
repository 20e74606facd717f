"""What Flax NNX offers around and inside a model, each feature on a reversible trunk and on the plain one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import revcore_jax
from revcore import Program, Repeat
from revcore.step import Chain, Couple
from revcore_jax.nnx import ReversibleSequential, stack
from tests.flax.nnx_models import Block, D, Mode, Net, Smooth, arrays, blocks, linear, loss, modes, step_by_step
from tests.plain.nnx import Plain

pytestmark = pytest.mark.usefixtures("x64")


# --- what is trained --------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize(
    "filter",
    [
        pytest.param(nnx.PathContains("scale"), id="PathContains"),
        pytest.param(nnx.All(nnx.Param, nnx.Not(nnx.PathContains("first"))), id="Not", marks=pytest.mark.long),
    ],
)
def test_diff_state_trains_a_part(mode: Mode, filter: Any) -> None:
    """Gradients for the chosen variables alone; statistics and counts of all move."""

    def run(model: Any) -> Any:
        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, filter))(model, mode.x())

    _, grads = mode.same_run(mode.nets(), run)
    wanted = nnx.to_flat_state(nnx.state(mode.nets()[0], filter))
    assert [path for path, _ in nnx.to_flat_state(grads)] == [path for path, _ in wanted]


@modes
def test_lora_trains_its_adapters_alone(mode: Mode) -> None:
    """nnx.LoRA around each block's linear layer, LoRAParam under nnx.Optimizer(wrt=…), four steps."""

    class Adapted(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
            base = linear(rngs, dtype)
            self.linear = nnx.LoRA(D, 2, D, base_module=base, param_dtype=dtype, rngs=rngs)
            self.linear.lora_b[...] += 0.1  # else its gradients begin at zero

        def __call__(self, x: Any) -> Any:
            return jnp.tanh(self.linear(x))

    models = mode.nets(Adapted)
    frozen = arrays(nnx.state(models[0], nnx.Not(nnx.LoRAParam)))

    @mode.compiled
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, x)
        optimizer.update(model, grads)
        return value

    def run(model: Any) -> Any:
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
        return [step(model, optimizer, mode.x()) for _ in range(4)]

    got, want = map(run, models)
    mode.same(got, want)
    mode.same(models[0], models[1])
    assert got[-1] < got[0]
    after = arrays(nnx.state(models[0], nnx.Not(nnx.LoRAParam)))
    assert all(np.array_equal(a, b) for a, b in zip(frozen, after, strict=True))


@modes
def test_parameters_tied_to_something_outside(mode: Mode) -> None:
    """One kernel in two blocks and in the head as well: its gradient is the sum of all three."""
    models = mode.nets(Smooth)
    for model in models:
        layers = model.trunk.layers
        layers[1].first.kernel = layers[0].first.kernel
        model.head = nnx.Sequential(  # type: ignore[assignment]
            nnx.Linear(2 * D, D, param_dtype=mode.dtype, rngs=nnx.Rngs(0)), layers[0].first
        )
    grads = mode.same_run(models, lambda model: nnx.grad(loss)(model, mode.x()))
    assert "kernel" not in grads["trunk"]["layers"][1]["first"]


@modes
def test_training_loop_with_optimizer_and_metrics(mode: Mode) -> None:
    labels = jnp.arange(6) % 3

    def cost(model: Any, x: Any) -> Any:
        logits = model(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    @mode.compiled
    def step(model: Any, optimizer: Any, metrics: Any, x: Any) -> Any:
        (value, logits), grads = nnx.value_and_grad(cost, has_aux=True)(model, x)
        optimizer.update(model, grads)
        metrics.update(loss=value.astype(jnp.float32), logits=logits, labels=labels)

    computed = []
    models = mode.nets()
    for model in models:
        optimizer = nnx.Optimizer(model, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
        metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
        for seed in range(3):
            step(model, optimizer, metrics, mode.x(seed=seed))
        computed.append(metrics.compute())
    mode.same(models[0], models[1])
    assert jnp.allclose(computed[0]["loss"], computed[1]["loss"], rtol=1e-6)  # which Flax averages in float32
    assert computed[0]["accuracy"] == computed[1]["accuracy"]


# --- state ------------------------------------------------------------------------------------------------------------


@modes
def test_perturb_gives_the_gradients_inside(mode: Mode) -> None:
    class Watched(Smooth):
        def __call__(self, x: Any) -> Any:
            x = self.perturb("inside", self.first(x))
            self.sow(nnx.Intermediate, "seen", x)
            return jnp.tanh(x)

    def run(model: Any) -> Any:
        x = mode.x()
        _, perturbations = nnx.capture(model, nnx.Perturbation)(x)

        def cost(model: Any, perturbations: Any) -> Any:
            y, seen = nnx.capture(model, nnx.Intermediate, init=perturbations)(x)
            return jnp.sum(jnp.sin(y)), seen

        grads, seen = nnx.grad(cost, argnums=(0, 1), has_aux=True)(model, perturbations)
        for module in dict(nnx.iter_modules(model)).values():
            vars(module).pop("__captures__", None)
        return grads, seen

    trunks = mode.pair(Watched)
    (_, inside), seen = mode.same_run(trunks, run)
    assert len(arrays(inside)) == len(arrays(seen)) == 2


@modes
def test_a_block_may_grow_new_state(mode: Mode) -> None:
    """A variable made in the first call, and counted on in the next, as a cache is."""

    class Counting(Smooth):
        def __call__(self, x: Any) -> Any:
            if not hasattr(self, "calls"):
                self.calls = nnx.Cache(jnp.zeros((), x.dtype))
            self.calls[...] += jnp.max(x)
            return super().__call__(x)

    def run(model: Any) -> Any:
        return loss(model, mode.x()), loss(model, mode.x(seed=1))

    models = mode.pair(Counting)
    mode.same_run(models, run)
    assert models[0].layers[1].calls[...] > 0


@modes
def test_train_eval_set_attributes_and_view(mode: Mode) -> None:
    def run(model: Any) -> Any:
        x = mode.x()
        model.eval()
        first = model(x)
        model.train()
        second = model(x)
        model.set_attributes(nnx.Dropout, rate=0.1)
        return first, second, model(x), nnx.view(model, deterministic=True, use_running_average=True)(x)

    mode.same_run(mode.pair(), run)


def test_state_of_a_closed_over_model_is_not_leaked() -> None:
    """Plain jax.jit may not change a module that it closes over: Flax's own error, and nothing written."""
    model = ReversibleSequential(*blocks(jnp.float64))
    before = arrays(model)
    with pytest.raises(Exception, match=r"Cannot mutate .* from a different trace level"):
        jax.jit(lambda x: model(x))(Mode(jnp.float64, True).x())
    assert all(a is b or np.array_equal(a, b) for a, b in zip(before, arrays(model), strict=True))


@step_by_step
def test_split_merge_clone_state_update(mode: Mode) -> None:
    def run(model: Any) -> Any:
        x = mode.x()
        other = nnx.clone(model)
        values = [loss(model, x), loss(other, x)]
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        values.append(loss(nnx.merge(graph, params, rest, copy=True), x))
        nnx.update(other, jax.tree.map(lambda a: 2 * a, params))
        values.append(loss(other, x))
        pure = nnx.to_pure_dict(params)
        assert sorted(pure["layers"]) == [0, 1]
        halved = nnx.state(other, nnx.Param)
        nnx.replace_by_pure_dict(halved, jax.tree.map(lambda a: a / 2, pure))
        nnx.update(other, halved)
        return [*values, loss(other, x), nnx.state(other)]

    values = mode.same_run(mode.pair(), run)
    assert values[0] == values[1] != values[3]


@modes
def test_plain_jax_on_split_state(mode: Mode) -> None:
    """jax.jit, jax.grad and jax.tree.map know nothing of modules."""

    def run(model: Any) -> Any:
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def cost(params: Any, rest: Any, x: Any) -> Any:
            model = nnx.merge(graph, params, rest, copy=True)  # its own variables, that this trace may change
            return loss(model, x), nnx.state(model, nnx.Not(nnx.Param))

        step = jax.grad(cost, has_aux=True)
        step = jax.jit(step) if mode.jit else step
        for seed in range(2):
            grads, rest = step(params, rest, mode.x(seed=seed))
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, rest

    got, want = map(run, mode.nets())
    mode.same(got, want)


# --- transforms -------------------------------------------------------------------------------------------------------


@modes
def test_remat_around_and_inside(mode: Mode) -> None:
    class Rematted(Block):
        @nnx.remat
        def __call__(self, x: Any) -> Any:
            return Block.__call__(self, x)

    def run(model: Any) -> Any:
        return nnx.grad(lambda m, x: jnp.sum(jnp.sin(nnx.remat(lambda m, x: m(x))(m, x))))(model, mode.x())

    mode.same_run(mode.pair(Rematted), run)


@modes
def test_vmap_over_models(mode: Mode) -> None:
    """An ensemble: each of three models with its own parameters, statistics and masks."""

    def ensemble(trunk: Any) -> Any:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> Any:
            return trunk(*(Block(rngs, mode.dtype) for _ in range(2)))

        return make(nnx.Rngs(0))

    models = ensemble(ReversibleSequential), ensemble(Plain)
    mode.same_run(models, lambda model: nnx.vmap(nnx.grad(loss), in_axes=(0, None))(model, mode.x()))


@modes
def test_vmap_over_inputs(mode: Mode) -> None:
    def run(model: Any) -> Any:
        model.eval()
        axes = nnx.StateAxes({...: None})
        per_example = nnx.vmap(nnx.grad(loss), in_axes=(axes, 0))(model, mode.x(3))
        return per_example, nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(model, mode.x(3))

    mode.same_run(mode.pair(), run)


@step_by_step
def test_scan_around(mode: Mode) -> None:
    """The model is the carry of a scan over batches, and moves on in each."""

    def run(model: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def many(model: Any, x: Any) -> Any:
            return model, nnx.grad(loss)(model, x)

        return many(model, mode.x(2))[1]

    mode.same_run(mode.pair(), run)


@modes
def test_control_flow_around(mode: Mode) -> None:
    """nnx.cond, switch, fori_loop and while_loop over a model that changes its state in them."""

    def run(model: Any) -> Any:
        x = mode.x()
        y = nnx.cond(x[0, 0] > -9, lambda m, x: m(x), lambda m, x: x, model, x)
        y = nnx.switch(1, [lambda m, x: x, lambda m, x: m(x)], model, y)
        model, y = nnx.fori_loop(0, 2, lambda i, carry: (carry[0], carry[0](carry[1])), (model, y))
        _, _, y = nnx.while_loop(
            lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, carry[1], carry[1](carry[2])), (0, model, y)
        )
        return y

    mode.same_run(mode.pair(), run)


@step_by_step
def test_custom_vjp_around(mode: Mode) -> None:
    """A rule of the user's own around the model: halved gradients of its input and parameters."""

    @nnx.custom_vjp
    def halved(model: Any, x: Any) -> Any:
        return model(x)

    def fwd(model: Any, x: Any) -> Any:
        return halved(model, x), (model, x)

    def bwd(kept: Any, g: Any) -> Any:
        _, out_g = g
        model, x = kept
        graph, state = nnx.split(model)
        _, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        gstate, gx = pull(out_g)
        return jax.tree.map(lambda a: 0.5 * a, gstate), 0.5 * gx

    halved.defvjp(fwd, bwd)

    def run(model: Any) -> Any:
        return nnx.grad(lambda m, x: jnp.sum(jnp.sin(halved(m, x))), argnums=(0, 1))(model, mode.x())

    got = mode.same_run(mode.pair(Smooth), run)
    plain = nnx.grad(loss, argnums=(0, 1))(mode.pair(Smooth)[1], mode.x())
    mode.same(got, jax.tree.map(lambda a: 0.5 * a, plain))


def test_eval_shape_makes_an_abstract_model() -> None:
    model = nnx.eval_shape(lambda: ReversibleSequential(*blocks(jnp.float32), rngs=nnx.Rngs(0)))
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(nnx.state(model)))
    y = nnx.eval_shape(lambda m, x: m(x), model, jax.ShapeDtypeStruct((6, 2 * D), jnp.float32))
    assert (y.shape, y.dtype) == ((6, 2 * D), jnp.float32)


# --- composition ------------------------------------------------------------------------------------------------------


@modes
def test_one_inside_the_other(mode: Mode) -> None:
    """A reversible trunk as a block of a reversible trunk, with the statistics and masks of both."""

    def build(trunk: Any) -> Any:
        rngs = nnx.Rngs(0)
        return trunk(*(trunk(*(Block(rngs, mode.dtype) for _ in range(2))) for _ in range(2)))

    models = build(ReversibleSequential), build(Plain)
    mode.same_run(models, lambda model: nnx.grad(loss)(model, mode.x(d=4 * D)))


@modes
def test_held_in_lists_and_dicts(mode: Mode) -> None:
    """nnx.List, nnx.Dict and tuples of trunks, and blocks that hold their parts so."""

    class Parts(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
            self.many = nnx.List([linear(rngs, dtype) for _ in range(2)])
            self.named = nnx.Dict(norm=nnx.LayerNorm(D, param_dtype=dtype, rngs=rngs))
            self.two = nnx.data((linear(rngs, dtype), nnx.Dropout(0.4, rngs=rngs)))

        def __call__(self, x: Any) -> Any:
            x = self.many[1](jnp.tanh(self.many[0](self.named["norm"](x))))
            return self.two[1](self.two[0](x))

    class Held(nnx.Module):
        def __init__(self, trunk: Any) -> None:
            self.trunks = nnx.List([nnx.Dict(trunk=trunk)])

        def __call__(self, x: Any) -> Any:
            return self.trunks[0]["trunk"](x)

    mode.same_run([Held(trunk) for trunk in mode.pair(Parts)], lambda model: nnx.grad(loss)(model, mode.x()))


def test_bfloat16_parameters_with_float32_streams() -> None:
    """Blocks compute in bfloat16 and their output is added in float32: as the plain network, to bfloat16's rounding."""

    class Half(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
            self.linear = nnx.Linear(D, D, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return jnp.tanh(self.linear(x))

    mode = Mode(jnp.float32, jit=True)
    ours, plain = mode.pair(Half)
    step = nnx.jit(nnx.value_and_grad(loss))
    (value, got), (other, want) = step(ours, mode.x()), step(plain, mode.x())
    assert {a.dtype for a in arrays(got)} == {jnp.dtype(jnp.bfloat16)}
    as_float = [[np.asarray(a, np.float32) for a in arrays(g)] for g in (got, want)]
    revcore_error = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(*as_float, strict=True)))
    assert abs(value - other) <= 1e-5 * abs(other)
    assert revcore_error <= 4 * 2.0**-8 * np.sqrt(sum(np.sum(b**2) for b in as_float[1]))
    assert ours(mode.x()).dtype == jnp.float32


@modes
def test_sharding_annotations(mode: Mode) -> None:
    """Annotated parameters keep their annotations through a step, and run on a mesh."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    class Sharded(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
            init = nnx.with_partitioning(nnx.initializers.normal(0.3), (None, "model"))
            self.linear = nnx.Linear(D, D, kernel_init=init, param_dtype=dtype, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return jnp.tanh(self.linear(x))

    with jax.set_mesh(mesh):
        models = mode.pair(Sharded, n=4)
        specs: Any = nnx.get_partition_spec(nnx.state(models[0]))
        mode.same_run(models, lambda model: nnx.grad(loss)(model, mode.x()))
        assert specs["layers"][0]["linear"]["kernel"].get_value() == jax.sharding.PartitionSpec(None, "model")
        grown = stack(list(models[0].layers)[::2]), stack(list(models[0].layers)[1::2])
        scanned = ReversibleSequential(*grown, program=Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 2)]))
        mode.same(scanned(mode.x()), models[1](mode.x()))


def test_bridges_to_and_from_linen() -> None:
    """An NNX trunk in a Linen model, and a Linen trunk in an NNX one."""
    x = Mode(jnp.float64, False).x()
    mode = Mode(jnp.float64, False)
    wrapped = nnx.bridge.to_linen(lambda rngs: mode.pair(Smooth)[0])
    variables = wrapped.init(jax.random.key(0), x)
    got = jax.grad(lambda v: jnp.sum(jnp.sin(wrapped.apply(v, x))))(variables)  # type: ignore[arg-type]
    want = nnx.grad(loss)(mode.pair(Smooth)[1], x)
    mode.same(got["params"], want)

    trunk = revcore_jax.linen.ReversibleSequential([nn.Dense(D, param_dtype=jnp.float64) for _ in range(3)])
    model = nnx.bridge.ToNNX(trunk, rngs=nnx.Rngs(0)).lazy_init(x)
    plain = Plain(*(nnx.Linear(D, D, param_dtype=jnp.float64, rngs=nnx.Rngs(0)) for _ in range(3)))
    for i, layer in enumerate(plain.layers):
        layer.kernel[...] = getattr(model, f"layers_{i}")["kernel"][...]
    got, want = nnx.grad(loss)(model, x), nnx.grad(loss)(plain, x)
    mode.same(arrays(got), arrays(want))


def test_display_and_tabulate(capsys: pytest.CaptureFixture[str]) -> None:
    model = ReversibleSequential(*blocks(jnp.float32))
    nnx.display(model)
    table = nnx.tabulate(model, jnp.ones((2, 2 * D), jnp.float32))
    assert "ReversibleSequential Summary" in table
    assert "ReversibleSequential" in capsys.readouterr().out + repr(model)


def test_copies_and_pickles() -> None:
    mode = Mode(jnp.float64, False)
    model = ReversibleSequential(*blocks(jnp.float64), rngs=nnx.Rngs(0))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(nnx.to_pure_dict(nnx.state(model, nnx.Param))))]
    want = loss(model, mode.x())
    mode.same(loss(copies[0], mode.x()), want)
    mode.same(copies[0], model)
    other = ReversibleSequential(*blocks(jnp.float64))
    state = nnx.state(other, nnx.Param)
    nnx.replace_by_pure_dict(state, copies[1])
    nnx.update(other, state)
    mode.same(nnx.state(other, nnx.Param), nnx.state(model, nnx.Param))


def test_without_graphs() -> None:
    """Flax's tree mode (set_graph_mode(False)), in which modules are ordinary pytrees."""
    mode = Mode(jnp.float64, False)
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        ours, plain = mode.pair(Smooth)
        got, want = (jax.grad(loss)(m, mode.x()) for m in (ours, plain))
        mode.same(jax.tree.leaves(got), jax.tree.leaves(want))


@modes
def test_the_check_of_these_tests_can_fail(mode: Mode) -> None:
    """A model that differs in one parameter, in its statistics alone, or in a dtype, is no equal one."""
    ours, other = Net(*[mode.pair()[0], nnx.Rngs(7), mode.dtype]), mode.nets()[1]
    other.trunk.layers[1].norm.mean[...] += 1e-3
    with pytest.raises(AssertionError):
        mode.same_run((ours, other), lambda model: model(mode.x()))
    with pytest.raises(AssertionError):
        mode.same([jnp.ones(2, jnp.float32)], [jnp.ones(2, jnp.float64)])
