"""Equal layers as one scan: modules made by nnx.vmap or stack, inside a Repeat, against the same layers one by one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from revcore import Chain, Couple, Program, Repeat, SpecError
from revcore_jax.nnx import ReversibleSequential, stack, unstack
from tests.flax.nnx_models import Block, D, Mode, Smooth, arrays, blocks, linear, loss, modes, step_by_step
from tests.plain.nnx import Plain

pytestmark = pytest.mark.usefixtures("x64")


class Attention(nnx.Module):
    """Attention of Flax, with dropout on its weights."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any) -> None:
        self.attend = nnx.MultiHeadAttention(
            2, D, dtype=dtype, param_dtype=dtype, dropout_rate=0.3, decode=False, deterministic=False, rngs=rngs
        )

    def __call__(self, x: Any) -> Any:
        return self.attend(x)


PAIR = Chain([Couple(0, 1), Couple(1, 0)])


def in_order(model: Any) -> list[Any]:
    """Return the layers of a stacked model one by one, as they run."""
    return [layer for layers in zip(*map(unstack, model.layers), strict=True) for layer in layers]


def same_step(mode: Mode, model: Any, layers: list[Any], x: Any) -> None:
    """One training step of both: value, gradients, and afterwards state."""
    plain = Plain(*layers)
    step = mode.compiled(nnx.value_and_grad(loss))
    (value, got), (other, want) = step(model, x), step(plain, x)
    take = [jax.tree.map(lambda a, i=i: a[i], part) for i in range(2) for part in got["layers"].values()]
    mode.same([value, *take], [other, *want["layers"].values()], depth=len(layers))
    mode.same([nnx.state(m) for m in in_order(model)], [nnx.state(m) for m in plain.layers], depth=len(layers))


@modes
def test_pairs_of_unlike_layers(mode: Mode) -> None:
    """Attention with dropout and a feed-forward block, twice: a scan whose body is the pair."""
    rngs = nnx.Rngs(0)
    layers = [kind(rngs, mode.dtype) for _ in range(2) for kind in (Attention, Smooth)]
    model = ReversibleSequential(stack(layers[::2]), stack(layers[1::2]), program=Program([Repeat(PAIR, 2)]))
    same_step(mode, model, layers, mode.x())


@modes
def test_every_fourth_layer_different(mode: Mode) -> None:
    rngs = nnx.Rngs(0)
    kinds = (Smooth, Smooth, Smooth, Block)
    layers = [kind(rngs, mode.dtype) for _ in range(2) for kind in kinds]
    stacked = [stack(layers[i::4]) for i in range(4)]
    model = ReversibleSequential(*stacked, program=Program([Repeat(Chain([PAIR, PAIR]), 2)]))
    same_step(mode, model, layers, mode.x())


@step_by_step
def test_made_by_vmap(mode: Mode) -> None:
    """nnx.split_rngs gives each layer its own numbers, parameters and dropout alike."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Block:
        return Block(rngs, mode.dtype)

    model = ReversibleSequential(make(nnx.Rngs(0)), make(nnx.Rngs(1)), program=Program([Repeat(PAIR, 2)]))
    first = model.layers[0]
    assert isinstance(first, Block)
    assert (first.first.kernel.shape, first.dropout.rngs.key.shape) == ((2, D, D), (2,))  # type: ignore[union-attr]
    same_step(mode, model, in_order(nnx.clone(model)), mode.x())


@modes
def test_a_repeat_inside_a_repeat(mode: Mode) -> None:
    """Two leading axes: twice (two equal pairs, then another)."""
    rngs = nnx.Rngs(0)
    groups = [
        ([Smooth(rngs, mode.dtype) for _ in range(4)], [linear(rngs, mode.dtype) for _ in range(2)]) for _ in "ab"
    ]
    inner = [stack([stack(many[i::2]) for many, _ in groups]) for i in range(2)]
    outer = [stack([two[i] for _, two in groups]) for i in range(2)]
    model = ReversibleSequential(*inner, *outer, program=Program([Repeat(Chain([Repeat(PAIR, 2), PAIR]), 2)]))
    plain = Plain(*(layer for many, two in groups for layer in (*many, *two)))
    x = mode.x()
    got, want = (mode.compiled(jax.value_and_grad(lambda x, m=m: loss(m, x)))(x) for m in (model, plain))
    mode.same(got, want, depth=12)


def test_depth_does_not_lengthen_the_program() -> None:
    """The compiled text of a gradient has one length at any depth, with its statistics and masks."""

    def length(n: int) -> int:
        layers = blocks(jnp.float32, 2 * n)
        program = Program([Repeat(PAIR, n)])
        graph, state = nnx.split(ReversibleSequential(stack(layers[::2]), stack(layers[1::2]), program=program))

        def step(state: Any, x: Any) -> Any:
            model = nnx.merge(graph, state)
            return nnx.grad(loss)(model, x), nnx.state(model)

        text = jax.jit(step).lower(state, jnp.ones((2, 2 * D), jnp.float32)).as_text()
        return text.count("\n")

    assert length(2) == length(5) > 100


def test_stack_and_unstack_are_inverse() -> None:
    layers = blocks(jnp.float64, 3)
    again = unstack(stack(layers))
    for layer, other in zip(layers, again, strict=True):
        assert nnx.graphdef(layer) == nnx.graphdef(other)
        assert all(jnp.array_equal(a, b) for a, b in zip(arrays(layer), arrays(other), strict=True))
    with pytest.raises(SpecError, match="the modules differ in their attributes"):
        stack([*layers, Smooth(nnx.Rngs(0), jnp.float64)])


def test_blocks_that_are_not_stacked_are_told() -> None:
    model = ReversibleSequential(*blocks(jnp.float64, 2, Smooth), program=Program([Repeat(PAIR, 3)]))
    with pytest.raises(SpecError, match=r"block 0 is inside Repeat\(n=3\).*expected a leading axis of 3"):
        model(jnp.ones((2, 2 * D)))
