"""Exact programs in JAX: bit for bit or an error, gradients of any order, every place that a program runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.errors import JaxRuntimeError

import revcore_jax
from revcore import (
    BDIA,
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
    StoreAll,
    bdia,
)
from revcore.lattice import Lattice
from revcore_jax import check_inverse, engine, reversible, watch
from tests.helpers import assert_close, name_of, tree_error
from tests.tiers import product

D, ROWS = 8, 4
KINDS: dict[str, tuple[Couple, Couple]] = {
    "additive": (Couple(0, 1), Couple(1, 0)),
    "momentum": (Couple(0, 1, Momentum(0.9)), Couple(1, 0, Momentum(0.9))),
    "bdia": (Couple(0, 1, BDIA(0.5)), Couple(1, 0, BDIA(0.5))),
    "momentum_net": (Couple(0, 1, Momentum(0.9)), Couple(1, 0, block=False)),
}
DOTS = Reverse(recompute=jax.checkpoint_policies.dots_saveable)


def block(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]) @ p["v"]


def repeated(kind: str, pairs: int, **how: Any) -> Program:
    return Program([Repeat(Chain(KINDS[kind]), pairs)]).exact(**how)


def given(program: Program, dtype: Any = np.float32) -> tuple[Any, Any]:
    """Return parameters and streams."""
    rng = np.random.default_rng(0)
    lead = [step.n for step in program.steps if isinstance(step, Repeat)]

    def drawn(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    params = [
        {"w": drawn(*lead, D, D) / D**0.5, "v": 0.3 * drawn(*lead, D, D) / D**0.5} for _ in range(program.num_slots)
    ]
    return params, tuple(drawn(ROWS, D) for _ in range(2))


def loss(program: Program, policy: Any, params: Any, streams: Any, block: Any = block) -> Any:
    """Return a number, and the streams."""
    out = reversible(program, [block] * program.num_slots, params, streams, policy=policy)
    return sum(jnp.sum(jnp.sin(y)) for y in out), out


def gradient(program: Program, policy: Any, block: Any = block) -> Callable[..., Any]:
    """Return a function that returns the gradients of parameters and streams, and the output."""
    return jax.grad(partial(loss, program, policy, block=block), (0, 1), has_aux=True)


def assert_equal(got: Any, want: Any, program: Program) -> None:
    """Fail unless outputs are equal to the bit, and gradients to rounding."""
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert_close(got[0], want[0], dtype="float32", limit=16 * len(program.unrolled) ** 0.5)


# --- bit for bit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", product(KINDS, fast=lambda kind: kind == "momentum"))
def test_256_steps_under_jit(kind: str) -> None:
    """No checksum is wrong, so what the backward pass rebuilt is what was there."""
    program = repeated(kind, 128, guard=1)
    assert len(program.unrolled) == 256
    args = given(program)
    assert_equal(jax.jit(gradient(program, Reverse()))(*args), jax.jit(gradient(program, StoreAll()))(*args), program)


POLICIES = Reverse(anchor_every=6, keep_last=4), Checkpoint(4), DOTS


@pytest.mark.parametrize("policy", product(POLICIES, fast=lambda policy: isinstance(policy, Reverse), name=name_of))
def test_every_policy(policy: Any, quick_compilation: None) -> None:
    program = repeated("momentum", 8, guard=1)
    args = given(program)
    want = jax.jit(gradient(program, StoreAll()))(*args)
    assert_equal(jax.jit(gradient(program, policy))(*args), want, program)


@pytest.mark.parametrize("how", ["eager", pytest.param("disable_jit", marks=pytest.mark.long)])
def test_without_jit(how: str, quick_compilation: None) -> None:
    program = repeated("momentum_net", 1, guard=1)
    args = given(program)
    want = jax.jit(gradient(program, StoreAll()))(*args)
    with jax.disable_jit() if how == "disable_jit" else contextlib.nullcontext():
        assert_equal(gradient(program, Reverse())(*args), want, program)


@pytest.mark.parametrize(
    "program",
    [pytest.param(bdia(4), id="bdia", marks=pytest.mark.long), pytest.param(repeated("momentum", 2), id="momentum")],
)
def test_check_inverse_finds_nothing(program: Program, quick_compilation: None) -> None:
    report = check_inverse(program, [block] * program.num_slots, *given(program))
    assert report.worst == 0.0
    ordinary = Program(KINDS["momentum"] * 4)
    assert check_inverse(ordinary, [block] * 8, *given(ordinary)).worst > 0


def test_torch_computes_the_same_bits(x64: None) -> None:
    torch = pytest.importorskip("torch")
    from revcore_torch import reversible as reversible_torch

    program = Program(KINDS["momentum"] * 2 + KINDS["bdia"] * 2).exact(bits=36)
    params, streams = given(program, np.float64)
    ours = reversible(program, [block] * program.num_blocks, params, streams)

    def of(array: Any) -> Any:
        return torch.from_numpy(np.array(array))

    def made(w: Any, v: Any) -> Any:
        return lambda x: torch.tanh(x @ w) @ v

    blocks = [made(of(p["w"]), of(p["v"])) for p in params]
    theirs = reversible_torch(program, blocks, [of(x) for x in streams])
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b.numpy())
        np.testing.assert_array_equal(a, Lattice(36).round(np.asarray(a)))


# --- blocks that return something else the second time ----------------------------------------------------------------


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backward pass's runs of a block return a value 8 units in the last place away.

    Returns:
        A block of its own, or the steps that jit has compiled for others would be found.
    """
    true = engine._pulled_output

    def noisy(*args: Any) -> Any:
        (f, aux), pull = true(*args)
        f, source = (f[0], f[1:]) if isinstance(f, tuple) else (f, ())
        far = lax.bitcast_convert_type(lax.bitcast_convert_type(lax.stop_gradient(f), jnp.int32) + 8, f.dtype)
        f = f + lax.stop_gradient(far - f)
        return ((f, *source) if source else f, aux), pull

    monkeypatch.setattr(engine, "_pulled_output", noisy)
    return jax.named_scope("noise")(block)


