"""revcore_jax.reversible against the plain network: values, gradients of every kind, transforms, and errors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import revcore
import revcore_jax
from revcore import (
    Additive,
    Affine,
    Anchor,
    Bijection,
    Chain,
    Checkpoint,
    Couple,
    Coupling,
    Momentum,
    Program,
    Repeat,
    Reverse,
    SpecError,
    StoreAll,
)
from revcore_jax import retain
from tests.helpers import AS_USERS_COMPILE, assert_close, name_of, tree_error
from tests.tiers import product

D = 4


pytestmark = pytest.mark.usefixtures("x64")


# --- networks ---------------------------------------------------------------------------------------------------------


def normal(seed: int, *shape: int, dtype: Any = np.float64) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def mlp(p: Any, x: Any, context: Any = 0.0) -> Any:
    return jnp.tanh(x @ p["w"] + context) @ p["v"]


def mlp_params(seed: int, *lead: int, d: int = D, dtype: Any = np.float64) -> dict[str, jax.Array]:
    return {"w": normal(seed, *lead, d, d, dtype=dtype) / 2, "v": normal(seed + 99, *lead, d, d, dtype=dtype) / 2}


def pair(p: Any, *streams: Any) -> Any:
    h = jnp.tanh(sum(streams) @ p["w"])
    return 0.3 * h, h @ p["v"]


def summed(p: Any, *streams: Any) -> Any:
    return mlp(p, sum(streams))


def with_aux(p: Any, x: Any) -> Any:
    f = mlp(p, x)
    return f, (f**2).mean(), {"count": jnp.int32(3), "nothing": None}


class Mixing:
    """A learned bijection of two streams."""

    @staticmethod
    def forward(p: Any, a: Any, b: Any) -> Any:
        return a + jnp.sin(b) * p["s"], b

    @staticmethod
    def inverse(p: Any, a: Any, b: Any) -> Any:
        return a - jnp.sin(b) * p["s"], b


def pool(p: Any, a: Any, b: Any) -> Any:
    """Halves the rows."""
    return tuple(jnp.tanh(s[::2] + s[1::2]) * p["s"] for s in (a, b))


LAYER = Chain((Couple(0, (1,)), Couple(1, (0,), Momentum(0.8))))


def networks() -> dict[str, tuple[Program, list[Any], list[Any]]]:
    """``(program, blocks, params)`` by name."""
    result: dict[str, tuple[Program, list[Any], list[Any]]] = {}

    def add(name: str, program: Program, blocks: Any, params: Any) -> None:
        n = program.num_slots
        result[name] = (program, [blocks] * n if callable(blocks) else blocks, [params(i) for i in range(n)])

    for name, coupling in {
        "additive": Additive(),
        "scaled": Additive(0.5),
        "momentum": Momentum(0.9),
        "functions": Coupling.from_functions(lambda x, f: jnp.arcsinh(x) + f, lambda y, f: jnp.sinh(y - f)),
    }.items():
        add(name, revcore.revnet(5, coupling), mlp, mlp_params)
    add("affine", revcore.revnet(4, Affine()), pair, mlp_params)
    add("three streams", revcore.revnet(5, [Additive(), Momentum(0.9)], 3), mlp, mlp_params)
    add("grouped", revcore.grouped(3, 2), mlp, mlp_params)
    add("columns", revcore.reversible_columns(2, 3), pair, mlp_params)
    add("momentum_net", revcore.momentum_net(4, 0.9), mlp, mlp_params)
    add("leapfrog", revcore.leapfrog(4, 0.3), mlp, mlp_params)
    add("repeat", Program((Repeat(LAYER, 7),)), mlp, lambda i: mlp_params(i, 7))
    add("nested repeat", Program((Repeat(Chain((Repeat(LAYER, 2), Couple(0, (1,)))), 3),)), mlp,
        lambda i: mlp_params(i, *((3,) if i == 2 else (3, 2))))  # fmt: skip
    add(
        "mixed",
        Program(
            (
                Couple(0, (1,)),
                Bijection.permute((1, 0)),
                Repeat(LAYER, 3),
                Bijection(),
                Anchor(),
                Chain((LAYER, LAYER)),
            ),
            output=(1, 0),
        ),
        [mlp, mlp, mlp, Mixing(), pool, mlp, mlp, mlp, mlp],
        lambda i: mlp_params(i, 3) if i in (1, 2) else {**mlp_params(i), "s": normal(i, D)},
    )
    add("aux", Program((Couple(0, (1,)), Repeat(Couple(1, (0,)), 3))), with_aux, lambda i: mlp_params(i, *[3] * i))
    return result


NETWORKS = list(networks())


@functools.cache
def stored(name: str) -> Any:
    """Return the network, its arguments, and the value and gradients of ``StoreAll()``."""
    network = networks()[name]
    given = network[2], streams_for(network)
    return network, given, jax.jit(jax.value_and_grad(loss_of(network, StoreAll()), argnums=(0, 1)))(*given)


# two outputs, and aux outputs, leave a step's own jit in other shapes; other structures are the conformance suite's
EAGER = "affine", "aux"
COMPILED = "functions", "columns"


def outputs(result: Any) -> tuple[Any, Any]:
    """Part ``reversible``'s result into streams and aux."""
    return (result[0], result[1]) if isinstance(result[0], tuple) else (result, [])


