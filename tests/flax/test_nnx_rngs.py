"""Random numbers handed to revcore_jax.nnx.ReversibleSequential at the call, as to nnx.Sequential."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from revcore import Chain, Checkpoint, Couple, InversionError, Program, Repeat, Reverse, SpecError, StoreAll
from revcore_jax.nnx import ReversibleSequential, stack
from tests.flax.nnx_models import D, Mode, arrays, linear, loss, modes, step_by_step
from tests.plain.nnx import Plain
from tests.tiers import product

pytestmark = pytest.mark.usefixtures("x64")


class Noisy(nnx.Module):
    """Dropout and noise that draw from the rngs of the call, out of two streams."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
        self.linear = linear(rngs, dtype)
        self.dropout = nnx.Dropout(0.4)

    def __call__(self, x: Any, *, rngs: Any = None) -> Any:
        x = self.dropout(jnp.tanh(self.linear(x)), rngs=rngs)
        if not self.dropout.deterministic and not isinstance(rngs, jax.Array):
            stream = rngs if isinstance(rngs, nnx.RngStream) else rngs.noise
            x = x + stream.uniform(x.shape, x.dtype)
        return x


def pair(mode: Mode, **settings: Any) -> tuple[Any, Any]:
    mine, plain = mode.pair(Noisy, n=3, **settings)
    plain.takes = True
    return mine, plain


@step_by_step
def test_rngs_of_the_call_go_from_block_to_block(mode: Mode) -> None:
    """Values, gradients and the caller's counts, two calls in a row."""

    def run(model: Any) -> Any:
        rngs = nnx.Rngs(0, noise=1)
        first = nnx.value_and_grad(loss)(model, mode.x(), rngs)
        return first, loss(model, mode.x(), rngs=rngs), nnx.state(rngs)

    got = mode.same_run(pair(mode), run)
    counts = nnx.to_pure_dict(got[2])
    assert (counts["default"]["count"], counts["noise"]["count"]) == (6, 6)


@modes
def test_a_stream_or_a_key_does_as_well(mode: Mode) -> None:
    def run(model: Any) -> Any:
        stream = nnx.Rngs(0).dropout
        some = stream, jax.random.key(0), jax.random.PRNGKey(0)
        return [nnx.grad(loss)(model, mode.x(), rngs) for rngs in some], nnx.state(stream)

    mode.same_run(pair(mode), run)


@modes
def test_rngs_as_an_argument_of_a_compiled_step(mode: Mode) -> None:
    """The caller's object itself counts on, under jit as without."""
    ours, plain = pair(mode)
    step = mode.compiled(lambda model, rngs, x: nnx.grad(loss)(model, x, rngs))
    mine, other = nnx.Rngs(3), nnx.Rngs(3)
    for _ in range(2):
        mode.same(step(ours, mine, mode.x()), step(plain, other, mode.x()))
    mode.same(nnx.state(mine), nnx.state(other))
    assert mine.default.count[...] == 12


@step_by_step
def test_in_a_repeat_each_iteration_goes_on_from_the_last(mode: Mode) -> None:
    """A scan over stacked blocks, one of which takes no rngs, with a block before and after it."""
    rngs = nnx.Rngs(0)
    first, *noisy = (Noisy(rngs, mode.dtype) for _ in range(5))
    still = [linear(rngs, mode.dtype) for _ in range(3)]
    body = Repeat(Chain([Couple(1, 0), Couple(0, 1)]), 3)
    program = Program([Couple(0, 1), body, Couple(1, 0)])
    model = ReversibleSequential(first, stack(noisy[:3]), stack(still), noisy[3], program=program)

    def plain(model: Any, x: Any, rngs: Any) -> Any:
        a, b = jnp.split(x, 2, -1)
        first, noisy, still = model
        a = a + first(b, rngs=rngs)
        for i in range(3):
            b = b + noisy[i](a, rngs=rngs)
            a = a + still[i](b)
        return jnp.concatenate([a, b + noisy[3](a, rngs=rngs)], -1)

    def written_out(parts: Any, x: Any, rngs: Any) -> Any:
        return jnp.sum(jnp.sin(plain(parts, x, rngs)))

    mine, other = nnx.Rngs(0, noise=1), nnx.Rngs(0, noise=1)
    got, gx = mode.compiled(nnx.grad(lambda m, x, r: loss(m, x, rngs=r), argnums=(0, 1)))(model, mode.x(), mine)
    parts = nnx.List([first, nnx.List(noisy), nnx.List(still)])
    want, wx = mode.compiled(nnx.grad(written_out, argnums=(0, 1)))(parts, mode.x(), other)
    mode.same(nnx.state(mine), nnx.state(other))
    grads = got["layers"]
    take = [jax.tree.map(lambda a, i=i: a[i], grads[1]) for i in range(3)]
    mode.same([gx, grads[0], *take], [wx, want[0], *(want[1][i] for i in range(3))], depth=8)
    mode.same(
        [grads[3], grads[2]], [want[1][3], jax.tree.map(lambda *a: jnp.stack(a), *(want[2][i] for i in range(3)))]
    )


