"""What once went wrong where somebody used the JAX side as it is described, smallest first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import revcore
import revcore_jax
from revcore import Affine, Chain, Checkpoint, Couple, Coupling, Program, Repeat, Reverse, SpecError, StoreAll
from revcore_jax import linen as linen_reversible
from revcore_jax import nnx as nnx_reversible
from tests.helpers import name_of, tree_error
from tests.jax.plain_network import Net, arrays, energy, mlp
from tests.tiers import product

pytestmark = pytest.mark.usefixtures("x64")

KEEP_ALL = jax.checkpoint_policies.everything_saveable
ONE = Program((Couple(0, (1,)),))


# --- what blocks return -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "closure"),
    product(
        [Reverse(), Reverse(keep_last=2), Reverse(recompute=KEEP_ALL), Checkpoint(2), StoreAll()],
        [False, True],
        # each runs blocks in its own way, and closed-over values are arguments of the aux outputs too
        fast=lambda policy, closure: closure and policy in (Reverse(), Reverse(recompute=KEEP_ALL), Checkpoint(2)),
        name=lambda value: ("", "closure")[value] if isinstance(value, bool) else name_of(value),
    ),
)
def test_numbers_as_auxiliary_outputs(policy: Any, closure: bool) -> None:
    params, streams = arrays("chain")

    def loss(scale: Any) -> Any:
        by = scale if closure else 1.0
        block = lambda p, x: (mlp(p, x) * by, 3.0, 2, True, np.float64(0.5), None)  # noqa: E731
        _, aux = out = revcore_jax.reversible(revcore.revnet(4), [block] * 4, params, streams, policy=policy)
        return energy(out[0]) * scale + aux[0][0], aux

    gradient, aux = jax.grad(loss, has_aux=True)(2.0)
    assert [a.tolist() for a in aux[3][:4]] == [3.0, 2, True, 0.5]
    plain = Net("chain", False)
    run = lambda s: energy(plain_outputs(plain, params, streams, s if closure else 1.0)) * s  # noqa: E731
    assert abs(gradient - jax.grad(run)(2.0)) < 1e-12


def plain_outputs(net: Net, params: Any, streams: Any, by: Any) -> Any:
    a, b = streams
    for p, q in net.pairs(params):
        a = a + mlp(p, b) * by
        b = b + mlp(q, a) * by
    return a, b


@pytest.mark.parametrize(
    ("coupling", "block"),
    [
        (None, lambda w, x: jnp.ones(x.shape, jnp.int32)),
        (None, lambda w, x: x > 0),
        (None, lambda w, x: np.ones(x.shape, np.float32)),
        (Affine(), lambda w, x: (jnp.zeros(x.shape, jnp.int8), x @ w)),
        (Coupling.from_functions(lambda x, f: x + f, lambda y, f: y - f), lambda w, x: x > 0),
    ],
)
def test_blocks_that_return_other_arrays_than_floats(coupling: Any, block: Any) -> None:
    program, streams = revcore.revnet(2, coupling), (jnp.ones((2, 3)), -jnp.ones((2, 3)))

    def loss(w: Any, streams: Any, policy: Any) -> Any:
        return energy(revcore_jax.reversible(program, [block] * 2, [w, w], streams, policy=policy))

    got, want = (jax.grad(loss, argnums=(0, 1))(jnp.eye(3) / 2, streams, policy) for policy in (Reverse(), StoreAll()))
    assert tree_error(got, want) <= 1e-12


def test_numpy_float64_from_a_block_without_x64() -> None:
    with jax.enable_x64(False):
        run = lambda x: energy(revcore_jax.reversible(ONE, [lambda p, x: np.ones(x.shape)], [None], (x, x)))  # noqa: E731
        assert jax.grad(run)(jnp.ones(3)).dtype == np.float32


def test_an_output_that_is_no_array_is_told() -> None:
    streams = (jnp.ones((2, 3)),) * 2
    for program in (ONE, Program((revcore.Anchor(),))):
        with pytest.raises(SpecError, match=r"a block returned 'name' \(str\), expected arrays, numbers or None"):
            revcore_jax.reversible(program, [lambda p, *x: (*x, x[0], "name")[-3:]], [None], streams)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_numpy_strings_are_static() -> None:
    def block(p: Any, x: Any, mode: Any, names: Any) -> Any:
        assert mode == "same"
        assert names.tolist() == ["a", "b"]
        return x

    streams = (jnp.ones(3),) * 2
    y = revcore_jax.reversible(ONE, [block], [None], streams, mode=np.str_("same"), names=np.array(["a", "b"]))
    assert y[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize(("given", "came"), [([], "0 entries"), (jnp.ones((1, 2)), "one ArrayImpl")])
def test_layerwise_arguments_of_another_number_are_told(given: Any, came: str) -> None:
    with pytest.raises(SpecError, match=rf"layerwise_args_kwargs came as {came}, expected a sequence of 1"):
        revcore_jax.reversible(ONE, [mlp], [None], (jnp.ones(3),) * 2, layerwise_args_kwargs=given)


def test_stack_keeps_what_is_no_array() -> None:
    trees = [{"w": jnp.full(2, i), "k": 2.0 * i, "mode": "same", "flag": True, "none": None} for i in range(3)]
    stacked = revcore_jax.stack(trees)
    assert (stacked["mode"], stacked["flag"], stacked["k"].tolist()) == ("same", True, [0.0, 2.0, 4.0])
    assert [(t["w"].tolist(), t["mode"]) for t in revcore_jax.unstack(stacked)] == [([i, i], "same") for i in range(3)]
    with pytest.raises(SpecError, match=r"stack: tree 1 is .*'valid'.*, but tree 0 is .*'same'"):
        revcore_jax.stack([trees[0], {**trees[1], "mode": "valid"}])


def test_check_inverse_inside_jit_is_told() -> None:
    with pytest.raises(SpecError, match=r"check_inverse: a traced value came.*call it outside of jax\.jit"):
        jax.jit(lambda x: revcore_jax.check_inverse(ONE, [lambda p, x: x], [None], (x, x)).worst)(jnp.ones(3))


def test_how_flax_modules_take_their_blocks_is_told() -> None:
    with pytest.raises(SpecError, match=r"block 0 came as a list.*write ReversibleSequential\(\*blocks\)"):
        nnx_reversible.ReversibleSequential([jnp.sin, jnp.cos])
    with pytest.raises(SpecError, match=r"layers came as one Dense.*write ReversibleSequential\(\[block, …\]\)"):
        linen_reversible.ReversibleSequential(nn.Dense(4), nn.Dense(4)).init(jax.random.key(0), jnp.ones((2, 8)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "program"), [(1, None), (5, None), (1, Program((Couple(1, (0,)), Repeat(Couple(0, (1,)), 2))))]
)
def test_linen_refuses_a_misfit_at_init_already(features: int, program: Any) -> None:
    """One feature broadcasts, so that init went well and the first apply did not."""
    model = linen_reversible.ReversibleSequential([jnp.sin, nn.Dense(features)], program=program)
    with pytest.raises(SpecError, match=rf"block 1 returned shape \(2, {features}\), but the stream .* \(2, 4\)"):
        model.init(jax.random.key(0), jnp.ones((2, 8)))


# --- what stays behind ------------------------------------------------------------------------------------------------


def test_a_trace_is_not_held_after_it_is_over() -> None:
    """A block's closed-over tracers once lived on in jit's cache, and all that they refer to."""
    params, streams = arrays("chain")

    def run(c: Any) -> Any:
        return energy(Net("chain", True)(params, streams, block=lambda p, x: mlp(p, x) * c))

    with jax.checking_leaks():
        assert np.isfinite(jax.jit(jax.grad(run))(2.0))


# --- transforms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(Reverse(anchor_every=2, offload=True), id="anchors"),
        pytest.param(Reverse(recompute=KEEP_ALL, keep_last=2, offload=True), id="recompute", marks=pytest.mark.long),
    ],
)
def test_second_derivatives_through_the_host(policy: Any) -> None:
    if "pinned_host" not in [memory.kind for memory in jax.devices()[0].addressable_memories()]:
        pytest.skip("this device has no pinned host memory")
    program = Program((Repeat(Chain((Couple(0, (1,)), Couple(1, (0,)))), 2),))
    params, streams = arrays("repeat")

    def slope(params: Any, policy: Any) -> Any:
        def loss(params: Any) -> Any:
            return energy(revcore_jax.reversible(program, [mlp] * 2, params, streams, policy=policy))

        return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(loss)(params)))

    curvature = jax.jit(jax.grad(slope), static_argnums=1)
    assert tree_error(curvature(params, policy), curvature(params, StoreAll())) <= 1e-12
