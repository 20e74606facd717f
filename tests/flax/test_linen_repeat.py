"""A Linen program with a Repeat against ``nn.scan`` of the same body."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import scan as scan_scopes
from flax.errors import PartitioningUnspecifiedError
from flax.typing import In

import revcore_jax
from revcore import (
    Anchor,
    Bijection,
    Chain,
    Checkpoint,
    Couple,
    InversionError,
    Momentum,
    Program,
    Repeat,
    Reverse,
    SpecError,
)
from revcore_jax.linen import ReversibleSequential
from tests.flax.linen_models import (
    BETA,
    BODY,
    Block,
    D,
    Mode,
    Small,
    Using,
    check_step,
    in_both_modes,
    inputs,
    repeated,
    scans,
    start,
    step_by_step,
    train_step,
)
from tests.helpers import tree_error
from tests.plain import momentum
from tests.plain.linen import Plain

pytestmark = pytest.mark.usefixtures("x64")


def two() -> list[Any]:
    return [Block(), Small()]


def alike(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.long), True])
def test_init_makes_what_nn_scan_makes(jit: bool) -> None:
    ours, plain = scans(two)
    got, want = ((jax.jit(m.init) if jit else m.init)(jax.random.key(0), jnp.asarray(inputs())) for m in (ours, plain))
    assert alike(got, want)
    assert sorted(got["params"]) == ["layers_0", "layers_1"]
    kernel = got["params"]["layers_0"]["Dense_0"]["kernel"]
    assert kernel.shape == (3, D, D)
    assert not np.array_equal(kernel[0], kernel[1])


def test_init_compiles_flat_in_depth() -> None:
    def size(n: int) -> int:
        model = ReversibleSequential([Small(), Small()], program=repeated(n))
        return str(jax.make_jaxpr(model.init)(jax.random.key(0), jnp.asarray(inputs()))).count("\n")

    assert size(3) == size(50)


@step_by_step
def test_a_training_step_equals_nn_scan(mode: Mode) -> None:
    """Gradients, statistics that moved once, masks, and values sown once, all stacked."""
    got, _ = check_step(*scans(two), mode, depth=6)
    assert got["changed"]["batch_stats"]["layers_0"]["BatchNorm_0"]["mean"].shape == (3, D)
    assert got["changed"]["intermediates"]["layers_0"]["seen"][0].shape == (3, 6, D)


@pytest.mark.parametrize(
    "policy", [pytest.param(Checkpoint(), marks=pytest.mark.long), Reverse(anchor_every=2, keep_last=1)], ids=str
)
def test_policies_do_not_change_a_step(policy: Any) -> None:
    ours, plain = scans(two)
    variables, x = start(plain, inputs()), jnp.asarray(inputs())
    got, want = (jax.jit(partial(train_step, m))(variables, x) for m in (ours.clone(policy=policy), plain))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert tree_error(got, want) <= 1e-12


def test_statistics_move_once() -> None:
    """Against the formula, not another network."""
    ours, _ = scans(two, n=1)
    variables = start(ours, inputs())
    x = jnp.asarray(inputs())
    old, new = (
        tree["batch_stats"]["layers_0"]["BatchNorm_0"]["mean"][0]
        for tree in (variables, train_step(ours, variables, x)["changed"])
    )
    assert tree_error(new, 0.99 * old + 0.01 * x[:, D:].mean(0)) <= 1e-12


@step_by_step
def test_variable_broadcast_and_split_rngs(mode: Mode) -> None:
    """One set of parameters and one mask for all iterations: its gradient is the sum over them."""
    settings: Any = {
        "variable_axes": {("batch_stats", "intermediates"): 0},
        "variable_broadcast": "params",
        "split_rngs": {"params": False, "dropout": False},
    }
    ours, plain = scans(two, **settings)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = plain.init(keys, inputs())
    assert mode != "float64" or alike(ours.init(keys, inputs()), variables)
    assert variables["params"]["layers_0"]["Dense_0"]["kernel"].shape == (D, D)
    check_step(ours, plain, mode, depth=6, variables=variables)


def test_shared_parameters_of_two_calls_are_not_mixed_up() -> None:
    """Without jit, a block that was traced before is not traced again: its parameters must not be in it."""
    ours, plain = scans(lambda: [Small(), Small()], variable_broadcast="params", split_rngs={"params": False})
    variables = start(plain, inputs())
    for scale in (1.0, 2.0):
        scaled = jax.tree.map(lambda a, s=scale: s * a, variables)
        assert tree_error(ours.apply(scaled, inputs()), plain.apply(scaled, inputs())) <= 1e-12


AXES: Any = {"params": 1, "batch_stats": -1, True: 0}


class Nested(nn.Module):
    """A Repeat in a Repeat, and a block before and after."""

    layers: Any

    def __call__(self, x: Any) -> Any:
        a, b = jnp.split(x, 2, -1)
        a = a + self.layers[0](b)
        a, b = self.repeat(_outer, 3, [self.layers[1], self.layers[2]], (a, b))
        return jnp.concatenate([a + self.layers[3](b), b], -1)

    def repeat(self, body: Any, n: int, layers: Any, streams: Any) -> Any:
        """``flax.core.scan`` takes only the scopes of these layers; ``nn.scan`` would stack its neighbours too."""

        def one(scopes: Any, streams: Any) -> Any:
            return body(self, [layer.clone(parent=s) for layer, s in zip(layers, scopes, strict=True)], streams), ()

        scan = scan_scopes(
            one, AXES, split_rngs={True: True}, length=n, check_constancy_invariants=self.is_initializing()
        )
        return scan([layer.scope for layer in layers], streams)[0]


def _outer(model: Nested, layers: Any, streams: Any) -> Any:
    a, b = streams
    return model.repeat(_inner, 2, layers[1:], (a, b + layers[0](a)))


def _inner(model: Nested, layers: Any, streams: Any) -> Any:
    a, b = streams
    return BETA * a + (1 - BETA) * layers[0](b), b


@in_both_modes
def test_nested_repeats_among_other_steps(mode: Mode) -> None:
    program = Program(
        [Couple(0, 1), Repeat(Chain([Couple(1, 0), Repeat(Couple(0, 1, Momentum(BETA)), 2)]), 3), Couple(0, 1)]
    )
    blocks = [Small(), Small(), Block(), Small()]
    ours = ReversibleSequential(blocks, program=program, variable_axes=AXES)
    variables = start(ours, inputs())
    shapes = [variables["params"][f"layers_{i}"]["Dense_0"]["kernel"].shape for i in range(4)]
    assert shapes == [(D, D), (D, 3, D), (D, 3, 2, D), (D, D)]
    plain = Nested(blocks)
    check_step(ours, plain, mode, depth=11)


def test_functions_arguments_and_aux_in_a_repeat() -> None:
    """Stacked arguments of each layer, common ones, a block without variables, and what a block returns beside."""

    class Keyed(nn.Module):
        @nn.compact
        def __call__(self, x: Any, scale: Any, key: Any = None, shift: Any = 0.0, train: bool = False) -> Any:
            noise = jax.random.normal(key, x.shape, x.dtype) if train else 0.0
            f = scale * nn.Dense(D, param_dtype=jnp.float64)(x) + noise + shift
            return f, jnp.sum(f)

    def function(x: Any, scale: Any, train: bool = False) -> Any:
        return scale * jnp.sin(x)

    x, n = jnp.asarray(inputs()), 3
    keys, shifts = jax.random.split(jax.random.key(3), n), jnp.arange(3.0)
    model = ReversibleSequential([Keyed(), function], program=repeated(n))
    layerwise = [((), {"key": keys, "shift": shifts}), ((), {})]
    given: Any = {"layerwise_args_kwargs": layerwise, "train": True}
    (y, aux), variables = jax.jit(lambda key: model.init_with_output(key, x, 0.5, **given))(jax.random.key(0))
    again, extras = model.apply(variables, x, jnp.asarray(0.5), **given)

    def plain(params: Any) -> Any:
        a, b, sums = *jnp.split(x, 2, -1), []
        for i in range(n):
            own = {"params": jax.tree.map(lambda p: p[i], params["layers_0"])}  # noqa: B023
            f, extra = Keyed().apply(own, b, 0.5, key=keys[i], shift=shifts[i], train=True)
            a = BETA * a + (1 - BETA) * f
            b = BETA * b + (1 - BETA) * function(a, 0.5)
            sums.append(extra)
        return jnp.concatenate([a, b], -1), [(jnp.stack(sums),), ()]

    want, sums = plain(variables["params"])
    for got in ((y, aux), (again, extras)):
        assert tree_error(got, (want, sums)) <= 1e-12

    def loss(run: Any) -> Any:
        return lambda params: sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(run(params)))

    grads = [
        jax.jit(jax.grad(loss(run)))(variables["params"])
        for run in (lambda p: model.apply({"params": p}, x, jnp.asarray(0.5), **given), plain)
    ]
    assert tree_error(*grads) <= 1e-12


def test_inverse() -> None:
    ours, _ = scans(lambda: [Block(), Block()])
    variables = start(ours, inputs())
    y = ours.apply(variables, inputs(), train=False)
    assert tree_error(ours.apply(variables, y, train=False, method="inverse"), inputs()) <= 1e-12
    with pytest.raises(InversionError, match="Block draws random numbers"):
        ours.apply(variables, y, method="inverse", rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])


def test_bijections_in_a_repeat() -> None:
    class Scale(nn.Module):
        def setup(self) -> None:
            self.log = self.param("log", nn.initializers.normal(), (D,), jnp.float64)

        def forward(self, a: Any, b: Any) -> Any:
            return a * jnp.exp(self.log), b

        def inverse(self, a: Any, b: Any) -> Any:
            return a * jnp.exp(-self.log), b

    program = Program([Repeat(Chain([Bijection(), Couple(1, 0)]), 3)])
    model: Any = ReversibleSequential([Scale(), Small()], program=program)
    variables, x = start(model, inputs()), jnp.asarray(inputs())
    got = model.apply(variables, x)

    def plain(params: Any) -> Any:
        a, b = jnp.split(x, 2, -1)
        for i in range(3):
            own = jax.tree.map(lambda p: p[i], params)  # noqa: B023
            a = a * jnp.exp(own["layers_0"]["log"])
            b = b + Small().apply({"params": own["layers_1"]}, a)  # type: ignore[operator]
        return jnp.concatenate([a, b], -1)

    assert tree_error(got, plain(variables["params"])) <= 1e-12
    grads = [
        jax.jit(jax.grad(lambda p, run=run: jnp.sum(jnp.sin(run(p)))))(variables["params"])
        for run in (lambda p: model.apply({"params": p}, x), plain)
    ]
    assert tree_error(*grads) <= 1e-12
    assert tree_error(model.apply(variables, got, method="inverse"), x) <= 1e-12


def test_one_block_in_both_slots() -> None:
    """Its parameters are used twice in each iteration, with both gradients."""
    dense = nn.Dense(D, param_dtype=jnp.float64)
    ours, plain = scans(lambda: [dense, dense])
    variables = start(plain, inputs())
    assert jax.tree.map(jnp.shape, start(ours, inputs())) == jax.tree.map(jnp.shape, variables)
    check_step(ours, plain, "float64", variables=variables, mutable=False)


def test_memory_is_that_of_the_streams() -> None:
    """The residual of a scan beyond variables and keys: two streams, at any depth."""

    def kept(n: int) -> int:
        ours, _ = scans(two, n=n)
        variables, x = start(ours, inputs()), jnp.asarray(inputs())

        def run(params: Any) -> Any:
            state = {"params": params, "batch_stats": variables["batch_stats"]}
            return ours.apply(state, x, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])[0]

        residual = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(run, p)[1], variables["params"]))
        return sum(a.size for a in residual if a.shape[-2:] == (x.shape[0], D))

    assert kept(2) == kept(5) == 2 * 6 * D


class Boxed(nn.Module):
    """A Dense whose kernel says over which mesh axes it is parted."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return jnp.tanh(nn.Dense(D, kernel_init=init)(x))


