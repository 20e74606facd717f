"""No silent second run: blocks run in Python once a call, where the plain network would run them, and never later.

What a block reads from Python (a flag, an attribute, a global, a context that is open around the call) is what the
plain network would read there, under every policy; and what belongs to a call does not outlive it. Each case is
compared with the network written out by hand (float64, ≤ 1e-9), or refused in words.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import revcore
import revcore_jax
from revcore import (
    Additive,
    Bijection,
    Chain,
    Checkpoint,
    Couple,
    Coupling,
    Program,
    Repeat,
    Reverse,
    SpecError,
    StoreAll,
)
from revcore_jax import closed, engine
from tests.helpers import name_of, tree_error
from tests.jax.plain_network import KINDS, Kind, Net, arrays, energy, mlp
from tests.tiers import product

pytestmark = pytest.mark.usefixtures("x64")

POLICIES: list[Any] = [
    Reverse(),
    Reverse(anchor_every=2),
    Reverse(recompute=jax.checkpoint_policies.dots_saveable),
    Reverse(keep_last=2),
    Checkpoint(2),
    StoreAll(),
]
TOLERANCE = 1e-9


def name_of_case(value: Any) -> str:
    return value if isinstance(value, str) else name_of(value)


def everywhere(*names: str) -> Any:
    """Each case under every policy, on both kinds of programs. The fast tier has ``Reverse()`` on a chain, and in each
    third case one more policy on one kind; these change."""

    def fast(*case: Any) -> bool:
        *name, policy, kind = case
        turn = names.index(name[0]) if names else 0
        other = POLICIES[1 + turn % 5], KINDS[(turn + 1) % 2]
        more = ((POLICIES[0], "repeat"), other) if turn == 0 else (other,) if turn % 3 == 0 else ()
        return (policy, kind) in ((POLICIES[0], "chain"), *more)

    axes = ((names,) if names else ()) + (POLICIES, KINDS)
    where = ("name",) * bool(names) + ("policy", "kind")
    return pytest.mark.parametrize(where, product(*axes, fast=fast, name=name_of_case))


policies = pytest.mark.parametrize("policy", POLICIES, ids=name_of)


def gradient(
    net: Net, block: Any, around: Callable[[], Any] = contextlib.nullcontext, **how: Any
) -> Callable[..., Any]:
    """Value and gradients of a loss that calls the network inside of ``around()``."""

    def loss(p: Any, x: Any, *args: Any) -> Any:
        with around():
            y = net(p, x, *args, block=block, **how)
        return energy(y)

    return jax.value_and_grad(loss, argnums=(0, 1))


def assert_alike(got: Any, want: Any) -> None:
    assert tree_error(got, want) <= TOLERANCE


# --- contexts that are open around the call, and closed when the backward pass runs -----------------------------------


class Flag:
    """A flag of the user's own."""

    def __init__(self) -> None:
        self.on = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False


FLAG = Flag()


def flagged(p: Any, x: Any) -> Any:
    return mlp(p, x) * (2 if FLAG.on else 1)


def precise(p: Any, x: Any) -> Any:
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return mlp(p, x) * (2 if precision == "highest" else 1)


def seeded(p: Any, x: Any) -> Any:
    return mlp(p, x) * jax.random.bernoulli(jax.random.key(3), 0.5, x.shape)


def promoting(p: Any, x: Any) -> Any:
    return mlp(p, x) * (2 if jax.config.jax_numpy_dtype_promotion == "strict" else 1)  # type: ignore[attr-defined]


CONTEXTS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "a flag of the user's": (flagged, FLAG),
    "matmul precision": (precise, lambda: jax.default_matmul_precision("highest")),
    "the implementation of keys": (seeded, lambda: jax.default_prng_impl("rbg")),
    "dtype promotion": (promoting, lambda: jax.numpy_dtype_promotion("strict")),
}


@everywhere(*CONTEXTS)
def test_a_context_around_the_call(name: str, policy: Any, kind: Kind) -> None:
    block, around = CONTEXTS[name]
    p, x = arrays(kind)
    want = gradient(Net(kind, False), block, around)(p, x)
    run = gradient(Net(kind, True), block, around, policy=policy)
    assert_alike(run(p, x), want)
    assert_alike(jax.jit(run)(p, x), want)
    outside = gradient(Net(kind, False), block)(p, x)
    assert tree_error(outside, want) > 1e-3  # the context does make a difference
    assert_alike(gradient(Net(kind, True), block, policy=policy)(p, x), outside)  # and not to the call after


@pytest.mark.parametrize("policy", [Reverse(), Reverse(recompute=jax.checkpoint_policies.dots_saveable)], ids=name_of)
def test_products_of_both_runs_have_the_precision_of_the_call(policy: Any) -> None:
    p, x = arrays("chain")
    run = gradient(Net("chain", True), mlp, lambda: jax.default_matmul_precision("highest"), policy=policy)
    text = str(jax.make_jaxpr(run)(p, x))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