def loss_of(network: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
    program, blocks, _ = network

    def loss(params: Any, streams: Any) -> Any:
        streams, aux = outputs(revcore_jax.reversible(program, blocks, params, streams, *args, policy=policy, **kwargs))
        floats = [a for a in jax.tree.leaves(aux) if jnp.issubdtype(a.dtype, jnp.inexact)]
        return sum((i + 1) * jnp.sum(y * jnp.cos(y)) for i, y in enumerate(streams)) + sum(jnp.sum(a) for a in floats)

    return loss


def streams_for(network: Any, dtype: Any = np.float64) -> tuple[jax.Array, ...]:
    return tuple(normal(50 + i, 4, D, dtype=dtype) for i in range(network[0].num_streams))


@pytest.mark.parametrize(
    ("name", "mode"),
    product(NETWORKS, ["eager", "jit"], fast=lambda name, mode: name in (COMPILED if mode == "jit" else EAGER)),
)
def test_gradients_equal_store_all(name: str, mode: str) -> None:
    network, given, want = stored(name)
    wrap = jax.jit if mode == "jit" else lambda f: f
    got = wrap(jax.value_and_grad(loss_of(network, Reverse()), argnums=(0, 1)))(*given)
    assert tree_error(got, want) <= 1e-12


POLICIES = [
    Reverse(anchor_every=1),
    Reverse(anchor_every=2),
    Reverse(anchor_every=4),
    Reverse(keep_last=1),
    Reverse(keep_last=5),
    Reverse(keep_last=100),
    Reverse(anchor_every=3, keep_last=2),
    Reverse(anchor_every=4, recompute=jax.checkpoint_policies.dots_saveable),
    Reverse(keep_last=2, recompute=jax.checkpoint_policies.everything_saveable),
    Checkpoint(2, recompute=jax.checkpoint_policies.dots_saveable),
    Checkpoint(),
    Checkpoint(3),
    Checkpoint(100),
]


# Where a policy's cuts meet a structure: iterations of a scan, anchors and bijections beside one, aux outputs; and once
# each kind of policy on a plain chain. (What is kept by each is test_costs.py's affair.)
CUTS: dict[str, list[Any]] = {
    "momentum": [Reverse(anchor_every=3, keep_last=2), Reverse(keep_last=100), Checkpoint(100)],
    "nested repeat": [Reverse(anchor_every=2), Reverse(keep_last=1), Reverse(keep_last=5), Checkpoint(3)],
    "mixed": [Reverse(anchor_every=4), Reverse(anchor_every=3, keep_last=2), POLICIES[7], POLICIES[9]],
    "aux": [POLICIES[7], POLICIES[8], Checkpoint()],
}


@pytest.mark.parametrize(
    ("name", "policy"), product(CUTS, POLICIES, fast=lambda name, policy: policy in CUTS[name], name=name_of)
)
def test_policies_change_no_value(name: str, policy: Any) -> None:
    network, given, want = stored(name)
    got = jax.jit(jax.value_and_grad(loss_of(network, policy), argnums=(0, 1)))(*given)
    assert tree_error(got, want) <= 1e-12


@pytest.mark.parametrize(
    "policy",
    [
        Reverse(anchor_every=4, offload=True),
        Reverse(keep_last=2, recompute=jax.checkpoint_policies.dots_saveable, offload=True),
        Reverse(recompute=jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")),
        pytest.param(Checkpoint(2, offload=True), marks=pytest.mark.long),
        Checkpoint(2, recompute=jax.checkpoint_policies.dots_saveable, offload=True),
    ],
    ids=name_of,
)
def test_what_is_offloaded_comes_back(policy: Any) -> None:
    if "pinned_host" not in [memory.kind for memory in jax.devices()[0].addressable_memories()]:
        pytest.skip("this device has no pinned host memory")
    network, given, want = stored("repeat")
    step = jax.jit(jax.value_and_grad(loss_of(network, policy), argnums=(0, 1)))
    assert tree_error(step(*given), want) <= 1e-12
    assert "<host>" in str(jax.make_jaxpr(step)(*given))  # the CPU's compiler then makes one memory of both


def test_a_device_without_host_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retain, "_HOST", "no such memory")
    network = networks()["repeat"]
    with pytest.raises(SpecError, match=r"offload=True needs 'no such memory': leave it out here"):
        loss_of(network, Checkpoint(offload=True))(network[2], streams_for(network))


@pytest.mark.parametrize("name", product(["additive", "momentum", "affine", "repeat"], fast=lambda n: n == "repeat"))
def test_float32_stays_within_rounding(name: str) -> None:
    program, blocks, params = networks()[name]
    network = program, blocks, jax.tree.map(lambda a: a.astype(np.float32), params)
    given = network[2], streams_for(network, np.float32)
    got, want = (
        jax.jit(jax.grad(loss_of(network, policy)), compiler_options=AS_USERS_COMPILE)(*given)
        for policy in (Reverse(), StoreAll())
    )
    assert_close(got, want, depth=len(program.unrolled), dtype="float32")


def test_values_equal_the_numpy_reference_and_its_complex_step() -> None:
    program = revcore.revnet(3, [Momentum(0.8), Additive()])

    def forward(xp: Any, run: Any, tree: Any) -> Any:
        blocks = [lambda x, c, p=p: xp.tanh(x @ p["w"] + c) @ p["v"] for p in tree["params"]]
        y = run(program, blocks, tree["streams"], tree["context"])
        return (y[0] * y[0]).sum() + 2 * y[1].sum()

    tree = {
        "params": [mlp_params(i) for i in range(3)],
        "streams": [normal(7, 2, D), normal(8, 2, D)],
        "context": normal(9, D),
    }
    tree = jax.tree.map(np.asarray, tree)

    def loss(tree: Any) -> Any:
        y = revcore_jax.reversible(program, [mlp] * 3, tree["params"], tree["streams"], tree["context"])
        return (y[0] * y[0]).sum() + 2 * y[1].sum()

    from revcore import reference

    want = reference.gradient(lambda t: forward(np, reference.forward, t), tree)
    assert tree_error(jax.grad(loss)(tree), want) <= 1e-13
    assert abs(loss(tree) - forward(np, reference.forward, tree)) <= 1e-12


@pytest.mark.parametrize(
    "name",
    product([n for n in NETWORKS if n != "mixed"], fast=lambda n: n in ("three streams", "functions", "nested repeat")),
)
def test_inverse_undoes_forward(name: str) -> None:
    program, blocks, params = network = networks()[name]
    streams = streams_for(network)
    y, _ = outputs(revcore_jax.reversible(program, blocks, params, streams))
    assert tree_error(revcore_jax.inverse(program, blocks, params, y), streams) <= 1e-12
    back = jax.jit(lambda params, y: revcore_jax.inverse(program, blocks, params, y))
    assert tree_error(back(params, y), streams) <= 1e-12


def test_check_inverse_reports_each_step() -> None:
    program, blocks, params = network = networks()["mixed"]
    report = revcore_jax.check_inverse(program, blocks, params, streams_for(network))
    assert len(report.steps) == len(program.unrolled) == len(report.drift)
    assert report.worst <= 1e-14
    assert "Anchor" in str(report)
    wrong = Coupling.from_functions(lambda x, f: 0.5 * x + f, lambda y, f: y - f)
    report = revcore_jax.check_inverse(
        revcore.revnet(3, [Additive(), wrong]), [mlp] * 3, params[:1] * 3, (jnp.ones((1, D)),) * 2
    )
    assert report.local[0] < 1e-15
    assert report.local[1] > 0.1


def test_an_anchor_ends_the_errors_of_what_was_rebuilt() -> None:
    wrong = Coupling.from_functions(lambda x, f: x + f, lambda y, f: y - f + 1)
    network = revcore.revnet(2, wrong), [mlp] * 2, [mlp_params(i) for i in range(2)]
    given = network[2], streams_for(network)
    want, rebuilt, anchored = (
        jax.jit(jax.grad(loss_of(network, policy)))(*given)
        for policy in (StoreAll(), Reverse(), Reverse(anchor_every=1))
    )
    assert tree_error(rebuilt, want) > 0.01
    assert tree_error(anchored, want) <= 1e-12


# --- arguments --------------------------------------------------------------------------------------------------------


def test_static_arguments_that_are_equal_and_of_other_types_are_told_apart() -> None:
    program, streams = Program((Couple(0, (1,)),)), (jnp.zeros(1), jnp.ones(1))

    def block(p: Any, x: Any, how: Any) -> Any:
        return x * [bool, int, float].index(type(how))

    got = [revcore_jax.reversible(program, [block], [None], streams, how)[0].item() for how in (True, 1, 1.0)]
    assert got == [0, 1, 2]


def test_context_kwargs_and_layerwise_arguments_have_gradients() -> None:
    program = Program((Couple(0, (1,)), Repeat(Couple(1, (0,)), 3), Couple(0, (1,))))

    def block(
        p: Any, x: Any, context: Any, scale: Any, *, shift: Any, flag: bool, mode: str, gate: Any, none: Any
    ) -> Any:
        assert flag is True
        assert mode == "tanh"
        assert none is None
        return jnp.tanh(x @ p["w"] + context["c"][jnp.asarray(context["i"])] * scale) + shift * gate

    def loss(given: Any, policy: Any) -> Any:
        y = revcore_jax.reversible(
            program, [block] * 3, given["params"], given["x"], {"c": given["c"], "i": jnp.arange(4)},
            shift=given["shift"], flag=True, mode="tanh", none=None, layerwise_args_kwargs=given["layerwise"],
            policy=policy,
        )  # fmt: skip
        return sum(jnp.sum(v**2) for v in y)

    layer = [((normal(i, *lead),), {"gate": normal(i + 5, *lead)}) for i, lead in enumerate([(), (3,), ()])]
    given = {
        "params": [mlp_params(0), mlp_params(1, 3), mlp_params(2)],
        "x": (normal(3, 4, D), normal(4, 4, D)),
        "c": normal(5, 4, D),
        "shift": normal(6, D),
        "layerwise": layer,
    }
    compiled = jax.jit(jax.grad(loss), static_argnums=1)
    want = compiled(given, StoreAll())
    assert tree_error(jax.grad(loss)(given, Reverse()), want) <= 1e-12
    assert tree_error(compiled(given, Reverse()), want) <= 1e-12


@pytest.mark.parametrize(
    ("where", "kind"),
    product(
        ["params", "args", "layerwise"],
        ["typed", "raw"],
        fast=lambda where, kind: kind == ("raw" if where == "args" else "typed"),
    ),
)
def test_keys_replay(where: str, kind: str) -> None:
    """The mask of the rebuild is that of the forward pass: gradients equal store-all's with the same keys."""
    program, n = Program((Couple(0, (1,)), Repeat(Couple(1, (0,)), 3))), 4
    # rbg compiles quicker than threefry, and splits as that one does
    keys = jax.random.split(jax.random.key(0, impl="rbg") if kind == "typed" else jax.random.PRNGKey(0), n)

    def dropout(x: Any, key: Any) -> Any:
        return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)

    def block(p: Any, x: Any, key: Any = None) -> Any:
        return dropout(mlp(p, x), p.get("key", key))

    params: list[Any] = [mlp_params(0), mlp_params(1, 3)]
    args, layerwise = (), None
    if where == "params":
        params = [{**params[0], "key": keys[0]}, {**params[1], "key": keys[1:]}]
    elif where == "args":
        args = (keys[0],)
    else:
        layerwise = [((), {"key": keys[0]}), ((), {"key": keys[1:]})]

    def loss(weights: Any, policy: Any) -> Any:
        merged = [{**p, **w} for p, w in zip(params, weights, strict=True)]
        y = revcore_jax.reversible(
            program, [block] * 2, merged, (normal(8, 3, D), normal(9, 3, D)), *args,
            layerwise_args_kwargs=layerwise, policy=policy,
        )  # fmt: skip
        return jnp.sum(y[0] * y[1])

    weights = [{k: p[k] for k in ("w", "v")} for p in params]
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    want = gradient(weights, StoreAll())
    assert tree_error(gradient(weights, Reverse()), want) <= 1e-12
    drawn = [jax.tree.map(np.asarray, dropout(jnp.ones(64), k)) for k in keys]
    assert not np.array_equal(drawn[0], drawn[1])