@pytest.mark.parametrize("axis", [pytest.param(0, marks=pytest.mark.long), 1])
def test_partitioned_parameters(axis: int) -> None:
    """Their boxes gain the name of the new axis, as in ``nn.scan``, and gradients and inverse lose nothing."""
    settings: Any = {"variable_axes": {"params": axis}, "metadata_params": {nn.PARTITION_NAME: "layers"}}
    ours, plain = scans(lambda: [Boxed(), Boxed()], **settings)
    variables, got = start(plain, inputs()), start(ours, inputs())
    assert alike(got, variables)
    assert nn.get_partition_spec(got) == nn.get_partition_spec(variables)
    names = ["in", "out"]
    names.insert(axis, "layers")
    assert got["params"]["layers_0"]["Dense_0"]["kernel"].names == tuple(names)
    result, _ = check_step(ours, plain, "float64", depth=6, variables=variables, mutable=False)
    assert result["gradients"][0]["layers_0"]["Dense_0"]["kernel"].names == tuple(names)
    x = jnp.asarray(inputs())
    assert tree_error(ours.apply(variables, ours.apply(variables, x), method="inverse"), x) <= 1e-12
    with pytest.raises(PartitioningUnspecifiedError):
        start(ours.clone(metadata_params={}), inputs())


def test_partitioned_variables_that_change() -> None:
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            init = nn.with_partitioning(lambda: jnp.zeros(D), ("out",))
            total: Any = self.variable("sums", "total", init)
            total.value = total.value + jnp.sum(x, 0)
            return nn.Dense(D)(x)

    settings: Any = {"metadata_params": {nn.PARTITION_NAME: "layers"}}
    ours, plain = scans(lambda: [Counting(), Counting()], **settings)
    got, want = check_step(ours, plain, "float64", depth=6, mutable=["sums"])
    assert got["changed"]["sums"]["layers_0"]["total"].names == ("layers", "out")
    assert jax.tree.structure(got) == jax.tree.structure(want)