@pytest.mark.parametrize(
    ("policy", "kind"),
    product(
        [p for p in POLICIES if isinstance(p, Reverse)],
        KINDS,
        fast=lambda policy, kind: kind == ("chain" if policy.recompute or policy.keep_last else "repeat"),
        name=name_of_case,
    ),
)
def test_x64_around_the_call(policy: Any, kind: Kind) -> None:
    """In a program in float32: streams and products of float64, whose backward pass runs where x64 is off again.

    (The plain network's products are in float32 there, and JAX warns of it: so it stands inside of x64 altogether.)
    """

    def run(net: Net, **how: Any) -> Any:
        def loss(p: Any, x: Any) -> Any:
            with jax.enable_x64(True):
                p, x = jax.tree.map(lambda a: a.astype(jnp.float64), (p, x))
                y = net(p, x, **how)
                return energy(y) if not net.ours else jax.tree.map(lambda a: a.astype(jnp.float32), y)

        return jax.value_and_grad(loss if not net.ours else lambda p, x: energy(loss(p, x)), argnums=(0, 1))

    p, x = arrays(kind, np.float32)
    want = run(Net(kind, False))(p, x)
    with jax.enable_x64(False):
        for ours in (run(Net(kind, True), policy=policy), jax.jit(run(Net(kind, True), policy=policy))):
            got = ours(p, x)
            assert {str(a.dtype) for a in jax.tree.leaves(got)} == {"float32"}
            assert tree_error(got, want) <= 1e-6


# --- what blocks read from Python, in one call after the other --------------------------------------------------------

STATE = {"scale": 1.0}
TABLE = np.ones(3)


class Attribute:
    scale = 1.0

    def __call__(self, p: Any, x: Any) -> Any:
        return mlp(p, x) * self.scale


ATTRIBUTE = Attribute()


def set_attribute(value: float) -> None:
    ATTRIBUTE.scale = value


def set_global(value: float) -> None:
    STATE["scale"] = value


def set_table(value: float) -> None:
    TABLE[:] = value


@jax.custom_jvp
def jvp_ruled(x: Any) -> Any:
    return x


@jvp_ruled.defjvp
def _(given: Any, moving: Any) -> Any:
    return given[0], moving[0] * STATE["scale"]


@jax.custom_vjp
def vjp_ruled(x: Any) -> Any:
    return x


vjp_ruled.defvjp(lambda x: (x, None), lambda _, g: (g * STATE["scale"],))


class Hidden:
    """Not to be seen in the arguments' own ``==``."""

    def __init__(self) -> None:
        self.value = 1.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hidden)

    def __hash__(self) -> int:
        return 1


READ: dict[str, tuple[Any, Callable[[float], None]]] = {
    "an attribute": (ATTRIBUTE, set_attribute),
    "a bound method's object": (ATTRIBUTE.__call__, set_attribute),
    "a global": (lambda p, x: mlp(p, x) * STATE["scale"], set_global),
    "a NumPy array": (lambda p, x: mlp(p, x) * TABLE, set_table),
    "in the rule of a custom_jvp": (lambda p, x: mlp(p, jvp_ruled(x)), set_global),
    "in the rule of a custom_vjp": (lambda p, x: mlp(p, vjp_ruled(x)), set_global),
    "in a scan": (
        lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c + w * STATE["scale"]), None), x, p["w"])[0],
        set_global,
    ),
    "in a cond": (
        lambda p, x: jax.lax.cond(x.sum() > -9e9, lambda: mlp(p, x) * STATE["scale"], lambda: x),
        set_global,
    ),
}


@everywhere(*READ)
def test_what_a_block_reads_is_read_in_each_call(name: str, policy: Any, kind: Kind) -> None:
    block, change = READ[name]
    p, x = arrays(kind)
    got, want = [], []
    try:
        for value in (1.0, 0.5, 1.0):
            change(value)
            # functions of their own, or jit would know them again: the plain network's too
            run = gradient(Net(kind, True), block, policy=policy)
            got.append((run(p, x), jax.jit(run)(p, x)))
            want.append((gradient(Net(kind, False), block)(p, x),) * 2)
    finally:
        change(1.0)
    assert tree_error(want[0], want[1]) > 1e-3
    for a, b in zip(got, want, strict=True):
        assert_alike(a, b)


@everywhere()
def test_a_closure_that_changes(policy: Any, kind: Kind) -> None:
    p, x = arrays(kind)
    scale: Any = 1.0

    def block(q: Any, z: Any) -> Any:
        return mlp(q, z) * scale

    run, plain = gradient(Net(kind, True), block, policy=policy), gradient(Net(kind, False), block)
    for value in (1.0, 2.0, jnp.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]), 1.0):
        scale = value
        assert_alike(run(p, x), plain(p, x))


STATICS: dict[str, list[Any]] = {
    "NaN": [0.5, float("nan"), 0.5],
    "minus zero": [0.0, -0.0, 0.0],
    "True and 1": [1, True, 1.0, np.bool_(True), np.int64(1), 1],
    "NumPy's": [np.bool_(False), np.bool_(True), np.int64(3), np.int32(3)],
}