@step_by_step
def test_inside_nnx_sequential_and_nested(mode: Mode) -> None:
    """nnx.Sequential hands rngs to the reversible part, and that to a reversible part inside it."""

    def run(model: Any) -> Any:
        rngs = nnx.Rngs(0, noise=1)
        return nnx.grad(loss)(model, mode.x(d=4 * D), rngs), nnx.state(rngs)

    outer = []
    for kind in (ReversibleSequential, lambda *layers: Plain(*layers, takes=True)):
        inner = [kind(Noisy(nnx.Rngs(i), mode.dtype)) for i in range(2)]
        outer.append(nnx.Sequential(linear(nnx.Rngs(5), mode.dtype, 4 * D), kind(*inner)))
    mode.same_run(outer, run)


@step_by_step
def test_rngs_of_the_constructor_are_forked_and_stand_in(mode: Mode) -> None:
    given = nnx.Rngs(0, noise=1)
    ours, plain = pair(mode, rngs=given)
    assert given.default.count[...] == given.noise.count[...] == 1
    other = nnx.Rngs(0, noise=1).fork()
    x = mode.x()
    mode.same(mode.compiled(loss)(ours, x), mode.compiled(lambda m, x, r: loss(m, x, rngs=r))(plain, x, other))
    mode.same(nnx.state(ours.rngs), nnx.state(other))
    ours(x, rngs=jax.random.key(0))  # those of the call come first
    mode.same(nnx.state(ours.rngs), nnx.state(other))


def test_drawing_inside_a_condition() -> None:
    """How often a block draws may depend on the data; its successors still begin where it stopped."""

    class Sometimes(nnx.Module):
        def __call__(self, x: Any, *, rngs: Any) -> Any:
            return nnx.cond(x[0, 0] > 0, lambda r, x: x * r.uniform(x.shape), lambda r, x: x, rngs, x)

    ours, plain = ReversibleSequential(Sometimes(), Sometimes()), Plain(Sometimes(), Sometimes(), takes=True)
    counts = set()
    for seed in range(3):
        x, mine, other = Mode(jnp.float64, False).x(seed=seed), nnx.Rngs(0), nnx.Rngs(0)
        assert jnp.allclose(ours(x, rngs=mine), plain(x, rngs=other), atol=1e-12)
        assert mine.default.count[...] == other.default.count[...]
        counts.add(int(mine.default.count[...]))
    assert len(counts) > 1


def test_counting_costs_no_evaluation() -> None:
    """Where each block begins is found by integer arithmetic alone: no product is left of that pass."""
    mode = Mode(jnp.float64, True)
    model, _ = pair(mode)

    def products(rngs: Any) -> int:
        graph, state = nnx.split(model)
        run = jax.jit(lambda state, x, rngs: nnx.merge(graph, state)(x, rngs=rngs))
        return run.lower(state, mode.x(), rngs).as_text().count("stablehlo.dot_general")

    assert products(nnx.Rngs(0)) == products(jax.random.key(0)) <= 3


