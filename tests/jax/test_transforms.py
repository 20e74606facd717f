"""Every transform of JAX around and inside a reversible network, against the same network written out by hand.

A case is a function of a network, its parameters and its streams. It runs twice, on revcore_jax and on plain
arithmetic that stores everything (``plain_network.py``): a chain and a ``Repeat``, in float64 (≤ 1e-12 over the whole
tree), and under jit in float32 (≤ 16·depth·eps, against float64).

What is inside a block is as much a chain's affair as a ``Repeat``'s, and what is around the network transforms the
scan of a ``Repeat`` too: so the fast tier has each case once, the former on a chain and the latter on a ``Repeat``;
under jit, which compiles once what would be thirty operations. Of transforms that are one to the network, it has one.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from revcore import Checkpoint, Reverse, StoreAll
from tests.helpers import tree_error
from tests.jax.plain_network import (
    DEPTH,
    KINDS,
    ROWS,
    D,
    Kind,
    Net,
    arrays,
    assert_equal_networks,
    energy,
    gradient,
    loss,
    mlp,
)
from tests.tiers import product

Case = Callable[[Net, Any, Any], Any]
CASES: dict[str, Case] = {}

pytestmark = pytest.mark.usefixtures("x64")


def name_of_mode(value: Any) -> str:
    return ("eager", "jit")[value] if isinstance(value, bool) else value


on_chain, on_repeat = (
    pytest.mark.parametrize("kind", [k if k == here else pytest.param(k, marks=pytest.mark.long) for k in KINDS])
    for here in KINDS
)
compiled_repeat, eager_chain_and_compiled_repeat = (
    pytest.mark.parametrize(
        ("jit", "kind"), product([False, True], KINDS, fast=lambda *case, here=here: case in here, name=name_of_mode)
    )
    for here in ([(True, "repeat")], [(False, "chain"), (True, "repeat")])
)


def case(name: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        assert name not in CASES
        CASES[name] = function
        return function

    return add


def inside(name: str, block: Callable[..., Any]) -> None:
    """Add a case: the gradient of networks of such a block."""
    case(name)(lambda net, p, x: gradient(net, block=block)(p, x))


# --- gradients --------------------------------------------------------------------------------------------------------

case("grad")(lambda net, p, x: gradient(net)(p, x))


@case("value_and_grad, has_aux")
def _(net: Net, p: Any, x: Any) -> Any:
    def both(p: Any, x: Any) -> Any:
        y = net(p, x)
        return energy(y), y

    return jax.value_and_grad(both, argnums=(0, 1), has_aux=True)(p, x)


@case("vjp, several cotangents")
def _(net: Net, p: Any, x: Any) -> Any:
    y, pull = jax.vjp(net, p, x)
    return y, pull(y), pull(y[::-1]), jax.vmap(pull)(tuple(jnp.stack([a, 2 * a, a * a]) for a in y))


case("first output alone")(lambda net, p, x: jax.grad(lambda p, x: jnp.sum(net(p, x)[0] ** 2), argnums=(0, 1))(p, x))
case("second output alone")(lambda net, p, x: jax.grad(lambda p, x: jnp.sum(net(p, x)[1] ** 2), argnums=(0, 1))(p, x))


@case("unused parameters")
def _(net: Net, p: Any, x: Any) -> Any:
    p = [{**q, "unused": {"a": q["w"][..., 0], "b": None}} for q in p]
    grads = gradient(net)(p, x)[1][0]
    return grads, [jnp.sum(g["unused"]["a"] == 0) for g in grads]


inside("unused source", lambda p, x: jnp.zeros_like(x) + p["w"][0])


@case("grad of grad")
def _(net: Net, p: Any, x: Any) -> Any:
    def slope(p: Any, x: Any) -> Any:
        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(loss(net), argnums=(0, 1))(p, x)))

    return jax.grad(slope, argnums=(0, 1))(p, x)


case("hessian")(lambda net, p, x: jax.hessian(lambda v: energy(net(p, (v, v / 2))))(x[0]))
case("jacrev")(lambda net, p, x: jax.jacrev(lambda v: net(p, (v, 2 * v)))(x[0][0]))


@case("HVP, forward over reverse")
def _(net: Net, p: Any, x: Any) -> Any:
    return jax.jvp(jax.grad(loss(net), argnums=(0, 1)), (p, x), (jax.tree.map(jnp.cos, p), x[::-1]))


@case("HVP, reverse over reverse")
def _(net: Net, p: Any, x: Any) -> Any:
    _, pull = jax.vjp(jax.grad(loss(net), argnums=(0, 1)), p, x)
    return pull((jax.tree.map(jnp.cos, p), x[::-1]))


FORWARD: dict[str, dict[str, Any]] = {"StoreAll": {"policy": StoreAll()}, "Checkpoint": {"policy": Checkpoint(2)}}
for name, how in FORWARD.items():

    @case(f"jvp, {name}")
    def _(net: Net, p: Any, x: Any, how: Any = how) -> Any:
        return jax.jvp(loss(net, **how), (p, x), (jax.tree.map(jnp.cos, p), x[::-1]))


@case("linearize, StoreAll")
def _(net: Net, p: Any, x: Any) -> Any:
    value, push = jax.linearize(loss(net, **FORWARD["StoreAll"]), p, x)
    return value, push(p, x), push(jax.tree.map(jnp.cos, p), x[::-1])


case("jacfwd, StoreAll")(lambda net, p, x: jax.jacfwd(lambda v: net(p, (v, 2 * v), **FORWARD["StoreAll"]))(x[0][0]))


# --- vmap -------------------------------------------------------------------------------------------------------------


def many(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a, a / 2, jnp.sin(a)]), tree)


def last(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.stack([a, a / 2, jnp.sin(a)], -1), tree)


case("vmap of grad, streams")(lambda net, p, x: jax.vmap(gradient(net), in_axes=(None, 0))(p, many(x)))
case("vmap of grad, params")(lambda net, p, x: jax.vmap(gradient(net), in_axes=(0, None))(many(p), x))
case("vmap of grad, one stream, other axes")(
    lambda net, p, x: jax.vmap(gradient(net), in_axes=(-1, (None, 1)), out_axes=(0, 1))(
        last(p), (x[0], jnp.stack([x[1], x[0], x[1] / 2], 1))
    )
)
case("vmap of vmap")(
    lambda net, p, x: jax.vmap(jax.vmap(gradient(net), in_axes=(None, 0)), in_axes=(0, None))(many(p), many(x))
)
for name, axes in {"streams": (None, 0), "params": (0, None)}.items():

    @case(f"grad of vmap, {name}")
    def _(net: Net, p: Any, x: Any, axes: Any = axes) -> Any:
        given = many(p) if axes[0] == 0 else p, many(x) if axes[1] == 0 else x
        return jax.value_and_grad(lambda *a: jax.vmap(loss(net), in_axes=axes)(*a).sum(), argnums=(0, 1))(*given)


@case("pmean over a vmapped axis in a block, vmap of grad")
def _(net: Net, p: Any, x: Any) -> Any:
    run = gradient(net, block=lambda q, z: mlp(q, z - lax.pmean(z, "batch")))
    return jax.vmap(run, in_axes=(None, 0), axis_name="batch")(p, many(x))


# --- around -----------------------------------------------------------------------------------------------------------


def around(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Add a case: the gradient of ``wrap(net)``, both functions of parameters and streams."""
    case(name)(lambda net, p, x: jax.value_and_grad(lambda *a: energy(wrap(net)(*a)), argnums=(0, 1))(p, x))