def test_aux_is_one_tuple_for_each_slot() -> None:
    program, blocks, params = network = networks()["aux"]
    (_, aux), (_, plain) = (
        revcore_jax.reversible(program, blocks, params, streams_for(network), policy=p) for p in (Reverse(), StoreAll())
    )
    assert isinstance(aux, list)
    assert [a[0].shape for a in aux] == [(), (3,)]
    assert aux[1][1]["count"].tolist() == [3, 3, 3]
    assert aux[1][1]["nothing"] is None
    assert tree_error([a[0] for a in aux], [a[0] for a in plain]) == 0


# --- closures ---------------------------------------------------------------------------------------------------------


def test_a_learned_bijection_may_close_over_values() -> None:
    def loss(s: Any, policy: Any) -> Any:
        class Shift:
            def forward(self, p: Any, a: Any, b: Any) -> Any:
                return a * jnp.exp(s), b + s

            def inverse(self, p: Any, a: Any, b: Any) -> Any:
                return a * jnp.exp(-s), b - s

        program = Program((Bijection(), Couple(0, (1,)), Bijection()))
        shift = Shift()
        y = revcore_jax.reversible(
            program, [shift, mlp, shift], [None, mlp_params(0), ()], (normal(1, 2, D), normal(2, 2, D)), policy=policy
        )
        return jnp.sum(y[0] * y[1])

    assert tree_error(jax.grad(loss)(normal(3, D), Reverse()), jax.grad(loss)(normal(3, D), StoreAll())) <= 1e-12