def by_type(p: Any, x: Any, how: Any) -> Any:
    """A block to which all of these are different things, and which are concrete."""
    scale = 2.0 if isinstance(how, (bool, np.bool_)) else 3.0 if isinstance(how, (int, np.integer)) else 4.0
    scale += 0.25 * isinstance(how, np.generic) + (0.5 if how else 0)
    scale += 0.1 * (np.copysign(1, how) < 0) + 0.3 * bool(np.isnan(how))
    return mlp(p, x) * scale


@everywhere(*STATICS)
def test_static_arguments_are_told_apart(name: str, policy: Any, kind: Kind) -> None:
    p, x = arrays(kind)
    run = lambda net, how, **more: gradient(net, lambda q, z: by_type(q, z, how), **more)  # noqa: E731
    for how in STATICS[name]:
        want = run(Net(kind, False), how)(p, x)
        loss = lambda p, x, how=how: energy(Net(kind, True)(p, x, how, block=by_type, policy=policy))  # noqa: E731
        assert_alike(jax.value_and_grad(loss, argnums=(0, 1))(p, x), want)
    layers = [((), {"how": how}) for how in (STATICS[name] * 2)[:4]]
    if kind == "chain":  # side by side in one call
        loss = lambda p, x: energy(Net(kind, True)(p, x, block=by_type, policy=policy, layerwise=layers))  # noqa: E731
        plain = lambda p, x: energy(Net(kind, False)(p, x, block=by_type, layerwise=layers))  # noqa: E731
        got, want = (jax.value_and_grad(f, argnums=(0, 1))(p, x) for f in (loss, plain))
        assert_alike(got, want)


@policies
def test_mutable_static_arguments(policy: Any) -> None:
    p, x = arrays("chain")
    how, hidden = {"names": {"a": 1.0}}, Hidden()

    class Box:  # no tree: one static leaf
        names = how["names"]

    def block(q: Any, z: Any, box: Any, hidden: Any) -> Any:
        return mlp(q, z) * box.names["a"] * hidden.value

    for value in (1.0, 2.0, 1.0):
        Box.names["a"] = value
        other = Hidden()
        other.value = value
        loss, plain = (
            lambda p, x, net=net, more=more: energy(net(p, x, Box, other, block=block, **more))  # noqa: B023
            for net, more in ((Net("chain", True), {"policy": policy}), (Net("chain", False), {}))
        )
        assert_alike(jax.value_and_grad(loss)(p, x), jax.value_and_grad(plain)(p, x))
    assert hidden.value == 1.0


# --- couplings, bijections, policies of the user's own ----------------------------------------------------------------


def scaled_coupling() -> Coupling:
    return Coupling.from_functions(lambda x, f: x * STATE["scale"] + f, lambda y, f: (y - f) / STATE["scale"])


class Own(Additive):
    """A coupling with a derivative of its own, which counts."""

    calls = 0

    def forward(self, x: Any, f: Any) -> Any:
        Own.calls += 1
        return x + f * STATE["scale"]

    def inverse(self, y: Any, f: Any) -> Any:
        Own.calls += 1
        return y - f * STATE["scale"]

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        Own.calls += 1
        return gy, gy * STATE["scale"]


def stretched() -> Bijection:
    def forward(a: Any, b: Any) -> Any:
        Own.calls += 1
        return b * STATE["scale"], a

    def inverse(a: Any, b: Any) -> Any:
        Own.calls += 1
        return b, a / STATE["scale"]

    return Bijection(forward, inverse)


COUPLED: dict[str, tuple[Program, int]] = {
    "functions": (revcore.revnet(4, scaled_coupling()), 4),
    "a class": (revcore.revnet(4, Own()), 4),
    "a bijection": (Program((Couple(0, 1), stretched(), Couple(0, 1), Couple(1, 0))), 3),
    "in a Repeat": (Program((Repeat(Chain((Couple(0, 1, Own()), stretched())), 2),)), 1),
}