saveable = jax.checkpoint_policies.dots_saveable
around("checkpoint around", jax.checkpoint)
around("checkpoint with a policy around", partial(jax.checkpoint, policy=saveable))
around("scan around, over params", lambda f: lambda p, x: lax.scan(lambda c, q: (f(q, c), None), x, many(p))[0])
around("fori_loop around", lambda f: lambda p, x: lax.fori_loop(0, 3, lambda _, c: f(p, c), x))
around("cond around", lambda f: lambda p, x: lax.cond(x[0].sum() > -1e9, lambda: f(p, x), lambda: x))
around("switch around", lambda f: lambda p, x: lax.switch(1, [lambda x: x, lambda x: f(p, x)], x))
around("stop_gradient around", lambda f: lambda p, x: f(p, (lax.stop_gradient(x[0]), x[1])))


@case("while_loop around, descending")
def _(net: Net, p: Any, x: Any) -> Any:
    def step(carry: Any) -> Any:
        i, p = carry
        return i + 1, jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(loss(net))(p, x))

    return lax.while_loop(lambda carry: carry[0] < 3, step, (0, p))[1]


# --- inside a block ---------------------------------------------------------------------------------------------------

inside("checkpoint in a block", jax.checkpoint(mlp))
inside("checkpoint with a policy in a block", jax.checkpoint(mlp, policy=saveable))
inside("scan in a block", lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c + w), None), x, p["w"])[0] @ p["v"])
inside("fori_loop in a block", lambda p, x: lax.fori_loop(0, 2, lambda i, c: mlp(p, c), x))
inside("cond in a block", lambda p, x: lax.cond(x.sum() > 0, lambda: mlp(p, x), lambda: jnp.sin(x)))
inside("switch in a block", lambda p, x: lax.switch((x.sum() > 0).astype(int), [jnp.sin, lambda x: mlp(p, x)], x))
inside("jit in a block", jax.jit(mlp))
inside("vmap in a block", jax.vmap(mlp, in_axes=(None, 0)))
inside("grad in a block", lambda p, x: jax.grad(lambda x: jnp.sum(jnp.sin(mlp(p, x))))(x))
inside("stop_gradient in a block", lambda p, x: mlp(p, x) * lax.stop_gradient(jnp.cos(x)) + lax.stop_gradient(x))
inside("optimization_barrier in a block", lambda p, x: mlp(*lax.optimization_barrier((p, x))))
inside("a block without parameters", lambda p, x: jnp.sin(x))