def test_guard_bits_make_noise_good(noise: Any, quick_compilation: None) -> None:
    program = repeated("momentum", 64, bits=18, guard=1)
    args = given(program)
    got = jax.jit(gradient(program, Reverse(), noise))(*args)
    assert_equal(got, jax.jit(gradient(program, StoreAll()))(*args), program)


def test_noise_without_guard_bits(noise: Any, quick_compilation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    program = repeated("momentum", 64, bits=18)
    args = given(program)
    words = r"step \d+: the stream that was rebuilt is not the one that was there.*program\.exact\(guard=1\)"
    with pytest.raises(JaxRuntimeError, match=words):
        jax.block_until_ready(jax.jit(gradient(program, Reverse(), noise))(*args))
    _, pull = jax.vjp(lambda p: loss(program, Reverse(), p, args[1], noise)[0], args[0])
    with pytest.raises(InversionError, match=words):
        pull(jnp.float32(1))
    monkeypatch.setattr(watch, "_raise_where", lambda *_: None)
    grads, _ = jax.jit(gradient(program, Reverse(), lambda p, x: noise(p, x)))(*args)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(grads))  # whoever catches the error has nothing


def test_noise_is_told_of_the_step_that_it_was_in(noise: Any, quick_compilation: None) -> None:
    program = repeated("additive", 2, bits=18)
    params, streams = given(program)
    params[0]["v"] *= 0  # noise around nothing is far below the lattice
    params[1]["v"] = (20 * params[1]["v"]).at[1].set(0)
    with pytest.raises(JaxRuntimeError, match="step 1: the stream that was rebuilt is not the one that was there"):
        jax.block_until_ready(jax.jit(gradient(program, Reverse(), noise))(params, streams))


@pytest.mark.long
def test_noise_that_nobody_looks_for(noise: Any, quick_compilation: None) -> None:
    """Why there are checksums: the gradients are wrong, and look well."""
    program = repeated("bdia", 20, bits=18, checksum=False)  # whose inverse doubles an error in each step
    args = given(program)
    grads, _ = jax.jit(gradient(program, Reverse(), noise))(*args)
    want, _ = jax.jit(gradient(program, StoreAll()))(*args)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert tree_error(grads, want) > 0.01


# --- out of range -----------------------------------------------------------------------------------------------------


def tripled(w: Any, x: Any) -> Any:
    return w * x


TALL = Program([Repeat(Chain(KINDS["additive"]), 4)]).exact()


def tall(policy: Any, w: Any, x: Any) -> Any:
    """With ``w = 500, …`` and ``x = 1`` step 0 makes 1 + 500, and step 1 makes 1 + 500·501."""
    return sum(y.sum() for y in reversible(TALL, [tripled] * 2, [w, w], (x, x), policy=policy))


PLACES: dict[str, Callable[[Any], Any]] = {
    "eager": lambda run: run,
    "jit": jax.jit,
    "grad": lambda run: jax.grad(run, (0, 1)),
    "grad under jit": lambda run: jax.jit(jax.grad(run, (0, 1))),
    "vmap": lambda run: jax.vmap(run, (None, 0)),
    "vmap under jit": lambda run: jax.jit(jax.vmap(run, (None, 0))),
    "scan": lambda run: lambda w, x: lax.scan(lambda c, _: (c + run(w, x), None), 0.0, None, length=2),
}
ERRORS = (InversionError, JaxRuntimeError)


