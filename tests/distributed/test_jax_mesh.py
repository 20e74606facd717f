"""Training a reversible transformer on a mesh of eight fake devices: the run of one device, memory, and collectives.

(What transforms do on several devices, ``shard_map`` above all, is in tests/jax/test_sharding.py.)
"""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")

import jax

from revcore import Checkpoint, Policy, Reverse, StoreAll
from tests.distributed.jax_networks import Layout, Training, Transformer, alone, assert_equal, batches, train
from tests.distributed.ranks import JAX, Cases

BOTH = frozenset({"data", "tensor"})
CASES = Cases(
    world=1,
    imports=JAX,
    environment={
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
    },
)


def held_against_one_device(rank: int, world: int, layout: Layout) -> None:
    assert_equal(train(layout), alone())


for name, layout in {
    "data": Layout(8),
    "tensors": Layout(2, 4, frozenset({"tensor"})),
    "parameters by both": Layout(4, 2, BOTH),
}.items():
    case = functools.partial(held_against_one_device, layout=layout)
    CASES.add(name, case, long=name != "parameters by both")


@CASES
def dropout_draws_the_same_wherever_rows_lie(rank: int, world: int) -> None:
    layout = Layout(2, 4, BOTH)
    training = Training(layout, lambda: Transformer(2, Reverse(), p=0.3))
    begun, first = training.state, training.run(batches())
    assert_equal(first, alone(0.3))
    training.state = begun
    assert training.run(batches())["losses"] == first["losses"]
    assert first["losses"] != alone()["losses"]


@CASES
def a_gradient_that_is_off_is_noticed(rank: int, world: int) -> None:
    for part in ("losses", "gradients", "parameters"):
        wrong = jax.tree.map(lambda a: a * (1 + 1e-9), alone()[part])
        with pytest.raises(AssertionError, match=part):
            assert_equal({**alone(), part: wrong}, alone())


# --- counts -----------------------------------------------------------------------------------------------------------


def bytes_on_the_first_device(tree: Any) -> int:
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


def sums(text: str) -> int:
    """Count the arrays that a compiled program sums over devices, as they are written: in a loop's body once."""
    return sum(len(given.split(",")) for given in re.findall(r" all-reduce(?:-start)?\(([^)]*)\)", text))


def compiled(policy: Policy, depth: int, layout: Layout) -> Any:
    """Compile a training step: as a user would, but for what LLVM makes of each kernel, which changes no count here."""
    training = Training(layout, lambda: Transformer(depth, policy))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(training.state))
    assert bytes_on_the_first_device(training.state) < 0.7 * whole  # norms and embedding are small, and uncut
    return training.step.lower(training.state, training.batch(batches()[0])).compile()


@CASES
def memory_of_a_device_is_flat_in_depth(rank: int, world: int) -> None:
    """What a step takes on each device beyond arguments and results, as XLA plans it; and it gathers no more."""
    few, many, stored = (
        compiled(policy, depth, Layout(2, 4, BOTH))
        for policy, depth in ((Reverse(), 2), (Reverse(), 6), (StoreAll(), 6))
    )
    sizes = [each.memory_analysis().temp_size_in_bytes for each in (few, many, stored)]
    assert sizes[1] <= sizes[0]
    assert sizes[2] > 10 * sizes[1]  # so what is stored is seen
    gathers = [len(re.findall(r" all-gather(?:-start)?\(", each.as_text())) for each in (few, many, stored)]
    assert gathers == [gathers[2]] * 3
    assert gathers[2] > 0


@CASES
def tensor_parallel_sums(rank: int, world: int) -> None:
    """Of each layer: two outputs forward, and the inputs of four products backward; the rebuild sums the outputs again.

    (A checkpoint of each block needs its inside again, and not its output.)
    """
    layout = Layout(1, 4, frozenset({"tensor"}))
    found = [sums(compiled(policy, 2, layout).as_text()) for policy in (StoreAll(), Checkpoint(), Reverse())]
    assert found == [2 + 4, 2 + 4, 2 + 4 + 2]


outcomes, test_on_eight_devices = CASES.tests(__file__)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    assert len(jax.devices()) == 8
    CASES.run_each(0, 1)