def _while(p: Any, x: Any) -> Any:
    # no derivative of a while_loop goes backwards, in any network: so of its value alone
    steps, _ = lax.while_loop(
        lambda c: c[1] < 9, lambda c: (c[0] + 1, 2 * c[1]), (0, lax.stop_gradient(jnp.cosh(x[0, 0])))
    )
    return mlp(p, x) * steps


inside("while_loop in a block", _while)


@jax.custom_jvp
def _cube(x: Any) -> Any:
    return x**3


_cube.defjvp(lambda given, moving: (given[0] ** 3, 2 * moving[0]))  # wrong on purpose: it must be the rule that is used


@jax.custom_vjp
def _clip(x: Any) -> Any:
    return jnp.sin(x)


_clip.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * x,))
inside("custom_jvp in a block", lambda p, x: mlp(p, _cube(x)))
inside("custom_vjp in a block", lambda p, x: mlp(p, _clip(x)))


def _constant(p: Any, x: Any) -> Any:
    with jax.ensure_compile_time_eval():
        scale = float(jnp.sum(jnp.arange(4.0))) / 7
    return scale * mlp(p, x)


inside("ensure_compile_time_eval in a block", _constant)
inside("named_call in a block", jax.named_call(mlp, name="mine"))


@case("a reversible network in a block")
def _(net: Net, p: Any, x: Any) -> Any:
    def block(q: Any, x: Any) -> Any:
        return net(net.slots(lambda i: {**q, "v": q["v"] / (i + 1)}), (x, jnp.cos(x)))[1]

    return gradient(net, block=block)(p, x)


# --- leaves -----------------------------------------------------------------------------------------------------------