def test_blocks_at_equal_steps_close_over_values_of_their_own() -> None:
    """Two values in the first and one of them in the second, beside an argument of both."""
    program = Program((Couple(0, (1,)), Couple(0, (1,))))
    streams, context = (normal(1, 2, D), normal(2, 2, D)), normal(3, D)

    def loss(values: Any, policy: Any) -> Any:
        a, b = values
        blocks = [lambda p, x, c: jnp.sin(a * x) * b + c, lambda p, x, c: jnp.cos(b * x) * c]
        return jnp.sum(revcore_jax.reversible(program, blocks, [None] * 2, streams, context, policy=policy)[0] ** 2)

    values = normal(4, D), normal(5, D)
    x, y = streams[1], streams[0]

    def plain(values: Any) -> Any:
        a, b = values
        return jnp.sum((y + jnp.sin(a * x) * b + context + jnp.cos(b * x) * context) ** 2)

    got = jax.jit(jax.grad(loss), static_argnums=1)(values, Reverse())
    assert tree_error(got, jax.jit(jax.grad(plain))(values)) <= 1e-12


def test_a_coupling_that_closes_over_a_tracer_is_refused() -> None:
    def loss(a: Any) -> Any:
        mine = Coupling.from_functions(lambda x, f: a * x + f, lambda y, f: (y - f) / a)
        return jnp.sum(
            revcore_jax.reversible(revcore.revnet(1, mine), [mlp], [mlp_params(0)], (normal(1, 2, D),) * 2)[1]
        )

    with pytest.raises(SpecError, match=r"coupling of step 0 .* closes over a traced value"):
        jax.grad(loss)(0.5)