@pytest.mark.parametrize("place", product(PLACES, fast=lambda p: p in ("eager", "grad under jit", "vmap")))
def test_leaving_the_range_raises(place: str, quick_compilation: None) -> None:
    run = PLACES[place](partial(tall, Reverse()))
    fine = jnp.full(4, 0.5), jnp.ones(3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(*fine)))
    words = r"step 1 took a stream out of the exact range: its largest absolute value is 250501, and with bits=12 the "
    words += r"lattice ends at 4096. Take fewer bits \(bits=6 reaches 262144\)"
    with pytest.raises(ERRORS if place != "eager" else InversionError, match=words):
        jax.block_until_ready(run(jnp.asarray([500.0, 0.5, 0.5, 0.5]), jnp.ones(3)))


def test_whoever_catches_the_error_has_no_values(quick_compilation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_raise_where", lambda *_: None)
    w = jnp.asarray([500.0, 0.5, 0.5, 0.5])
    assert np.isnan(tall(Reverse(), w, jnp.ones(3)))


@pytest.mark.parametrize("policy", product([StoreAll(), Checkpoint(2), DOTS], fast=lambda p: p != DOTS, name=name_of))
def test_under_every_policy(policy: Any, quick_compilation: None) -> None:
    run = jax.jit(jax.grad(partial(tall, policy)))
    with pytest.raises(JaxRuntimeError, match="step 1 took a stream out of the exact range"):
        jax.block_until_ready(run(jnp.asarray([500.0, 0.5, 0.5, 0.5]), jnp.ones(3)))


def test_the_input_and_no_numbers(quick_compilation: None) -> None:
    w = jnp.full(4, 0.5)
    with pytest.raises(InversionError, match=r"the input took a stream out of the exact range: .* value is 5000"):
        tall(Reverse(), w, jnp.full(3, 5000.0))
    with pytest.raises(InversionError, match="the input gave a stream with NaN or infinity"):
        tall(Reverse(), w, jnp.asarray([1.0, jnp.inf]))
    with pytest.raises(InversionError, match="step 4 gave a stream with NaN or infinity"):
        tall(Reverse(), w.at[2].set(jnp.nan), jnp.ones(3))
    with pytest.raises(SpecError, match='stream_dtype="float32"'):
        tall(Reverse(), w, jnp.ones(3, jnp.bfloat16))


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("guard", "checksum"), [(0, False), (0, True), (4, True)])
def test_what_is_kept(kind: str, guard: int, checksum: bool) -> None:
    """Beside parameters and streams: carry_bits an element and step, 4 bytes a checksum; the watch and two factors."""
    program = repeated(kind, 6, guard=guard, checksum=checksum)
    params, streams = given(program)
    run = partial(reversible, program, [block] * program.num_slots)
    kept = jax.eval_shape(lambda *a: jax.vjp(run, *a)[1], params, streams)

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    carried = sum(step.coupling.carry_bits * ROWS * D // 8 + 4 * checksum for step in program.unrolled)  # type: ignore[union-attr]
    assert size(kept) - size(params) == 2 * ROWS * D * 4 + carried + 12 + 2 * 4
    if kind == "additive" and not guard and not checksum:
        assert carried == 0


def test_each_step_waits_for_the_one_before() -> None:
    """Else XLA compiles two runs of a block, among other neighbours, in two ways."""
    program = repeated("additive", 4)
    assert str(jax.make_jaxpr(partial(loss, program, StoreAll()))(*given(program))).count("optimization_barrier") == 2


# --- where programs run -----------------------------------------------------------------------------------------------


def test_second_derivatives(quick_compilation: None) -> None:
    """Reverse over reverse and forward over reverse, against the same network without any rounding."""
    program = repeated("momentum", 2, guard=1)
    params, streams = given(program)

    def second(program: Program, policy: Any) -> Any:
        def first(x: Any) -> Any:
            return jax.grad(lambda x: loss(program, policy, params, (x, streams[1]))[0])(x)

        @jax.jit
        def both(x: Any) -> Any:
            return jax.grad(lambda x: jnp.sum(first(x) * jnp.cos(x)))(x), jax.jvp(first, (x,), (jnp.sin(x),))[1]

        return both(streams[0])

    stored = second(program, StoreAll())
    assert_close(second(program, Reverse()), stored, dtype="float32", limit=16 * 4**0.5)
    ordinary = second(Program([Repeat(Chain(KINDS["momentum"]), 2)]), StoreAll())
    assert tree_error(stored, ordinary) < 1e-3  # streams are rounded to 2⁻¹², derivatives are not


def test_vmap(quick_compilation: None) -> None:
    program = repeated("bdia", 2, guard=1)
    params, streams = given(program)

    def rows(policy: Any) -> Any:
        def total(params: Any, streams: Any) -> Any:
            return jax.vmap(lambda x: loss(program, policy, params, x)[0])(streams).sum()

        return jax.jit(jax.grad(total, (0, 1)))(params, streams)

    assert_close(rows(Reverse()), rows(StoreAll()), dtype="float32", limit=16 * 4**0.5)


def test_anchors_and_bijections(quick_compilation: None) -> None:
    """What an anchor makes is put on the lattice; its derivative is its block's."""
    steps = [
        Couple(0, 1, Momentum(0.9)),
        Bijection.space_to_depth(2),
        Anchor(),
        Bijection.permute([1, 0]),
        Couple(1, 0, Momentum(0.9)),
        Couple(0, 1),
    ]
    program = Program(steps).exact(guard=1)
    seen = []

    def conv(w: Any, x: Any) -> Any:
        return jnp.sin(w * x)

    def anchor(w: Any, *streams: Any) -> Any:
        return tuple(jnp.tanh(w * s) for s in streams)

    def noted(w: Any, x: Any) -> Any:
        jax.debug.callback(seen.append, x)
        return conv(w, x)

    streams = tuple(jnp.asarray(np.random.default_rng(i).standard_normal((2, 3, 4, 4)), jnp.float32) for i in range(2))
    params = [jnp.float32(0.7 + 0.1 * i) for i in range(4)]

    def run(policy: Any) -> Any:
        def total(params: Any, streams: Any) -> Any:
            out = reversible(program, [conv, anchor, conv, conv], params, streams, policy=policy)
            return sum((y**2).sum() for y in out), out

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, streams)

    assert_equal(run(Reverse()), run(StoreAll()), program)
    reversible(program, [noted, anchor, noted, noted], params, streams, policy=StoreAll())
    jax.effects_barrier()
    values = [np.asarray(x) for x in seen]
    assert len(values) == 3
    for x in values:
        np.testing.assert_array_equal(x, Lattice(12).round(x))


