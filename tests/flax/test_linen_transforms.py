"""Lifted transforms around a Linen ReversibleSequential and inside its blocks, each against the plain network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import DenyList, FrozenDict, freeze
from flax.linen.transforms import add_metadata_axis

from revcore import Momentum, SpecError
from revcore_jax.linen import ReversibleSequential
from tests.flax.linen_models import (
    MODES,
    NETS,
    Block,
    D,
    Mode,
    Net,
    Small,
    Using,
    cast,
    check_step,
    inputs,
    scans,
    start,
    train_step,
)
from tests.helpers import tree_error
from tests.plain.linen import Plain
from tests.tiers import product

pytestmark = pytest.mark.usefixtures("x64")

STATE = ("batch_stats", "intermediates")
Wrap = Callable[[Net], Any]


def two() -> list[Any]:
    return [Block(), Small()]


def drawing() -> list[Any]:
    """Blocks that draw random numbers, and change nothing."""
    return [Helped(), Small()]


class Around(nn.Module):
    """Calls ``function(self, inner, x)`` in a compact method; the network is an attribute, or made on the spot."""

    inner: Any
    function: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return self.function(self, self.inner, x)


def around(function: Any) -> Wrap:
    return lambda net: Around(net(drawing()), function)


def made_inside(function: Any) -> Wrap:
    """``nn.vjp`` and its like take no module that holds others, so the network is made within."""

    def run(mdl: Any, _: Any, x: Any, net: Net) -> Any:
        return function(mdl, lambda mdl, x: net([Helped(parent=mdl), Small(parent=mdl)], name="net", parent=mdl)(x), x)

    return lambda net: Around(None, lambda mdl, inner, x: run(mdl, inner, x, net))


class Cell(nn.Module):
    """A recurrent cell over the network."""

    inner: Any

    def __call__(self, carry: Any, x: Any) -> Any:
        y = self.inner(carry + x)
        return y, jnp.sum(y)


class Loop(nn.Module):
    """The cell scanned over three inputs, and BatchNorm's statistics carried along."""

    cell: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if self.is_initializing():  # nn.scan wants what it carries to be there
            return self.cell(jnp.zeros_like(x), x)
        scan = nn.scan(
            lambda mdl, carry, x: mdl(carry, x),
            variable_broadcast="params",
            variable_carry="batch_stats",
            variable_axes={"intermediates": 0},
            split_rngs={"dropout": True},
            check_constancy_invariants=False,
        )
        return scan(self.cell, jnp.zeros_like(x), jnp.stack([x, 2 * x, jnp.sin(x)]))


class LowRank(nn.Module):
    """Adds to a Dense in that one's scope."""

    base: Any

    def setup(self) -> None:
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        left = self.param("A", nn.initializers.normal(), (D, 2))
        right = self.param("B", nn.initializers.normal(), (2, D))
        return jnp.tanh(self.base(x) + x @ left @ right)


class Helped(nn.Module):
    """A setup-style block with a method that Flax does not wrap."""

    def setup(self) -> None:
        self.parts = [nn.Dense(D), nn.Dropout(0.3, deterministic=False)]

    @nn.nowrap
    def size(self, x: Any) -> Any:
        return 1.0 / x.shape[-1]

    def __call__(self, x: Any) -> Any:
        return self.size(x) * self.parts[1](jnp.tanh(self.parts[0](x)))


class Gated(nn.Module):
    """A block whose own branches are ``nn.cond``'s."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        dense = nn.Dense(D, name="dense")
        return nn.cond(jnp.sum(x) > 0, lambda mdl, x: mdl(x), lambda mdl, x: -mdl(2 * x), dense, x)


class Differentiating(nn.Module):
    """A block that differentiates within itself."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y, pull = nn.vjp(lambda mdl, x: jnp.tanh(mdl(x)), nn.Dense(D), x)
        return y + pull(y)[1]


def nested(net: Net) -> nn.Module:
    class Inner(nn.Module):
        net: Any

        def __call__(self, x: Any) -> Any:
            return self.net(x)

    return net([Inner(_halves(net)), Small()])


