"""What the JAX engine costs, exactly: residuals, temporary memory, evaluations, barriers; none grows with depth."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import revcore_jax
from revcore import Chain, Checkpoint, Couple, Momentum, Program, Repeat, Reverse, StoreAll, revnet
from revcore_jax import engine
from revcore_jax.closed import dce_jaxpr
from tests.helpers import AS_USERS_COMPILE, assert_close

ROWS, D = 32, 16
STREAM = ROWS * D * 4
PAIR = (Couple(0, (1,)), Couple(1, (0,), Momentum(0.9)))


def mlp(p: Any, x: Any, context: Any) -> Any:
    return jnp.tanh(x @ p["w"] + context) @ p["v"]


def named(p: Any, x: Any, context: Any) -> Any:
    return jnp.tanh(checkpoint_name(x @ p["w"] + context, "hidden")) @ p["v"]


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


def barriers(jaxpr: Any) -> list[int]:
    """Return how many values pass through each barrier, outer ones first."""
    own = [len(eqn.invars) for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
    return own + [n for _, sub in inner(jaxpr) for n in barriers(sub)]


def check_barriers(jaxpr: Any, steps: int) -> None:
    """Fail unless each step's backward pass stands behind a barrier of its own: from there come its parameters, the
    streams and their cotangents, and the gradients that the step before made wait there too (J4)."""

    def walk(jaxpr: Any) -> None:
        calls = [eqn for eqn in jaxpr.eqns if eqn.params.get("name") == "backward"]
        fences = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"]
        if len(calls) > 1 or fences:
            assert len(calls) == len(fences)
            for call, fence in zip(calls, fences, strict=True):
                assert sum(v in fence.outvars for v in call.invars if not hasattr(v, "val")) == 2 + 2 + 2
        for _, sub in inner(jaxpr):
            walk(sub)

    first = 2 + 2 + 2 + 1  # two parameters, two streams, two cotangents, the context's gradient
    walk(jaxpr)
    assert barriers(jaxpr) == [first] + [first + 2] * (steps - 1)


@pytest.mark.parametrize("kind", ["chain", "repeat"])
def test_residuals_are_the_streams_at_any_depth(kind: str) -> None:
    """Invariant: parameters, shared arguments and the last streams are kept, and never a layer's input."""
    for depth in (4, 16, 64):
        assert residual(*network(kind, depth), Reverse()) == 2 * STREAM


@pytest.mark.parametrize("kind", ["chain", "repeat"])
def test_residuals_of_other_policies_are_what_they_say(kind: str) -> None:
    run, given = network(kind, 8)
    assert residual(run, given, Reverse(anchor_every=4)) == (2 + 2 * 3) * STREAM  # three anchors between four runs
    assert residual(run, given, Reverse(anchor_every=7)) == (2 + 2 * 2) * STREAM  # 7, 7 and 2 steps; pairs: 3, 3 and 2
    assert residual(run, given, Reverse(anchor_every=16)) == 2 * STREAM
    assert residual(run, given, StoreAll()) > 16 * STREAM


@pytest.mark.parametrize(("kind", "stored"), [("chain", 3), ("repeat", 4)])
def test_stored_steps_keep_what_they_made_and_nothing_twice(kind: str, stored: int) -> None:
    """The last three steps, in a Repeat two pairs: of each its source, tanh and its slope, and the streams before."""
    before = 2 - (kind == "chain")  # one of them is a source; in a scan that is kept beside
    assert residual(*network(kind, 8), Reverse(keep_last=3)) == (2 + before + 3 * stored) * STREAM


def test_a_checkpoint_keeps_its_inputs_and_what_its_policy_names() -> None:
    run, given = network("chain", 8, named)
    assert residual(run, given, Checkpoint(7)) == 3 * 2 * STREAM  # 7, 7 and 2 steps
    only = jax.checkpoint_policies.save_only_these_names("hidden")
    assert residual(run, given, Checkpoint(7, recompute=only)) == (3 * 2 + 16) * STREAM - size(given[2])  # no context


def dots(run: Any, given: Any, policy: Any) -> int:
    """Return how many products a training step computes, but for those whose results nobody uses."""
    jaxpr = jax.make_jaxpr(gradient(run, policy))(*given).jaxpr
    return count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])["dot_general"]