@pytest.mark.parametrize(
    ("name", "policy"),
    product(
        COUPLED,
        POLICIES,
        fast=lambda name, policy: policy == Reverse() or POLICIES.index(policy) == 1 + list(COUPLED).index(name),
        name=name_of_case,
    ),
)
def test_couplings_and_bijections_read_in_each_call_and_not_later(name: str, policy: Any) -> None:
    program, slots = COUPLED[name]
    lead = (2,) if name == "in a Repeat" else ()
    params = [
        jax.tree.map(lambda a: jnp.broadcast_to(a, (*lead, *a.shape)), arrays("chain")[0][i]) for i in range(slots)
    ]
    streams = arrays("chain")[1]

    def run(policy: Any) -> Any:
        def loss(p: Any, x: Any) -> Any:
            return energy(revcore_jax.reversible(program, [mlp] * slots, p, x, policy=policy))

        value, pull = jax.vjp(loss, params, streams)
        before = Own.calls
        gradients = pull(1.0)
        if policy != StoreAll() and not isinstance(policy, Checkpoint):
            assert Own.calls == before
        return value, gradients

    def plain(p: Any, x: Any) -> Any:
        a, b = x
        scale = STATE["scale"]
        if name == "in a Repeat":
            for i in range(2):
                a = a + mlp(jax.tree.map(lambda v: v[i], p[0]), b) * scale  # noqa: B023
                a, b = b * scale, a
            return energy((a, b))
        if name == "a bijection":
            a = a + mlp(p[0], b)
            a, b = b * scale, a
            a = a + mlp(p[1], b)
            b = b + mlp(p[2], a)
            return energy((a, b))
        for i in range(4):
            f = mlp(p[i], b)
            a, b = b, (a * scale + f if name == "functions" else a + f * scale)
        return energy((a, b))

    try:
        for value in (1.0, 0.5, 1.5):
            STATE["scale"] = value
            got, want = run(policy), jax.vjp(plain, params, streams)
            assert_alike(got, (want[0], want[1](1.0)))
    finally:
        STATE["scale"] = 1.0


def test_a_recompute_policy_runs_in_the_call_alone() -> None:
    p, x = arrays("chain")
    asked = []

    def policy(primitive: Any, *_: Any, **__: Any) -> bool:
        asked.append(primitive.name)
        return primitive.name == "dot_general"

    value, pull = jax.vjp(lambda p: energy(Net("chain", True)(p, x, policy=Reverse(recompute=policy))), p)
    before = len(asked)
    got = pull(1.0)
    assert len(asked) == before > 0
    assert_alike((value, got[0]), jax.value_and_grad(lambda p: energy(Net("chain", False)(p, x)))(p))


# --- counts -----------------------------------------------------------------------------------------------------------


class Counted:
    """Blocks with rules of their own, which count how often their Python runs."""

    def __init__(self) -> None:
        self.calls: list[str] = []

        @jax.custom_vjp
        def clipped(x: Any) -> Any:
            self.calls.append("primal")
            return jnp.sin(x)

        def forward(x: Any) -> Any:
            self.calls.append("forward")
            return jnp.sin(x), x

        def backward(x: Any, g: Any) -> Any:
            self.calls.append("backward")
            return (g * x,)

        clipped.defvjp(forward, backward)

        @jax.custom_jvp
        def cubed(x: Any) -> Any:
            self.calls.append("cubed")
            return x**3

        @cubed.defjvp
        def _(given: Any, moving: Any) -> Any:
            self.calls.append("jvp")
            return given[0] ** 3, 2 * given[0] * moving[0]

        self.clipped, self.cubed = clipped, cubed

    def __call__(self, p: Any, x: Any) -> Any:
        self.calls.append("block")
        return mlp(p, self.clipped(x) + self.cubed(x))


@everywhere()
def test_blocks_run_once_a_call(policy: Any, kind: Kind) -> None:
    p, x = arrays(kind)
    block = Counted()
    for run in (
        lambda: Net(kind, True)(p, x, block=block, policy=policy),
        lambda: gradient(Net(kind, True), block, policy=policy)(p, x),
        lambda: jax.jit(gradient(Net(kind, True), block, policy=policy))(p, x),
        lambda: jax.grad(jax.jit(lambda p: energy(Net(kind, True)(p, x, block=block, policy=policy))))(p),
    ):
        block.calls.clear()
        run()
        assert block.calls.count("block") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", [p for p in POLICIES if isinstance(p, Reverse) and not p.keep_last], ids=name_of)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_no_python_runs_in_a_backward_pass(policy: Any, kind: Kind, jit: bool) -> None:
    """Not even that of rules, which the plain network's backward pass does run."""
    p, x = arrays(kind)
    block, plain = Counted(), Counted()
    run = lambda p, x: energy(Net(kind, True)(p, x, block=block, policy=policy))  # noqa: E731
    value, pull = jax.vjp(jax.jit(run) if jit else run, p, x)
    before = len(block.calls)
    got = pull(1.0)
    assert len(block.calls) == before
    want, back = jax.vjp(lambda p, x: energy(Net(kind, False)(p, x, block=plain)), p, x)
    assert_alike((value, got), (want, back(1.0)))


# --- what stays behind ------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "a call": lambda loss: loss,
    "a gradient": jax.grad,
    "jit": lambda loss: jax.jit(lambda p: jax.grad(loss)(p)),
    "a gradient of jit": lambda loss: jax.grad(jax.jit(lambda p: loss(p))),
}


@everywhere(*WAYS)
def test_nothing_of_a_call_lives_after_it(name: str, policy: Any, kind: Kind) -> None:
    p, x = arrays(kind)

    class Table:
        def __init__(self) -> None:
            self.array = jnp.arange(3.0)
            self.numpy = np.arange(3.0)

        def __call__(self, q: Any, z: Any) -> Any:
            return mlp(q, z) * self.array + self.numpy

    def once() -> list[Any]:
        block = Table()
        WAYS[name](lambda p: energy(Net(kind, True)(p, x, block=block, policy=policy)))(p)
        return [weakref.ref(block), weakref.ref(block.array), weakref.ref(block.numpy)]

    once()
    refs = once()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3


