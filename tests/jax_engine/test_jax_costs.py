"""What the JAX engine costs, exactly: residuals, temporary memory, evaluations, barriers; none grows with depth."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import revcore_jax
from revcore import Chain, Checkpoint, Couple, Momentum, Program, Repeat, Reverse, StoreAll, revnet
from revcore_jax import engine

ROWS, D = 32, 16
STREAM = ROWS * D * 4
PAIR = (Couple(0, (1,)), Couple(1, (0,), Momentum(0.9)))


def mlp(p: Any, x: Any, context: Any) -> Any:
    return jnp.tanh(x @ p["w"] + context) @ p["v"]


def network(kind: str, depth: int, block: Any = mlp) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function of ``(params, streams, context)`` of ``depth`` pairs of steps, and arguments for it."""
    program = Program(PAIR * depth if kind == "chain" else (Repeat(Chain(PAIR), depth),))
    lead = () if kind == "chain" else (depth,)
    params = [{k: jnp.full((*lead, D, D), 0.01) for k in "wv"} for _ in range(program.num_slots)]

    def run(params: Any, streams: Any, context: Any, policy: Any = Reverse()) -> Any:  # noqa: B008 (frozen)
        return revcore_jax.reversible(program, [block] * program.num_slots, params, streams, context, policy=policy)

    return run, (params, (jnp.ones((ROWS, D)), jnp.ones((ROWS, D))), jnp.ones(D))


def gradient(run: Any, policy: Any = Reverse()) -> Any:  # noqa: B008 (frozen)
    def loss(*given: Any) -> Any:
        return sum(jnp.sum(jnp.sin(y)) for y in run(*given, policy))

    return jax.grad(loss, argnums=(0, 1, 2))


def size(tree: Any) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def residual(run: Any, given: Any, policy: Any) -> int:
    """Return the bytes that wait for the backward pass, beyond parameters and context."""
    kept = jax.eval_shape(lambda *a: jax.vjp(lambda *a: run(*a, policy), *a)[1], *given)
    return size(kept) - size((given[0], given[2]))


