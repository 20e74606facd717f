"""What J4's barrier is for: without it a compiler may rebuild every layer before the first cotangent is there.

Shown in the flow of data, which holds for every compiler: how many products depend on no cotangent. XLA for the CPU
(jax 0.10.2) happens to hoist none of them at the sizes that were tried, with or without; XLA for GPUs hoists them all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import revcore_jax
from revcore import Couple, Program
from revcore_jax import engine

PRODUCTS = 2  # in one evaluation of the block


def without_cotangent(depth: int) -> int:
    """Return how many products of forward and backward pass of ``depth`` blocks could run before any cotangent."""

    def block(p: Any, x: Any) -> Any:  # a new one each time, so that it is traced with the barrier at hand
        return jnp.tanh(x @ p["w"]) @ p["v"]

    program = Program(tuple(Couple(i % 2, ((i + 1) % 2,)) for i in range(depth)))
    params = [{k: jnp.ones((3, 3)) for k in "wv"} for _ in range(depth)]
    streams = jnp.ones((2, 3)), jnp.ones((2, 3))

    def run(params: Any, streams: Any, cotangents: Any) -> Any:
        return jax.vjp(lambda *a: revcore_jax.reversible(program, [block] * depth, *a), params, streams)[1](cotangents)

    jaxpr = jax.make_jaxpr(run)(params, streams, streams).jaxpr
    free, _ = independent(jaxpr, [False] * (len(jaxpr.invars) - 2) + [True] * 2)
    return free


def independent(jaxpr: Any, waits: list[bool]) -> tuple[int, list[bool]]:
    """Count the products that wait for no input that is marked, and mark the outputs that do."""
    marked = {v for v, wait in zip(jaxpr.invars, waits, strict=True) if wait}
    count = 0
    for eqn in jaxpr.eqns:
        here = [not hasattr(v, "val") and v in marked for v in eqn.invars]
        inside = eqn.params.get("jaxpr")
        if inside is not None:
            free, out = independent(getattr(inside, "jaxpr", inside), here)
            count += free
        else:
            out = [any(here)] * len(eqn.outvars)
            count += eqn.primitive.name == "dot_general" and not any(here)
        marked.update(v for v, wait in zip(eqn.outvars, out, strict=True) if wait)
    return count, [not hasattr(v, "val") and v in marked for v in jaxpr.outvars]


@pytest.mark.parametrize("depth", [3, 8])
def test_nothing_is_rebuilt_before_its_cotangent(depth: int) -> None:
    assert without_cotangent(depth) == PRODUCTS * depth  # those of the forward pass


@pytest.mark.parametrize("depth", [3, 8])
def test_without_the_barrier_everything_could_be(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.lax, "optimization_barrier", lambda values: values)
    assert without_cotangent(depth) == 2 * PRODUCTS * depth