def test_partitioned_parameters_in_a_list() -> None:
    models = (
        ReversibleSequential([Boxed(), Boxed()], coupling=Momentum(BETA)),
        Plain([Boxed(), Boxed()], update=momentum(BETA)),
    )
    variables = start(models[1], inputs())
    check_step(*models, "float64", variables=variables, mutable=False)


def test_modules_of_others_in_a_repeat() -> None:
    """A Dense of the model around, used in every iteration and outside: one set of parameters, with all gradients."""

    class Outer(nn.Module):
        program: Any
        n: int

        def setup(self) -> None:
            self.dense = nn.Dense(D)
            self.net = ReversibleSequential([Using(self.dense) for _ in range(self.n)], program=self.program)

        def __call__(self, x: Any) -> Any:
            return self.net(jnp.concatenate([self.dense(x[:, :D]), x[:, D:]], -1))

    ours, listed = Outer(repeated(2), 2), Outer(Program([BODY] * 2), 4)
    variables, x = start(listed, inputs()), jnp.asarray(inputs())

    def stacked(params: Any) -> Any:
        net = params["net"]
        pairs = {f"layers_{k}": revcore_jax.stack([net[f"layers_{k}"], net[f"layers_{k + 2}"]]) for k in range(2)}
        return {"dense": params["dense"], "net": pairs}

    own = {"params": stacked(variables["params"])}
    assert jax.tree.map(jnp.shape, start(ours, x)) == jax.tree.map(jnp.shape, own)
    got, want = (train_step(m, v, x, mutable=False) for m, v in ((ours, own), (listed, variables)))
    assert tree_error(got["gradients"], (stacked(want["gradients"][0]), want["gradients"][1])) <= 1e-12
    for scale in (1.0, 2.0):  # a block that was traced before must not hold the Dense of that time
        scaled = jax.tree.map(lambda a, s=scale: s * a, variables)
        values = ours.apply({"params": stacked(scaled["params"])}, x), listed.apply(scaled, x)
        assert tree_error(*values) <= 1e-12