@case("integers, static values and None")
def _(net: Net, p: Any, x: Any) -> Any:
    def block(q: Any, x: Any, context: Any, *, flag: bool, mode: str, nothing: None) -> Any:
        assert (flag, mode, nothing, q["name"], q["nothing"]) == (True, "tanh", None, "mlp", None)
        return mlp(q, x[..., q["order"]]) * q["power"] * context["scale"][context["index"]]

    fixed = net.slots(lambda i: {"order": jnp.roll(jnp.arange(D), i), "power": 0.5, "nothing": None, "name": "mlp"})

    def run(p: Any, x: Any, scale: Any) -> Any:
        p = [{**a, **b} for a, b in zip(p, fixed, strict=True)]
        context = {"scale": scale, "index": jnp.array([2, 0, 1])}
        return energy(net(p, x, context, block=block, flag=True, mode="tanh", nothing=None))

    return jax.value_and_grad(run, argnums=(0, 1, 2))(p, x, x[0][0])


gradient_of = partial(jax.value_and_grad, argnums=(0, 1))


def _dropout(q: Any, x: Any, key: Any = None) -> Any:
    key = q.get("key", key)
    return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * mlp(q, x), 0)


@case("typed keys")
def _(net: Net, p: Any, x: Any) -> Any:
    keys = jax.random.split(jax.random.key(0, impl="rbg"), DEPTH)  # compiles quicker than threefry

    def in_params(p: Any, x: Any) -> Any:
        there = net.slots(lambda i: {"key": keys[i]})
        return energy(net([{**a, **b} for a, b in zip(p, there, strict=True)], x, block=_dropout))

    def by_layer(p: Any, x: Any, keys: Any) -> Any:
        return energy(net(p, x, block=_dropout, layerwise=net.slots(lambda i: ((), {"key": keys[i]}))))

    return gradient_of(in_params)(p, x), jax.vmap(gradient_of(by_layer), in_axes=(None, None, 1))(
        p, x, jnp.stack([keys, keys[::-1]], 1)
    )


@case("uint32 keys")
def _(net: Net, p: Any, x: Any) -> Any:
    key = jax.random.PRNGKey(0)
    return gradient_of(lambda p, x: energy(net(p, x, key, block=_dropout)))(p, x)


@partial(jax.tree_util.register_dataclass, data_fields=["w", "v"], meta_fields=["name"])
@dataclass
class Weights:
    w: Any
    v: Any
    name: str


@case("parameters in a dataclass")
def _(net: Net, p: Any, x: Any) -> Any:
    p = [Weights(q["w"], q["v"], "mine") for q in p]
    return gradient(net, block=lambda q, x: mlp({"w": q.w, "v": q.v}, x))(p, x)


@case("complex streams")
def _(net: Net, p: Any, x: Any) -> Any:
    p, x = jax.tree.map(lambda a: a + 0.1j * a[..., ::-1], p), (x[0] + 0.5j * x[1], x[1] - 0.5j * x[0])
    run = lambda p, x: sum(jnp.sum(jnp.abs(y) ** 2 + (y * y).real) for y in net(p, x))  # noqa: E731
    return jax.value_and_grad(run, argnums=(0, 1))(p, x)


@case("complex blocks' real parts over real streams")
def _(net: Net, p: Any, x: Any) -> Any:
    p = jax.tree.map(lambda a: a + 0.1j * a[..., ::-1], p)
    return gradient(net, block=lambda q, x: mlp(q, x).real)(p, x)


# --- closures ---------------------------------------------------------------------------------------------------------


@case("closure")
def _(net: Net, p: Any, x: Any) -> Any:
    def run(p: Any, x: Any, scale: Any, seed: Any) -> Any:
        order, key = jnp.argsort(scale), jax.random.key(seed)
        noise = jax.random.randint(key, (D,), 0, 9, jnp.int32).astype(scale.dtype)  # the same in all dtypes
        return energy(net(p, x, block=lambda q, z: mlp(q, z[..., order]) * scale**2 + noise))

    return jax.value_and_grad(run, argnums=(0, 1, 2))(p, x, x[0][0], 3)