def _halves(net: Net) -> nn.Module:
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dropout(0.3, deterministic=False)(jnp.tanh(nn.Dense(D // 2)(x)))

    return net([Half(), Half()])


def shared_from_outside(net: Net) -> nn.Module:
    """A Dense of the model that holds the network, used by two of its blocks and by itself."""

    class Outer(nn.Module):
        def setup(self) -> None:
            self.dense = nn.Dense(D)
            self.net = net([Using(self.dense), Using(self.dense)])

        def __call__(self, x: Any) -> Any:
            return self.net(jnp.concatenate([self.dense(x[:, :D]), x[:, D:]], -1))

    return Outer()


def _each(block: Any) -> Any:
    """One set of parameters over a batch, each row of it with statistics and masks of its own."""
    return nn.vmap(
        block,
        variable_axes={"params": None, "batch_stats": 0, "intermediates": 0},
        split_rngs={"params": False, "dropout": True},
    )


WRAPS: dict[str, Wrap] = {
    "jit": lambda net: nn.jit(net)(drawing()),
    "remat": lambda net: nn.remat(net)(drawing()),
    "jit inside": lambda net: net([nn.jit(Block)(), nn.jit(Small)()]),
    "remat inside": lambda net: net([nn.remat(Block)(), nn.remat(Small)()]),
    "vmap": lambda net: nn.vmap(
        net,
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
    )(two()),
    "vmap inside": lambda net: net([_each(Block)(), Small()]),
    "scan": lambda net: Loop(Cell(net(two()))),
    "map_variables": lambda net: nn.map_variables(
        net, "params", trans_in_fn=lambda tree: jax.tree.map(jnp.sin, tree), init=True
    )(drawing()),
    "add_metadata_axis": lambda net: add_metadata_axis(
        net, {"params": 0}, metadata_params={nn.PARTITION_NAME: "stack"}
    )(drawing()),
    "cond": around(
        lambda mdl, inner, x: nn.cond(jnp.sum(x) > 0, lambda m, x: m.inner(x), lambda m, x: -m.inner(2 * x), mdl, x)
    ),
    "switch": around(
        lambda mdl, inner, x: nn.switch(1, [lambda m, x: m.inner(x), lambda m, x: -m.inner(2 * x)], mdl, x)
    ),
    "vjp": made_inside(lambda mdl, run, x: (lambda y, pull: (y, pull(y)[1]))(*nn.vjp(run, mdl, x))),
    "value_and_grad": made_inside(
        lambda mdl, run, x: nn.value_and_grad(lambda mdl, x: jnp.sum(jnp.sin(run(mdl, x))), mdl, x)
    ),
    "grad": made_inside(lambda mdl, run, x: nn.grad(lambda mdl, x: jnp.sum(jnp.sin(run(mdl, x))), mdl, x)),
    "share_scope": lambda net: net([LowRank(nn.Dense(D)), LowRank(nn.Dense(D))]),
    "nowrap and setup": lambda net: net(drawing()),
    "modules as attributes": lambda net: net([nn.Sequential([nn.Dense(D), Helped(), jnp.tanh]), Small()]),
    "cond inside": lambda net: net([Gated(), Gated()]),
    "vjp inside": lambda net: net([Differentiating(), Differentiating()]),
    "nested": nested,
    "shared from outside": shared_from_outside,
}
BATCHED = ("vmap", "vmap inside")
# the same lifting as a neighbour's
ALIKE = "switch", "value_and_grad"
# cheaper step by step; or where modules of another scope are looked up, which jit would do once for all
STEP_BY_STEP = "shared from outside", "add_metadata_axis", "nowrap and setup", "modules as attributes"


@pytest.mark.parametrize(
    ("name", "mode"),
    product(
        WRAPS,
        MODES,
        fast=lambda name, mode: name not in ALIKE and mode == ("float64" if name in STEP_BY_STEP else "float32-jit"),
    ),
)
def test_transform(name: str, mode: Mode) -> None:
    ours, plain = (WRAPS[name](net) for net in NETS)
    x = inputs(2) if name in BATCHED else inputs()
    # map_variables(init=True) itself loses the parameters where another collection may change
    check_step(ours, plain, mode, x=x, mutable=False if name == "map_variables" else STATE)


def test_while_loop() -> None:
    """Reverse mode does not go through it: the values alone."""

    def loop(mdl: Any, inner: Any, x: Any) -> Any:
        if mdl.is_initializing():
            return inner(x)

        def more(mdl: Any, carry: Any) -> Any:
            return carry[0] < 3

        def step(mdl: Any, carry: Any) -> Any:
            return carry[0] + 1, mdl.inner(carry[1])

        return nn.while_loop(more, step, mdl, (0, x))[1]

    ours, plain = (Around(net([Small(), Small()]), loop) for net in NETS)
    variables = start(plain, inputs())
    assert tree_error(ours.apply(variables, inputs()), plain.apply(variables, inputs())) <= 1e-12


def test_bind_and_unbind() -> None:
    ours, plain = (net([Block(train=False), Small()]) for net in NETS)
    variables, x = start(plain, inputs()), jnp.asarray(inputs())
    want = plain.apply(variables, x)
    bound = ours.bind(variables)
    assert tree_error(bound(x), want) <= 1e-12
    assert tree_error(bound.inverse(bound(x)), x) <= 1e-12
    again, same = bound.unbind()
    assert tree_error(again.apply(same, x), want) <= 1e-12
    block, own = bound.layers[0].unbind()
    got, same = block.apply(own, x[:, :D]), Block(train=False).apply(own, x[:, :D])
    assert tree_error(got, same) <= 1e-12


@pytest.mark.parametrize(
    "mutable",
    product(
        [["batch_stats"], "batch_stats", DenyList("params"), True, ("intermediates",), False],
        fast=lambda mutable: not isinstance(mutable, (str, tuple)),
    ),
)
def test_forms_of_mutable(mutable: Any) -> None:
    """In any form: the same collections come back as from the plain network."""
    ours, plain = (net([Block(train=False), Block(train=False)]) for net in NETS)
    variables = start(plain, inputs())
    got, want = (m.apply(variables, inputs(), mutable=mutable) for m in (ours, plain))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert tree_error(got, want) <= 1e-12


@pytest.mark.parametrize("repeat", [False, True])
def test_capture_intermediates(repeat: bool) -> None:
    """All that blocks return, and nothing of it in the call after: a block that was traced before is traced anew."""
    make = lambda: [Small(), Small()]  # noqa: E731
    ours, plain = scans(make) if repeat else (net(make()) for net in NETS)
    variables = start(plain, inputs())
    given: Any = {"mutable": ["intermediates"]}
    named = lambda module, method: module.name == "Dense_0" and "layers_0" in module.path  # noqa: E731
    for capture in (False, True, named, False):
        got, want = (m.apply(variables, inputs(), capture_intermediates=capture, **given) for m in (ours, plain))
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert bool(got[1]) == bool(capture)
        assert tree_error(got, want) <= 1e-12


def test_intercepted_methods() -> None:
    variables = start(Plain([Small(), Small()]), inputs())
    for net in NETS:
        seen = []

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            seen.append(context.module.path)  # noqa: B023
            return call(*args, **kwargs)

        for _ in range(2):
            seen.clear()
            with nn.intercept_methods(note):
                net([Small(), Small()]).apply(variables, inputs())
            assert {("layers_0", "Dense_0"), ("layers_1",)} <= set(seen)


@pytest.mark.parametrize("repeat", [False, True])
def test_tabulate(repeat: bool) -> None:
    ours, plain = scans(two) if repeat else (net(two()) for net in NETS)
    tables = [
        m.tabulate({"params": jax.random.key(0), "dropout": jax.random.key(0)}, inputs(), compute_flops=False)
        for m in (ours, plain)
    ]
    tables = [[line for line in t.splitlines() if "layers_" in line] for t in tables]
    assert len(tables[0]) > 4
    paths = [[[cell.strip() for cell in line.split("│")[1:3]] for line in table] for table in tables]
    assert paths[0] == paths[1]


def test_frozen_variables() -> None:
    ours, plain = (net(drawing()) for net in NETS)
    variables = start(plain, inputs())
    x = jnp.asarray(inputs())
    got, want = (train_step(m, v, x, mutable=False) for m, v in ((ours, freeze(variables)), (plain, variables)))
    assert isinstance(got["gradients"][0], FrozenDict)
    assert tree_error(got["gradients"][0].unfreeze(), want["gradients"][0]) <= 1e-12


@pytest.mark.parametrize("repeat", [pytest.param(False, marks=pytest.mark.long), True])
def test_bfloat16_parameters_under_float32_streams(repeat: bool) -> None:
    """Blocks in bfloat16: gradients within that one's rounding, and values and streams in float32."""

    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return jnp.tanh(nn.Dense(D, dtype=jnp.bfloat16)(x))

    make = lambda: [Narrow(), Narrow()]  # noqa: E731
    ours, plain = scans(make) if repeat else (net(make()) for net in NETS)
    variables = cast(start(plain, inputs()), jnp.bfloat16)
    x = jnp.asarray(inputs(), jnp.float32)
    got, want = (jax.jit(lambda v, x, m=m: train_step(m, v, x, mutable=False))(variables, x) for m in (ours, plain))
    assert {a.dtype for a in jax.tree.leaves(got["gradients"][0])} == {jnp.dtype(jnp.bfloat16)}
    assert got["gradients"][1].dtype == got["value"].dtype == jnp.float32
    got, want = (jax.tree.map(lambda a: np.asarray(a, "float64"), t["gradients"]) for t in (got, want))
    assert tree_error(got, want) <= 4 * float(jnp.finfo(jnp.bfloat16).eps)


def test_keys_of_layers_that_draw_directly() -> None:
    """A Dropout as a block of its own, and a block that asks for a key itself."""

    class Drawing(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dropout(0.5, deterministic=False)(x) + jax.random.normal(self.make_rng("noise"), x.shape)

    make = lambda: [nn.Dropout(0.5, deterministic=False), Drawing()]  # noqa: E731
    ours, plain = (net(make()) for net in NETS)
    rngs = {"dropout": jax.random.key(0), "noise": jax.random.PRNGKey(1)}
    got, want = (m.apply({}, inputs(), rngs=rngs) for m in (ours, plain))
    assert tree_error(got, want) <= 1e-12
    ours, plain = scans(make)
    got, want = (m.apply({}, inputs(), rngs=rngs) for m in (ours, plain))
    assert tree_error(got, want) <= 1e-12


def test_what_cannot_be_is_told() -> None:
    ours: Any = ReversibleSequential([Small()], coupling=Momentum(0.9))
    variables = start(ours, inputs())
    with pytest.raises(SpecError, match="an argument came as Dense, but blocks are run as pure functions"):
        ours.apply(variables, inputs(), nn.Dense(3))