class Counter(nn.Module):
    """Adds one to a variable."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        count = self.variable("count", "n", lambda: jnp.zeros(()))
        if not self.is_initializing() and self.is_mutable_collection("count"):
            count.value = count.value + 1.0
        return 0.5 * x


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"variable_axes": {"params": None}},
            r"variable_axes came as .* 'params' must have an int",
        ),
        ({"variable_axes": {"params": In(0)}}, "'params' must have an int"),
        ({"split_rngs": {"params": 1}}, "'params' must have a bool"),
        ({"variable_axes": "params"}, "variable_axes came as 'params', expected a dict"),
    ],
)
def test_bad_settings_are_told(settings: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        scans(lambda: [Small(), Small()], **settings)[0].init(jax.random.key(0), inputs())


def test_bad_variables_are_told() -> None:
    ours, _ = scans(lambda: [Small(), Small()])
    variables = Plain([Small(), Small()]).init(jax.random.key(0), inputs())
    with pytest.raises(SpecError, match=r"block 0 is inside Repeat\(n=3\), but its variable .*'bias'.* shape \(4,\)"):
        ours.apply(variables, inputs())
    shared = [Small()] * 2
    program = Program([Repeat(Couple(0, 1), 3), Couple(1, 0)])
    with pytest.raises(SpecError, match="blocks 0 and 1 are one module"):
        ReversibleSequential(shared, program=program).init(jax.random.key(0), inputs())
    with pytest.raises(SpecError, match=r"1 blocks came, but the program takes 2 \(a Repeat's blocks once"):
        ReversibleSequential([Small()], program=repeated()).init(jax.random.key(0), inputs())
    narrow = ReversibleSequential([lambda x: x.astype(jnp.float64)] * 2, program=repeated())
    with pytest.raises(SpecError, match=r"step 0 turned a stream of float32, .* into float64"):
        narrow.init(jax.random.key(0), inputs().astype("float32"))
    halving = ReversibleSequential([lambda *xs: tuple(x[::2] for x in xs)], program=Program([Repeat(Anchor(), 3)]))
    with pytest.raises(SpecError, match="body of a Repeat turned streams"):
        halving.init(jax.random.key(0), inputs().astype("float32"))


def test_changes_of_what_iterations_share_are_refused() -> None:
    """And nothing has changed then."""
    ours, _ = scans(lambda: [Counter(), Counter()], variable_axes={"params": 0}, variable_broadcast="count")
    variables = ours.init(jax.random.key(0), inputs())
    assert variables["count"]["layers_0"]["n"].shape == ()
    ours.apply(variables, inputs())
    with pytest.raises(SpecError, match="Counter changes the collection 'count', which all iterations of a Repeat"):
        ours.apply(variables, inputs(), mutable=["count"])


@in_both_modes
def test_the_checker_fails_where_it_must(mode: Mode) -> None:
    with pytest.raises(AssertionError):
        check_step(
            ReversibleSequential([Small()], coupling=Momentum(0.9 + 1e-5)),
            Plain([Small()], update=momentum(BETA)),
            mode,
            mutable=False,
        )