def test_selected_results_are_kept_and_not_made_again() -> None:
    """tanh(x @ w + c) @ v: kept are both products or one of them, made again are the others."""
    blocks, made = 2 * 4, jax.checkpoint_policies
    run, given = network("chain", 4, named)
    for recompute, kept, again in (
        (None, 0, 2),
        (made.nothing_saveable, 0, 2),
        (made.save_only_these_names("hidden"), 1, 1),
        (made.dots_saveable, 2, 0),
    ):
        policy = Reverse(recompute=recompute)
        assert residual(run, given, policy) == (2 + kept * blocks) * STREAM
        unused = min(again, 1)  # the network's own input is rebuilt for nobody
        assert dots(run, given, policy) == (6 + again) * blocks - unused
    loop, stacked = network("repeat", 4, named)
    assert residual(loop, stacked, Reverse(recompute=made.dots_saveable)) == (2 + 2 * blocks) * STREAM


def test_what_the_backward_pass_does_not_use_is_not_kept() -> None:
    run, given = network("chain", 4, lambda p, x, context: jnp.sin(jnp.cos(x) @ p["w"]) @ (3 * p["v"]) + 2 * context)
    everything = residual(run, given, Reverse(recompute=jax.checkpoint_policies.everything_saveable))
    # cos(x), the first product and its sine, the second product, and 3·v
    assert everything <= (2 + 5 * 8) * STREAM


def temporary(run: Any, given: Any, policy: Any) -> int:
    analysis = jax.jit(gradient(run, policy)).lower(*given).compile(AS_USERS_COMPILE).memory_analysis()
    if analysis is None:
        pytest.skip("this platform analyses no memory")
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("policy", [Reverse(), Reverse(keep_last=4)], ids=str)
def test_temporary_memory_of_a_repeat_is_flat(policy: Any) -> None:
    """Beyond what a policy keeps; stacked parameters above all are not copied. (16 bytes a layer hold its index.)"""
    few, many = (temporary(*network("repeat", depth), policy) for depth in (8, 64))
    assert abs(many - few) <= 16 * 64


def test_anchors_in_a_repeat_take_their_own_bytes_alone() -> None:
    few, many = (temporary(*network("repeat", depth), Reverse(anchor_every=8)) for depth in (16, 64))
    assert many - few <= (2 * 12 + 1) * STREAM  # 3 and 15 anchors of two streams


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
    """In Python, and each kind of step once more to stage it out in either pass."""
    calls, staged = [], []
    for depth in (2, 32):

        def block(p: Any, x: Any, context: Any) -> Any:
            calls.append(1)
            return mlp(p, x, context)

        run, given = network("chain", depth, block)
        jaxpr = jax.make_jaxpr(gradient(run))(*given).jaxpr
        steps = [
            (eqn.params["name"], id(sub))
            for eqn, sub in inner(jaxpr)
            if eqn.params.get("name") in ("forward", "backward")
        ]
        staged.append(len(set(steps)))
    assert len(calls) == 2
    assert staged == [4, 4]


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


def test_what_a_repeat_stores_waits_before_the_rest_is_rebuilt() -> None:
    """The stored iterations' four gradients and the context's, beside all parameters, streams and cotangents."""
    run, given = network("repeat", 6)
    found = barriers(jax.make_jaxpr(gradient(run, Reverse(keep_last=4)))(*given).jaxpr)
    assert found[0] == 4 + 1 + 4 + 2 + 2
    assert len(found) == 1 + 2  # and one for each step of the pair


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


def test_a_wrong_adjoint_is_noticed(quick_compilation: None) -> None:
    def grads(coupling: Any, policy: Any) -> Any:
        def loss(params: Any) -> Any:
            streams = jnp.ones((3, D)), jnp.ones((3, D))
            y = revcore_jax.reversible(revnet(4, coupling), [mlp] * 4, params, streams, 0.5, policy=policy)
            return jnp.sum(y[0] * y[1])

        return jax.jit(jax.grad(loss))([{k: jnp.full((D, D), 0.05) for k in "wv"}] * 4)

    want = grads(Momentum(0.9), StoreAll())
    assert_close(grads(Momentum(0.9), Reverse()), want, depth=4, dtype="float32")
    with pytest.raises(AssertionError):
        assert_close(grads(ForwardAsAdjoint(0.9), Reverse()), want, depth=4, dtype="float32")


@pytest.mark.parametrize("wrong", [np.zeros(3), np.full(3, np.nan), np.zeros(0)], ids=["zero", "nan", "missing"])
def test_a_zero_nan_or_missing_gradient_is_noticed(wrong: Any) -> None:
    with pytest.raises(AssertionError):
        assert_close({"a": np.ones(3), "b": wrong}, {"a": np.ones(3), "b": np.ones(3)})