@policies
def test_what_a_coupling_and_a_callback_close_over_does_not_live_on(policy: Any) -> None:
    p, x = arrays("chain")

    def once() -> list[Any]:
        table, seen = jnp.arange(3.0) + 1, np.zeros(1)

        def block(q: Any, z: Any) -> Any:
            jax.debug.callback(lambda: seen.sum())
            return mlp(q, z)

        own = Coupling.from_functions(lambda x, f: x + f * table, lambda y, f: y - f * table)

        def loss(p: Any) -> Any:
            return energy(revcore_jax.reversible(revcore.revnet(2, own), [block] * 2, p, x, policy=policy))

        def plain(p: Any) -> Any:
            a = x[0] + mlp(p[0], x[1]) * table
            return energy((a, x[1] + mlp(p[1], a) * table))

        assert_alike(jax.grad(loss)(p[:2]), jax.grad(plain)(p[:2]))
        jax.effects_barrier()
        return [weakref.ref(table), weakref.ref(seen)]

    refs = [ref for _ in range(2) for ref in once()]
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


@policies
def test_what_a_rule_closes_over_does_not_live_on(policy: Any) -> None:
    p, x = arrays("chain")

    def once() -> Any:
        table = jnp.arange(3.0) + 1

        @jax.custom_vjp
        def ruled(z: Any) -> Any:
            return z * table

        ruled.defvjp(lambda z: (z * table, None), lambda _, g: (2 * g * table,))
        got = gradient(Net("chain", True), lambda q, z: mlp(q, ruled(z)), policy=policy)(p, x)
        assert_alike(got, gradient(Net("chain", False), lambda q, z: mlp(q, ruled(z)))(p, x))
        return weakref.ref(table)

    refs = [once() for _ in range(2)]
    gc.collect()
    assert [ref() for ref in refs] == [None] * 2


def sizes() -> tuple[int, ...]:
    gc.collect()
    compiled: Any = engine._forward_compiled, engine._backward_compiled
    return (*(f._cache_size() for f in compiled), len(closed._interned), len(closed._variants))


def test_caches_do_not_grow_over_a_thousand_equal_calls() -> None:
    x = jnp.ones(3), jnp.ones(3)
    program = revcore.revnet(2)

    def call(i: int) -> None:
        scale = jnp.full(3, float(i))  # an array and a function of this call's own

        def block(w: Any, x: Any) -> Any:
            return jnp.sin(w * x) * scale

        jax.grad(lambda w: jnp.sum(revcore_jax.reversible(program, [block] * 2, [w, w], x)[0]))(jnp.ones(3))

    for i in range(2):
        call(i)
    before = sizes()
    for i in range(1000):
        call(i)
    assert sizes() == before


def test_a_number_that_changes_in_each_call_is_compiled_so_often_and_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed, "_MOST", 5)
    x, program = (jnp.ones(7), jnp.ones(7)), revcore.revnet(1)  # of a size that no other test has

    def call(scale: float) -> None:
        def block(w: Any, x: Any) -> Any:
            return jnp.sin(w * x) * scale

        run = lambda w: jnp.sum(revcore_jax.reversible(program, [block], [w], x)[1])  # noqa: E731
        assert_alike(jax.grad(run)(jnp.ones(7)), jnp.cos(jnp.ones(7)) * scale)

    call(1.0)
    before = sizes()
    for i in range(1, 10):
        call(1 + i / 128)
    assert [b - a for a, b in zip(before[:2], sizes()[:2], strict=True)] == [4, 4]


def test_a_trace_is_not_held_after_it_is_over() -> None:
    p, x = arrays("chain")

    def run(c: Any) -> Any:
        @jax.custom_vjp
        def ruled(z: Any) -> Any:
            return z * jax.lax.stop_gradient(c)

        ruled.defvjp(lambda z: (z * c, None), lambda _, g: (g * c,))
        return energy(Net("chain", True)(p, x, block=lambda q, z: mlp(q, z) * c + ruled(z)))

    with jax.checking_leaks():
        assert np.isfinite(jax.jit(lambda c: energy(Net("chain", True)(p, x, block=lambda q, z: mlp(q, z) * c)))(2.0))
    assert np.isfinite(jax.jit(run)(2.0))


# --- functions with rules that close over values ----------------------------------------------------------------------


def ruled_over(c: Any) -> Callable[..., Any]:
    """A block whose custom_vjp function, its rule too, closes over ``c``."""

    @jax.custom_vjp
    def ruled(x: Any) -> Any:
        return jnp.sin(x) * c

    ruled.defvjp(lambda x: (jnp.sin(x) * c, x), lambda x, g: (g * jnp.cos(x) * c * 1.5,))
    return lambda p, x: mlp(p, ruled(x))