def test_bfloat16_blocks_and_keys(quick_compilation: None) -> None:
    program = repeated("momentum", 4, guard=1)
    params, streams = jax.tree.map(lambda a: a.astype(jnp.bfloat16), given(program))
    keys = [((jax.random.split(jax.random.key(i, impl="rbg"), 4),), {}) for i in range(2)]

    def dropped(p: Any, x: Any, key: Any) -> Any:
        assert x.dtype == jnp.bfloat16
        return block(p, x * jax.random.bernoulli(key, 0.5, x.shape))

    def run(policy: Any) -> Any:
        def total(params: Any, streams: Any) -> Any:
            out = reversible(
                program, [dropped] * 2, params, streams,
                layerwise_args_kwargs=keys, policy=policy, stream_dtype="float32",
            )  # fmt: skip
            return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in out), out

        grads, out = jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, streams)
        return jax.tree.map(lambda a: a.astype(jnp.float32), (grads, out))

    got, want = run(Reverse()), run(StoreAll())
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert_close(got[0], want[0], dtype="bfloat16", limit=1)


def test_nnx_module(quick_compilation: None) -> None:
    program = Program(KINDS["momentum"]).exact(guard=1)
    layers = [nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(i)), nnx.Dropout(0.5, rngs=nnx.Rngs(i))) for i in range(2)]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, 8)), jnp.float32)

    def run(policy: Any) -> Any:
        model = revcore_jax.nnx.ReversibleSequential(*map(nnx.clone, layers), program=program, policy=policy)

        @nnx.jit
        def grads(model: Any, x: Any) -> Any:
            return nnx.grad(lambda model, x: jnp.sum(jnp.sin(model(x))), argnums=(0, 1))(model, x)

        return jax.tree.leaves(nnx.to_pure_dict(grads(model, x)[0])), grads(model, x)[1]

    assert_close(run(Reverse()), run(StoreAll()), dtype="float32", limit=16 * 2**0.5)


def test_linen_module(quick_compilation: None) -> None:
    program = Program(KINDS["momentum"]).exact(guard=1)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, 8)), jnp.float32)

    def run(policy: Any) -> Any:
        layers = [flax.linen.Dense(4) for _ in range(2)]
        model = revcore_jax.linen.ReversibleSequential(layers, program=program, policy=policy)
        params = model.init(jax.random.key(0), x)
        return jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(jnp.asarray(model.apply(p, x)))), (0, 1)))(params, x)

    assert_close(run(Reverse()), run(StoreAll()), dtype="float32", limit=16 * 2**0.5)