# --- transforms of other kinds of steps (test_transforms.py has the rest) -----------------------------------------


@pytest.mark.parametrize("name", ["affine"])
def test_second_derivatives(name: str) -> None:
    network = networks()[name]
    given = network[2], streams_for(network)

    def curvature(policy: Any) -> Any:
        def slope(*given: Any) -> Any:
            return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(loss_of(network, policy))(*given)))

        return jax.jit(jax.grad(slope, argnums=(0, 1)))(*given)

    assert tree_error(curvature(Reverse()), curvature(StoreAll())) <= 1e-12


@pytest.mark.parametrize("name", product(["affine", "mixed", "aux"], fast=lambda name: name == "aux"))
def test_vmap_both_ways(name: str) -> None:
    network = networks()[name]
    streams = tuple(jnp.stack([s, 2 * s, s - 1]) for s in streams_for(network))

    def inside(f: Any) -> Any:
        return jax.vmap(jax.grad(f, argnums=(0, 1)), in_axes=(None, 0))

    def outside(f: Any) -> Any:
        return jax.grad(lambda params, streams: jax.vmap(f, in_axes=(None, 0))(params, streams).sum(), argnums=(0, 1))

    for transform in (inside, outside):
        run = lambda policy: jax.jit(transform(loss_of(network, policy)))(network[2], streams)  # noqa: B023, E731
        assert tree_error(run(Reverse()), run(StoreAll())) <= 1e-12