@everywhere()
def test_a_custom_vjp_that_closes_over_a_traced_value(policy: Any, kind: Kind) -> None:
    p, x = arrays(kind)

    def run(net: Net, **how: Any) -> Any:
        return jax.jit(lambda p, x, c: gradient(net, ruled_over(c), **how)(p, x))

    for c in (2.0, jnp.arange(3.0)):
        assert_alike(run(Net(kind, True), policy=policy)(p, x, c), run(Net(kind, False))(p, x, c))
    got = gradient(Net(kind, True), ruled_over(2.0), policy=policy)(p, x)
    assert_alike(got, gradient(Net(kind, False), ruled_over(2.0))(p, x))


@everywhere()
def test_a_custom_vjp_that_closes_over_what_is_differentiated_is_refused(policy: Any, kind: Kind) -> None:
    p, x = arrays(kind)

    def loss(net: Net, **how: Any) -> Any:
        return lambda c: energy(net(p, x, block=ruled_over(c), **how))

    with pytest.raises(Exception, match=r"(?i)tracer|closed-over|closes over"):
        jax.grad(loss(Net(kind, False)))(2.0)  # JAX itself has no gradient there
    with pytest.raises(Exception, match=r"(?i)tracer|closed-over|closes over a value that is differentiated"):
        jax.grad(loss(Net(kind, True), policy=policy))(2.0)


def jit_over(c: Any) -> Callable[..., Any]:
    inner = jax.jit(lambda z: jnp.sin(z) * c)
    return lambda p, x: mlp(p, inner(x))


def relu_over(c: Any) -> Callable[..., Any]:
    return lambda p, x: mlp(p, jax.nn.relu(x * c) + jax.nn.silu(c * x))


@everywhere("jit_over", "relu_over")
def test_functions_inside_that_close_over_values(name: str, policy: Any, kind: Kind) -> None:
    p, x = arrays(kind)
    make = {"jit_over": jit_over, "relu_over": relu_over}[name]

    def run(net: Net, **how: Any) -> Any:
        loss = lambda p, c: energy(net(p, x, block=make(c), **how))  # noqa: E731
        return lambda p, c: (jax.grad(loss, argnums=(0, 1))(p, c), jax.grad(loss)(p, jnp.arange(3.0)))

    want = run(Net(kind, False))(p, 2.0)
    assert_alike(run(Net(kind, True), policy=policy)(p, 2.0), want)
    assert_alike(jax.jit(run(Net(kind, True), policy=policy))(p, 2.0), want)


# --- arguments and cotangents -----------------------------------------------------------------------------------------


@policies
def test_python_numbers_as_cotangents(policy: Any) -> None:
    program = revcore.revnet(2)

    def block(w: Any, x: Any) -> Any:
        return jnp.sin(w * x), x * w

    def run(w: Any, x: Any) -> Any:
        return revcore_jax.reversible(program, [block] * 2, [w, w], (x, 2 * x), policy=policy)

    def plain(w: Any, x: Any) -> Any:
        a, b = x, 2 * x
        f = block(w, b)
        a = a + f[0]
        g = block(w, a)
        return (a, b + g[0]), [f[1:], g[1:]]

    at = jnp.float64(0.5), jnp.float64(0.25)
    cotangents = (1.0, 2.0), [(3.0,), (4.0,)]
    (value, pull), (want, back) = jax.vjp(run, *at), jax.vjp(plain, *at)
    assert_alike((value, pull(cotangents)), (want, back(cotangents)))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_what_acts_outside_is_refused_where_it_would_act_twice(jit: bool) -> None:
    p, x = arrays("chain")
    acts: list[float] = []

    def block(q: Any, z: Any) -> Any:
        jax.experimental.io_callback(lambda s: acts.append(float(s)), None, jax.lax.stop_gradient(z).sum())
        return mlp(q, z)

    for policy, times in ((Reverse(), 0), (StoreAll(), 4)):
        run = gradient(Net("chain", True), block, policy=policy)
        acts.clear()
        with pytest.raises(SpecError, match=r"io_callback.*StoreAll") if not times else contextlib.nullcontext():
            assert_alike((jax.jit(run) if jit else run)(p, x), gradient(Net("chain", False), mlp)(p, x))
            jax.effects_barrier()
            assert len(acts) == times
    acts.clear()
    Net("chain", True)(p, x, block=block)  # a forward pass alone
    jax.effects_barrier()
    assert len(acts) == 4


REFS = pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), StoreAll()], ids=name_of)


@REFS
def test_refs_are_refused_in_words(policy: Any) -> None:
    p, x = arrays("chain")
    ref = jax.new_ref(jnp.zeros(()))

    def counting(q: Any, z: Any) -> Any:
        ref[...] += 1
        return mlp(q, z)

    with pytest.raises(SpecError, match=r"block 0 closes over a JAX Ref.*as an argument"):
        Net("chain", True)(p, x, block=counting, policy=policy)
    with pytest.raises(SpecError, match=r"got a JAX Ref as an argument.*ref\[\.\.\.\]"):
        Net("chain", True)(p, x, ref, block=lambda q, z, r: mlp(q, z) * r[...], policy=policy)