@case("nested closures")
def _(net: Net, p: Any, x: Any) -> Any:
    def run(p: Any, x: Any, a: Any, b: Any) -> Any:
        def outer(t: Any) -> Any:
            doubled = 2 * t

            def inner(z: Any) -> Any:
                return lax.cond(z.sum() > 0, lambda: z * doubled, lambda: z * b)

            return lambda q, z: mlp(q, inner(z)) * t

        return energy(net(p, x, block=outer(a)))

    return jax.value_and_grad(run, argnums=(0, 1, 2, 3))(p, x, x[0][0], x[1][1])


@case("closure over a scan's carry and items")
def _(net: Net, p: Any, x: Any) -> Any:
    def run(p: Any, x: Any, items: Any) -> Any:
        def step(carry: Any, item: Any) -> Any:
            streams, t = carry
            return (net(p, streams, block=lambda q, z: mlp(q, z) * item + t), jnp.sin(t + item)), None

        return energy(lax.scan(step, (x, x[0][0]), items)[0][0])

    return jax.value_and_grad(run, argnums=(0, 1, 2))(p, x, jnp.stack([x[0][0], x[1][0]]))


@case("closure over what is vmapped")
def _(net: Net, p: Any, x: Any) -> Any:
    run = lambda p, x, t: energy(net(p, x, block=lambda q, z: mlp(q, z) * t))  # noqa: E731
    return jax.vmap(jax.value_and_grad(run, argnums=(0, 1, 2)), in_axes=(None, None, 0))(p, x, x[1])


@case("closure, grad of grad")
def _(net: Net, p: Any, x: Any) -> Any:
    run = lambda t: energy(net(p, x, block=lambda q, z: mlp(q, z) * t))  # noqa: E731
    return jax.grad(lambda t: jnp.sum(jax.grad(run)(t) ** 2))(x[0][0])


# --- the table --------------------------------------------------------------------------------------------------------


@functools.cache
def by_hand(name: str, kind: Kind) -> Any:
    return jax.jit(partial(CASES[name], Net(kind, ours=False)))(*arrays(kind))


# That fail with others: made of the same derivatives and batching, or of JAX's own primitives alone
ALIKE = {
    "value_and_grad, has_aux", "grad of vmap, params", "stop_gradient around", "while_loop around, descending",
    "jit in a block",
    "second output alone", "jacrev", "hessian", "HVP, reverse over reverse", "linearize, StoreAll", "jacfwd, StoreAll",
    "vmap of grad, params", "vmap of vmap", "checkpoint with a policy around", "fori_loop around", "switch around",
    "checkpoint with a policy in a block", "fori_loop in a block", "switch in a block", "vmap in a block",
    "optimization_barrier in a block", "while_loop in a block", "ensure_compile_time_eval in a block",
    "named_call in a block", "uint32 keys", "complex blocks' real parts over real streams",
}  # fmt: skip
# Without a jit around, each step is traced by itself, and what it closes over are values, or tracers of the transform
EAGER_TOO = "nested closures", "closure, grad of grad"


def fast(name: str, mode: str, kind: Kind) -> bool:
    if name == "grad":
        return (mode, kind) == ("float64", "chain")
    on = "chain" if "in a block" in name else "repeat"
    return name not in ALIKE and kind == on and (mode != "float64" or name in EAGER_TOO)


@pytest.mark.parametrize(("name", "mode", "kind"), product(CASES, ["float64", "float32 jit"], KINDS, fast=fast))
def test_transform(name: str, mode: str, kind: Kind) -> None:
    dtype, *jit = mode.split()
    run = partial(CASES[name], Net(kind, ours=True))
    got = (jax.jit(run) if jit else run)(*arrays(kind, dtype))
    assert_equal_networks(got, by_hand(name, kind), dtype)


# --- outside of jit ---------------------------------------------------------------------------------------------------