# --- errors -----------------------------------------------------------------------------------------------------------


def call(**changed: Any) -> Any:
    given: dict[str, Any] = {
        "program": revcore.revnet(2), "blocks": [mlp] * 2, "params": [mlp_params(i) for i in range(2)],
        "streams": (normal(0, 3, D), normal(1, 3, D)),
    }  # fmt: skip
    given.update(changed)
    return revcore_jax.reversible(**given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"program": "revnet"}, "expected a revcore.Program"),
        ({"blocks": [mlp]}, "1 blocks came, but the program takes 2"),
        ({"blocks": [mlp, 3]}, "block 1 came as 3, expected a function"),
        ({"params": [{}]}, "params came as 1 entries, expected a sequence of 2"),
        ({"params": {"w": 1}}, "params came as one dict"),
        ({"streams": (1.0, 2.0)}, "stream 0 came as float, expected a JAX array"),
        ({"streams": np.zeros((2, 3))}, "streams came as one ndarray"),
        ({"streams": (np.zeros(3),)}, "1 streams came, but the program has 2"),
        ({"streams": (np.arange(3), np.arange(3))}, "stream 0 came as a JAX array of int64"),
        ({"streams": (np.zeros((3, D)), np.zeros((4, D)))}, "expected one shape for all"),
        ({"policy": "reverse"}, "expected an instance of Reverse, StoreAll, Checkpoint"),
        ({"policy": revcore.Reverse(recompute=["dot"])}, "JAX has no list of operators: write recompute=jax.check"),
        ({"policy": revcore.StoreAll(offload=True)}, r"write Reverse\(offload=True\)"),
        ({"policy": revcore.Reverse(anchor_every=1, offload=True)}, "the program has no Repeat: write one"),
        ({"policy": revcore.MemoryBudget(fraction=0.5)}, "chooses none by step"),
        ({"blocks": [mlp, lambda p, x: x[:, :2]]}, r"block 1 returned shape \(3, 2\)"),
        ({"blocks": [mlp, lambda p, x: None]}, "block 1 returned NoneType, expected a JAX array"),
        ({"blocks": [mlp, lambda p, x: 0.0]}, r"block 1 returned shape \(\), but the stream"),
        ({"blocks": [lambda p, x: x + 0j, mlp]}, "step 0 turned a stream of float64"),
        ({"program": revcore.revnet(2, Affine())}, "Affine takes 2 arrays"),
        ({"layerwise_args_kwargs": [((), {})]}, "layerwise_args_kwargs came as 1 entries"),
        ({"layerwise_args_kwargs": [((), {}), {}]}, "entry 1 came as {}, expected"),
        (
            {"program": Program((Repeat(LAYER, 3),))},
            r"block 0 is inside Repeat\(n=3\), but a leaf .* has shape \(4, 4\)",
        ),
        (
            {"program": Program((Anchor(), Couple(0, (1,)))), "blocks": [lambda p, a, b: a, mlp]},
            "must return its 2 streams",
        ),
        ({"program": Program((Bijection(), Couple(0, (1,))))}, "must have forward"),
    ],
)
def test_bad_input_is_told(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        call(**changed)


def test_a_repeated_body_must_keep_shapes() -> None:
    program = Program((Repeat(Anchor(), 2),))
    with pytest.raises(SpecError, match="the body of a Repeat turned streams"):
        revcore_jax.reversible(program, [pool], [{"s": normal(0, 2, D)}], (normal(1, 4, D), normal(2, 4, D)))


def test_an_anchor_has_no_inverse() -> None:
    with pytest.raises(SpecError, match="step 0 is an Anchor, which has no inverse"):
        revcore_jax.inverse(Program((Anchor(),)), [pool], [None], (normal(1, 4, D), normal(2, 4, D)))


def test_streams_of_unlike_shapes_where_the_program_allows() -> None:
    def block(p: Any, *streams: Any) -> Any:
        total = sum(s.sum(-1, keepdims=True) for s in streams)
        return 0.1 * jnp.tanh(total * p["s"]), jnp.sin(total * p["t"])

    program = dataclasses.replace(revcore.reversible_columns(2, 3))
    sizes = [2, 4, 6]
    params = [{"s": normal(i, sizes[i % 3]), "t": normal(i + 9, sizes[i % 3])} for i in range(6)]
    streams = tuple(normal(i, 3, n) for i, n in enumerate(sizes))
    network = program, [block] * 6, params
    want, got = (
        jax.jit(jax.grad(loss_of(network, p), argnums=(0, 1)))(params, streams) for p in (StoreAll(), Reverse())
    )
    assert tree_error(got, want) <= 1e-12


def test_an_anchor_inside_a_repeat_without_jit() -> None:
    program = Program((Repeat(Chain((Couple(0, (1,)), Anchor(), Couple(1, (0,)))), 3),))
    blocks = [lambda w, x: jnp.tanh(x @ w), lambda w, a, b: (a * w[0], b * w[1]), lambda w, x: jnp.sin(x @ w)]
    params = [jnp.full((3, 4, 4), 0.1), jnp.ones((3, 2)), jnp.full((3, 4, 4), 0.2)]

    def loss(params: Any) -> Any:
        y = revcore_jax.reversible(program, blocks, params, (jnp.ones((2, 4)), jnp.full((2, 4), 2.0)))
        return (y[0] * y[1]).sum()

    compiled = jax.grad(loss)(params)
    with jax.disable_jit():
        plain = jax.grad(loss)(params)
    for a, b in zip(compiled, plain, strict=True):
        assert jnp.linalg.norm(a - b) <= 1e-6 * jnp.linalg.norm(b)