def inner(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each equation with the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield eqn, sub


def count(jaxpr: Any) -> collections.Counter[str]:
    """Count primitives as they run, a scan's body as often as it is iterated."""
    total = collections.Counter(eqn.primitive.name for eqn in jaxpr.eqns)
    for eqn, sub in inner(jaxpr):
        for name, n in count(sub).items():
            total[name] += n * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else n
    return total


def check_barriers(jaxpr: Any, expected: int) -> None:
    """Fail unless each step's backward pass has one barrier over parameters, streams and cotangents, and nothing of the
    step sees them in front of it (or XLA could rebuild all layers before the first cotangent is there)."""

    def walk(jaxpr: Any) -> int:
        own = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
        for barrier in own:
            behind = {v for v in barrier.invars if not hasattr(v, "val")}
            assert len(barrier.invars) == 2 + 2 + 2, "two parameters, two streams, two cotangents"
            assert not any(v in behind for eqn in jaxpr.eqns if eqn is not barrier for v in eqn.invars if v.aval.shape)
        return len(own) + sum(walk(sub) for _, sub in inner(jaxpr))

    assert walk(jaxpr) == expected


@pytest.mark.parametrize("kind", ["chain", "repeat"])
def test_residuals_are_the_streams_at_any_depth(kind: str) -> None:
    """Invariant: parameters, shared arguments and the last streams are kept, and never a layer's input."""
    for depth in (4, 16, 64):
        assert residual(*network(kind, depth), Reverse()) == 2 * STREAM


def test_residuals_of_other_policies_are_what_they_say() -> None:
    run, given = network("chain", 8)
    assert residual(run, given, Reverse(anchor_every=4)) == (2 + 2 * 3) * STREAM  # three anchors between four runs
    assert residual(run, given, Checkpoint(4)) == 4 * 2 * STREAM
    assert residual(run, given, StoreAll()) > 16 * STREAM


def test_temporary_memory_of_a_repeat_is_flat() -> None:
    sizes = set()
    for depth in (8, 16, 32, 64):
        run, given = network("repeat", depth)
        compiled = jax.jit(gradient(run)).lower(*given).compile()
        analysis = compiled.memory_analysis()
        if analysis is None:
            pytest.skip("this platform analyses no memory")
        sizes.add(analysis.temp_size_in_bytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("kind", ["chain", "repeat"])
def test_each_block_is_evaluated_exactly_once_more(kind: str) -> None:
    for depth in (2, 5):
        run, given = network(kind, depth)
        products = {
            policy: count(jax.make_jaxpr(gradient(run, policy))(*given).jaxpr)["dot_general"]
            for policy in (Reverse(), StoreAll())
        }
        blocks = 2 * depth  # each of two products, so six in an ordinary training step
        assert products == {Reverse(): 8 * blocks, StoreAll(): 6 * blocks}


def test_steps_that_are_kept_are_not_evaluated_again() -> None:
    run, given = network("chain", 4)
    products = count(jax.make_jaxpr(gradient(run, Reverse(keep_last=3)))(*given).jaxpr)["dot_general"]
    assert products == 8 * 5 + 6 * 3


def test_equal_layers_are_traced_once() -> None:
    calls = []
    for depth in (2, 32):

        def block(p: Any, x: Any, context: Any) -> Any:
            calls.append(1)
            return mlp(p, x, context)

        run, given = network("chain", depth, block)
        jax.make_jaxpr(gradient(run))(*given)
        calls.append(-1)
    first = calls.index(-1)
    assert first == len(calls) - first - 2


def test_a_repeat_is_as_long_to_compile_at_any_depth() -> None:
    texts = []
    for depth in (8, 64):
        run, given = network("repeat", depth)
        texts.append(jax.jit(gradient(run)).lower(*given).as_text().count("\n"))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["chain", "repeat"])
def test_a_barrier_stands_before_each_step_of_a_chain(kind: str) -> None:
    run, given = network(kind, 6)
    check_barriers(jax.make_jaxpr(gradient(run))(*given).jaxpr, 12 if kind == "chain" else 2)


def test_a_missing_barrier_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.lax, "optimization_barrier", lambda values: values)
    run, given = network("chain", 6, lambda p, x, c: mlp(p, x, c))  # a fresh block, traced without
    with pytest.raises(AssertionError):
        check_barriers(jax.make_jaxpr(gradient(run))(*given).jaxpr, 12)


# --- the checks themselves --------------------------------------------------------------------------------------------


class ForwardAsAdjoint(Momentum):
    """The mistake of an older library: the coupling's forward reused to pull gradients back."""

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        return self.forward(gy, f), (1 - self.beta) * gy


def test_a_wrong_adjoint_is_noticed() -> None:
    def grads(coupling: Any, policy: Any) -> Any:
        def loss(params: Any) -> Any:
            streams = jnp.ones((3, D)), jnp.ones((3, D))
            y = revcore_jax.reversible(revnet(4, coupling), [mlp] * 4, params, streams, 0.5, policy=policy)
            return jnp.sum(y[0] * y[1])

        return jax.grad(loss)([{k: jnp.full((D, D), 0.05) for k in "wv"}] * 4)

    assert_close(grads(Momentum(0.9), Reverse()), grads(Momentum(0.9), StoreAll()), depth=4, dtype="float32")
    with pytest.raises(AssertionError):
        assert_close(
            grads(ForwardAsAdjoint(0.9), Reverse()), grads(Momentum(0.9), StoreAll()), depth=4, dtype="float32"
        )


@pytest.mark.parametrize("wrong", [np.zeros(3), np.full(3, np.nan), np.zeros(0)], ids=["zero", "nan", "missing"])
def test_a_zero_nan_or_missing_gradient_is_noticed(wrong: Any) -> None:
    with pytest.raises(AssertionError):
        assert_close({"a": np.ones(3), "b": wrong}, {"a": np.ones(3), "b": np.ones(3)})