Outside = Callable[[Callable[..., Any], Any, Any], list[Any]]
OUTSIDE: dict[str, Outside] = {}


def outside(name: str) -> Callable[[Outside], Outside]:
    """Add a case: from the gradient function and its arguments to results that all must be that gradient."""

    def add(function: Outside) -> Outside:
        OUTSIDE[name] = function
        return function

    return add


def under(name: str, context: Callable[[], Any], jit: bool = True) -> None:
    """Add a case: the gradient in a context."""

    def run(f: Callable[..., Any], p: Any, x: Any) -> list[Any]:
        with context():
            return [(jax.jit(f) if jit else f)(p, x)]

    OUTSIDE[name] = run


under("disable_jit", jax.disable_jit, jit=False)
under("debug_nans", lambda: jax.debug_nans(True), jit=False)
under("debug_nans, jit", lambda: jax.debug_nans(True))
under("transfer_guard", lambda: jax.transfer_guard("disallow"))
under("strict dtype promotion", lambda: jax.numpy_dtype_promotion("strict"))
under("enable_checks", lambda: jax.enable_checks(True))
under("checking_leaks", jax.checking_leaks)


@outside("AOT, of arrays and of shapes alone")
def _(f: Callable[..., Any], p: Any, x: Any) -> list[Any]:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (p, x))
    return [jax.jit(f).trace(*given).lower().compile()(p, x) for given in ((p, x), shapes)]


@outside("donation")
def _(f: Callable[..., Any], p: Any, x: Any) -> list[Any]:
    p, x = jax.tree.map(jnp.copy, (p, x))
    result = jax.jit(f, donate_argnums=(0, 1))(p, x)
    assert all(a.is_deleted() for a in jax.tree.leaves((p, x)))  # as many gradients as arguments: each in its place
    return [result]


@outside("export, symbolic batch")
def _(f: Callable[..., Any], p: Any, x: Any) -> list[Any]:
    (rows,) = jax.export.symbolic_shape("rows")
    shape = jax.ShapeDtypeStruct((rows, D), x[0].dtype)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), p), (shape, shape)
    run = jax.export.deserialize(jax.export.export(jax.jit(f))(*shapes).serialize()).call
    value, (gp, gx) = run(p, jax.tree.map(lambda a: jnp.concatenate([a, a]), x))
    twice = value / 2, (jax.tree.map(lambda g: g / 2, gp), jax.tree.map(lambda g: g[ROWS:], gx))
    return [run(p, x), twice]


@outside("threads tracing at once")
def _(f: Callable[..., Any], p: Any, x: Any) -> list[Any]:
    results: list[Any] = [None] * 2
    together = threading.Barrier(2)

    def work(i: int) -> None:
        with jax.enable_x64(True):  # a thread has its own
            together.wait()
            results[i] = jax.jit(lambda p, x: f(p, x))(p, x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    product(
        OUTSIDE,
        ["float64", "float32"],
        KINDS,
        # what jit gets is one program; without jit a Repeat's scan is a loop
        fast=lambda name, dtype, kind: (
            dtype == "float64"
            and kind == ("repeat" if name in ("disable_jit", "export, symbolic batch") else "chain")
            and name != "debug_nans, jit"
        ),
    ),
)
def test_outside_of_jit(name: str, dtype: str, kind: Kind) -> None:
    results = OUTSIDE[name](gradient(Net(kind, ours=True), block=lambda q, z: mlp(q, z)), *arrays(kind, dtype))
    for got in results:
        assert_equal_networks(got, by_hand("grad", kind), dtype)


@on_repeat
def test_an_exported_network_is_differentiated_afterwards(kind: Kind) -> None:
    p, x = arrays(kind)
    kept = jax.export.export(jax.jit(lambda p, x: Net(kind, ours=True)(p, x)))(p, x).serialize(vjp_order=1)
    run = jax.export.deserialize(kept).call
    got = jax.value_and_grad(lambda p, x: energy(run(p, x)), argnums=(0, 1))(p, x)
    assert_equal_networks(got, by_hand("grad", kind))


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Case, str]] = {
    "jvp": (lambda net, p, x: jax.jvp(loss(net), (p, x), (p, x)), "custom_vjp"),
    "jacfwd": (lambda net, p, x: jax.jacfwd(lambda v: net(p, (v, v)))(x[0]), "custom_vjp"),
    "linearize, pushed": (lambda net, p, x: jax.linearize(loss(net), p, x)[1](p, x), "custom_vjp"),
}