def test_no_draw_writes_nothing() -> None:
    """In eval mode the caller's rngs are left alone, even where this trace may not change them."""
    mode = Mode(jnp.float64, True)
    model, _ = pair(mode)
    rngs, x = nnx.Rngs(0), mode.x()
    with pytest.raises(Exception, match="Cannot mutate RngCount from a different trace level"):
        jax.jit(lambda x: model(x, rngs=rngs))(x)
    assert rngs.default.count[...] == 0
    model.eval()
    jax.jit(lambda x: model(x, rngs=rngs))(x)
    assert rngs.default.count[...] == 0


def test_inverse_takes_keys_and_refuses_streams() -> None:
    model, _ = pair(Mode(jnp.float64, False))
    x, key = Mode(jnp.float64, False).x(), jax.random.key(0)
    assert jnp.allclose(model.inverse(model(x, rngs=key), rngs=key), x, atol=1e-12)
    rngs = nnx.Rngs(0)
    with pytest.raises(InversionError, match=r"Noisy draws random numbers.*or hand keys to both"):
        model.inverse(x, rngs=rngs)
    assert rngs.default.count[...] == 0


def test_a_key_for_each_block_comes_first() -> None:
    model, plain = pair(Mode(jnp.float64, False))
    x, rngs, keys = Mode(jnp.float64, False).x(), nnx.Rngs(0), jax.random.split(jax.random.key(1), 3)
    got = model(x, rngs=rngs, layerwise_args_kwargs=[((), {"rngs": key}) for key in keys])
    a, b = jnp.split(x, 2, -1)
    for layer, key in zip(plain.layers, keys, strict=True):
        a, b = b, a + layer(b, rngs=key)
    assert jnp.allclose(got, jnp.concatenate([a, b], -1), atol=1e-12)
    assert rngs.default.count[...] == 0


def test_what_a_block_keeps_of_its_own_is_not_touched() -> None:
    """A block without the keyword, and a function, get no rngs; one with it gets them even beside its own."""

    def function(x: Any) -> Any:
        return jnp.sin(x)

    own: Any = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    model = ReversibleSequential(function, own, linear(nnx.Rngs(0), jnp.float64), jnp.tanh)
    rngs = nnx.Rngs(1)
    model(jnp.ones((3, 2 * D)), rngs=rngs)
    assert (rngs.default.count[...], own.rngs.count[...]) == (1, 0)
    model(jnp.ones((3, 2 * D)))
    assert (rngs.default.count[...], own.rngs.count[...]) == (1, 1)


def test_bad_rngs_are_told() -> None:
    class Holds(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.rngs = rngs

        def __call__(self, x: Any, *, rngs: Any = None) -> Any:
            return x * self.rngs.uniform(x.shape) * (1.0 if rngs is None else rngs.uniform(x.shape))

    x, rngs = jnp.ones((2, 4)), nnx.Rngs(0)
    with pytest.raises(SpecError, match=r"rngs came as int, expected nnx.Rngs, nnx.RngStream or a key"):
        ReversibleSequential(Holds(rngs))(x, rngs=0)  # type: ignore[arg-type]
    for model in (ReversibleSequential(Holds(rngs)), ReversibleSequential(Holds(rngs), Holds(rngs))):
        with pytest.raises(SpecError, match=r"block 0 changes its state 'rngs.default.count', which .* holds too"):
            model(x, rngs=rngs)
    assert arrays(nnx.state(rngs, nnx.RngCount)) == [0]


@pytest.mark.parametrize(
    "policy",
    product(
        [StoreAll(), Checkpoint(), Reverse(anchor_every=1), Reverse(keep_last=1)],
        fast=lambda policy: policy == Reverse(keep_last=1),
    ),
)
def test_every_policy_draws_the_same(policy: Any) -> None:
    mode = Mode(jnp.float64, False)
    ours, _ = pair(mode, policy=policy)
    other, _ = pair(mode)
    got, want = (nnx.grad(loss)(m, mode.x(), nnx.Rngs(0)) for m in (ours, other))
    mode.same(got, want)