@pytest.mark.parametrize("policy", [Reverse(), POLICIES[2], StoreAll()], ids=name_of)  # JAX has none in a checkpoint
def test_a_ref_of_a_block_s_own(policy: Any) -> None:
    p, x = arrays("chain")

    def block(q: Any, z: Any) -> Any:
        ref = jax.new_ref(jnp.zeros_like(z))
        ref[...] += mlp(q, z)
        return ref[...]

    assert_alike(gradient(Net("chain", True), block, policy=policy)(p, x), gradient(Net("chain", False), block)(p, x))


@pytest.mark.parametrize("policy", [Reverse(), StoreAll()], ids=name_of)
def test_a_leaked_tracer_is_named_as_jax_names_it(policy: Any) -> None:
    p, x = arrays("chain")
    held: list[Any] = []
    jax.jit(lambda v: held.append(v) or v)(jnp.ones(3))

    def leaking(q: Any, z: Any) -> Any:
        return mlp(q, z) * held[0]

    for net, how in ((Net("chain", False), {}), (Net("chain", True), {"policy": policy})):
        with pytest.raises(jax.errors.UnexpectedTracerError):
            jax.jit(lambda p: net(p, x, block=leaking, **how))(p)  # noqa: B023

    def letting_go(q: Any, z: Any) -> Any:
        held.append(z)
        return mlp(q, z)

    Net("chain", True)(p, x, block=letting_go, policy=policy)
    with pytest.raises(jax.errors.UnexpectedTracerError, match="letting_go"):
        jnp.sin(held[-1])


# --- Linen ------------------------------------------------------------------------------------------------------------


def linen_program(kind: Kind) -> Program:
    layer = Chain((Couple(0, 1), Couple(1, 0)))
    return Program((layer, layer)) if kind == "chain" else Program((Repeat(layer, 2),))


class Dense(nn.Module):
    factor: Any = 1.0

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return jnp.tanh(nn.Dense(x.shape[-1], param_dtype=jnp.float64)(x)) * self.factor


def linen_plain(variables: Any, x: Any, kind: Kind, factors: Any = (1.0,) * 4) -> Any:
    """The same network, each layer applied by itself."""
    f: Any
    a, b = jnp.split(x, 2, -1)
    for i in range(4):
        if kind == "chain":
            own = variables["params"][f"layers_{i}"]
        else:
            own = jax.tree.map(lambda v: v[i // 2], variables["params"][f"layers_{i % 2}"])  # noqa: B023
        f = Dense(factors[i]).apply({"params": own}, b if i % 2 == 0 else a)
        a, b = (a + f, b) if i % 2 == 0 else (a, b + f)
    return jnp.concatenate([a, b], -1)


def linen_model(kind: Kind, policy: Any, factors: Any = (1.0,) * 4) -> Any:
    return revcore_jax.linen.ReversibleSequential(
        [Dense(factors[i]) for i in range(4 if kind == "chain" else 2)], program=linen_program(kind), policy=policy
    )


def doubling(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    out = call(*args, **kwargs)
    return 2 * out if isinstance(context.module, nn.Dense) else out


LINEN: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "intercept_methods": lambda: nn.intercept_methods(doubling),
    "a flag": FLAG,
}


@everywhere(*LINEN)
def test_linen_contexts_around_the_call(name: str, policy: Any, kind: Kind) -> None:
    model = linen_model(kind, policy)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6)))
    variables = model.init(jax.random.key(0), x)

    def run(apply: Any) -> Any:
        def loss(variables: Any, x: Any) -> Any:
            with LINEN[name]():
                y = apply(variables, x)
            return jnp.sum(jnp.sin(y))

        return jax.value_and_grad(loss, argnums=(0, 1))

    want = run(lambda v, x: linen_plain(v, x, kind))(variables, x)
    assert_alike(run(model.apply)(variables, x), want)
    assert_alike(jax.jit(run(model.apply))(variables, x), want)