@pytest.mark.parametrize(
    ("name", "jit", "kind"),
    product(REFUSED, [False, True], KINDS, fast=lambda _, jit, kind: not jit and kind == "chain", name=name_of_mode),
)
def test_refused(name: str, jit: bool, kind: Kind) -> None:
    """Forward mode has no rule under Reverse(): JAX says so, and StoreAll() (above) has one."""
    run, message = REFUSED[name]
    run = partial(run, Net(kind, ours=True))
    with pytest.raises(TypeError, match=message):
        (jax.jit(run) if jit else run)(*arrays(kind))


@on_repeat
def test_linear_transpose_is_refused_under_reverse(kind: Kind) -> None:
    p, x = arrays(kind)

    def transposed(policy: Any) -> Any:
        run = partial(Net(kind, ours=True), block=lambda q, z: z @ q["w"], policy=policy)
        return jax.linear_transpose(lambda x: run(p, x), x)(x)

    (want,) = jax.linear_transpose(lambda x: Net(kind, ours=False)(p, x, block=lambda q, z: z @ q["w"]), x)(x)
    assert tree_error(transposed(StoreAll())[0], want) <= 1e-12
    with pytest.raises(NotImplementedError, match="custom_vjp"):
        transposed(Reverse())


@on_chain
def test_a_collective_over_a_vmapped_axis_is_differentiated_inside_the_vmap(kind: Kind) -> None:
    """JAX runs the backward pass of no ``custom_vjp`` where that axis has its name: StoreAll(), or grad inside."""
    p, x = arrays(kind)

    def run(policy: Any) -> Any:
        f = loss(Net(kind, ours=True), block=lambda q, z: mlp(q, z - lax.pmean(z, "batch")), policy=policy)
        return jax.grad(lambda x: jax.vmap(f, in_axes=(None, 0), axis_name="batch")(p, x).sum())(many(x))

    with pytest.raises(NameError, match="batch"):
        run(Reverse())
    run(StoreAll())


# --- counts -----------------------------------------------------------------------------------------------------------


# in a compiled scan, and outside of any
@eager_chain_and_compiled_repeat
def test_callbacks_run_with_each_evaluation(jit: bool, kind: Kind, capfd: pytest.CaptureFixture[str]) -> None:
    """Once where everything is stored; twice under ``Reverse``, whose backward pass evaluates each block again."""
    calls: list[float] = []

    def block(q: Any, x: Any) -> Any:
        jax.debug.callback(lambda s: calls.append(float(s)), x.sum())
        jax.debug.print("a block ran: {}", x[0, 0])
        return mlp(q, x)

    seen = {}
    for name, policy in {"reverse": Reverse(), "stored": StoreAll()}.items():
        calls.clear()
        run = gradient(Net(kind, ours=True), block=block, policy=policy)
        got = (jax.jit(run) if jit else run)(*arrays(kind))
        jax.effects_barrier()
        seen[name] = len(calls)
        assert capfd.readouterr().out.count("a block ran") == len(calls)
        assert_equal_networks(got, by_hand("grad", kind))
    assert seen == {"reverse": 2 * DEPTH, "stored": DEPTH}


@on_chain
def test_equal_blocks_are_traced_once_in_each_call(kind: Kind) -> None:
    calls: list[Any] = []

    def block(q: Any, x: Any) -> Any:
        calls.append(x.shape)
        return mlp(q, x)

    net, (p, x) = Net(kind, ours=True), arrays(kind)
    eager = gradient(net, block=block)
    for _ in range(3):
        eager(p, x)
    assert len(calls) == 3
    compiled = jax.jit(eager)
    for _ in range(3):
        compiled(p, x)
    assert len(calls) == 4
    eager(p, jax.tree.map(lambda a: a[:1], x))
    assert calls[4:] == [(1, D)]


@on_repeat
def test_names_are_retained_in_both_passes(kind: Kind) -> None:
    def block(q: Any, x: Any) -> Any:
        with jax.named_scope("my_scope"):
            return mlp(q, x)

    text = jax.jit(gradient(Net(kind, ours=True), block=block)).lower(*arrays(kind)).compile().as_text()
    assert text is not None
    names = [line for line in text.splitlines() if "op_name" in line and "my_scope" in line]
    assert [n for n in names if "transpose" in n]
    assert [n for n in names if "transpose" not in n]


# --- numbers ----------------------------------------------------------------------------------------------------------


@on_repeat
def test_x64_on_and_off_in_one_process(kind: Kind) -> None:
    run = jax.jit(gradient(Net(kind, ours=True)))
    for on in (True, False, True):
        with jax.enable_x64(on):
            dtype = "float64" if on else "float32"
            got = run(*arrays(kind, dtype))
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(got)} == {dtype}
            assert_equal_networks(got, by_hand("grad", kind), dtype)


@compiled_repeat
def test_bfloat16_blocks_over_float32_streams(jit: bool, kind: Kind) -> None:
    def block(q: Any, x: Any) -> Any:
        return mlp(jax.tree.map(lambda a: a.astype(jnp.bfloat16), q), x.astype(jnp.bfloat16))

    ours, plain = (gradient(Net(kind, ours), block=block) for ours in (True, False))
    given = arrays(kind, np.float32)
    got, want = (jax.jit(f) if jit else f for f in (ours, plain))
    got, want = got(*given), want(*given)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(got)} == {"float32"}
    assert tree_error(got, want) <= 1e-2  # a rebuilt stream may round to the other bfloat16


@compiled_repeat
def test_weak_types(jit: bool, kind: Kind) -> None:
    """Scalars that came of Python numbers take the dtype of what they meet, in a scan's carry too."""

    def run(net: Net, p: Any, t: Any) -> Any:
        streams = jnp.asarray(0.5) * 1.0, t
        y = net(p, streams, block=lambda q, z: jnp.tanh(z * q["w"][..., 0, 0]))
        return y[0] * y[1]

    results = []
    for ours in (True, False):
        f = jax.value_and_grad(partial(run, Net(kind, ours)), argnums=(0, 1))
        results.append((jax.jit(f) if jit else f)(arrays(kind)[0], 0.25))
    assert tree_error(*results) <= 1e-12


@compiled_repeat
def test_an_empty_batch(jit: bool, kind: Kind) -> None:
    run, (p, x) = gradient(Net(kind, ours=True)), arrays(kind)
    empty = jax.tree.map(lambda a: a[:0], x)
    value, grads = (jax.jit(run) if jit else run)(p, empty)
    assert value == 0
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, (p, empty))
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


# --- the check itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [pytest.param("float64", marks=pytest.mark.long), "float32"])
def test_a_slightly_wrong_network_is_noticed(mode: str) -> None:
    p, x = arrays("chain", mode)
    net = Net("chain", ours=True)
    wrong = jax.jit(gradient(net, block=lambda q, z: mlp(q, z) * (1 + 1e-4)))(p, x)
    with pytest.raises(AssertionError):
        assert_equal_networks(wrong, by_hand("grad", "chain"), mode)


@on_repeat
def test_clear_caches_between_two_calls(kind: Kind) -> None:
    """Comes last, for all others' compiled functions go too; compiled as one, for so do all single operations."""
    run, given = jax.jit(gradient(Net(kind, ours=True))), arrays(kind)
    run(*given)
    jax.clear_caches()
    assert_equal_networks(run(*given), by_hand("grad", kind))