@policies
def test_linen_logical_axis_rules_around_the_call(policy: Any) -> None:
    """A block reads the rules where the plain network would: in the call, and not in its backward pass."""
    seen = []

    class Placed(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            rules = nn.get_logical_axis_rules()
            seen.append(rules)
            return jnp.tanh(nn.Dense(x.shape[-1], param_dtype=jnp.float64)(x)) * (2 if rules else 1)

    model = revcore_jax.linen.ReversibleSequential([Placed(), Placed()], policy=policy)
    x = jnp.ones((2, 6))
    variables = model.init(jax.random.key(0), x)

    def loss(variables: Any, on: bool) -> Any:
        with nn.logical_axis_rules([("embed", None)]) if on else contextlib.nullcontext():
            y: Any = model.apply(variables, x)
            return jnp.sum(jnp.sin(y))

    seen.clear()
    value, pull = jax.vjp(functools.partial(loss, on=True), variables)
    (got,) = pull(1.0)
    assert [bool(rules) for rules in seen] == [True]

    def plain(variables: Any) -> Any:
        a, b = jnp.split(x, 2, -1)
        for i in range(2):
            layer = variables["params"][f"layers_{i}"]["Dense_0"]
            a, b = b, a + 2 * jnp.tanh(b @ layer["kernel"] + layer["bias"])
        return jnp.sum(jnp.sin(jnp.concatenate([a, b], -1)))

    assert_alike((value, got), jax.value_and_grad(plain)(variables))
    assert not jnp.allclose(value, loss(variables, on=False))


@pytest.mark.parametrize("factors", [(1, True, 1.0, 1), (0.0, -0.0, 0.5, float("nan")), (1.0, 2.0, 1.0, 2.0)])
def test_linen_attributes_are_told_apart(factors: Any) -> None:
    class Typed(nn.Module):
        factor: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            sign = np.copysign(1, self.factor) * (3 if self.factor is True else 1)
            return x * sign * (1 if np.isnan(self.factor) else 2 + self.factor)

    x = jnp.arange(12.0).reshape(2, 6)
    got = revcore_jax.linen.ReversibleSequential([Typed(f) for f in factors]).apply({}, x)
    a, b = jnp.split(x, 2, -1)
    for factor in factors:
        f: Any = Typed(factor).apply({}, b)
        a, b = b, a + f
    assert_alike(got, jnp.concatenate([a, b], -1))


# --- NNX --------------------------------------------------------------------------------------------------------------


class Linear(nnx.Module):
    def __init__(self, width: int, seed: int) -> None:
        self.linear = nnx.Linear(width, width, rngs=nnx.Rngs(seed), param_dtype=jnp.float64)
        self.temperature: Any = 1.0

    def __call__(self, x: Any) -> Any:
        self_is_true = 3.0 if self.temperature is True else 1.0
        sign = np.copysign(1, self.temperature)
        return jnp.tanh(self.linear(x)) * (self.temperature + self_is_true) * sign * (2 if FLAG.on else 1)


def nnx_model(kind: Kind, policy: Any) -> Any:
    layers = [Linear(3, i) for i in range(4)]
    if kind == "repeat":
        layers = [revcore_jax.nnx.stack(layers[::2]), revcore_jax.nnx.stack(layers[1::2])]
    return revcore_jax.nnx.ReversibleSequential(*layers, program=linen_program(kind), policy=policy)


def nnx_plain(model: Any, x: Any, kind: Kind) -> Any:
    layers = list(model.layers)
    if kind == "repeat":
        (a0, a1), (b0, b1) = (revcore_jax.nnx.unstack(layer) for layer in layers)
        layers = [a0, b0, a1, b1]
    a, b = jnp.split(x, 2, -1)
    for i, layer in enumerate(layers):
        a, b = (a + layer(b), b) if i % 2 == 0 else (a, b + layer(a))
    return jnp.concatenate([a, b], -1)


@everywhere()
def test_nnx_attributes_and_flags(policy: Any, kind: Kind) -> None:
    model = nnx_model(kind, policy)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6)))

    def run(apply: Any, around: Any = contextlib.nullcontext) -> Any:
        def loss(model: Any, x: Any) -> Any:
            with around():
                y = apply(model, x)
            return jnp.sum(jnp.sin(y))

        return nnx.value_and_grad(loss, argnums=(0, 1))

    for temperature, around in ((1.0, FLAG), (1, contextlib.nullcontext), (True, FLAG), (0.0, FLAG), (-0.0, FLAG)):
        for layer in model.layers:
            layer.temperature = temperature
        got = run(lambda model, x: model(x), around)(model, x)
        want = run(lambda model, x: nnx_plain(model, x, kind), around)(model, x)
        assert_alike(jax.tree.leaves(got), jax.tree.leaves(want))


def test_nnx_layers_that_differ_in_an_attribute_alone() -> None:
    model, x = nnx_model("chain", Reverse()), jnp.arange(12.0).reshape(2, 6)
    for layer, temperature in zip(model.layers, (1, True, 0.0, -0.0), strict=True):
        layer.temperature = temperature
    assert_alike(model(x), nnx_plain(model, x, "chain"))


def test_nnx_and_linen_blocks_run_once_a_call() -> None:
    calls = []

    class Layer(nnx.Module):
        def __init__(self, seed: int) -> None:
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(seed))

        def __call__(self, x: Any, *, rngs: Any = None) -> Any:
            calls.append(1)
            return nnx.Dropout(0.5)(self.linear(x), rngs=rngs)

    model = revcore_jax.nnx.ReversibleSequential(*[Layer(i) for i in range(4)])
    for _ in range(3):
        calls.clear()
        nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 6)), rngs=nnx.Rngs(0))))(model)
        assert len(calls) == 1
