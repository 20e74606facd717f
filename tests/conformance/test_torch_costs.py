"""What a training step costs in torch, counted exactly: bytes, calls of blocks, random states, updates of statistics.

The bytes are those of storages that were made in the forward pass and live on after it, as a dispatch mode sees them:
the counter knows nothing of the engine.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revcore import (
    Additive,
    Affine,
    Checkpoint,
    Momentum,
    Policy,
    Program,
    Repeat,
    Reverse,
    StoreAll,
    momentum_net,
    revnet,
)
from revcore.step import Couple
from revcore_torch import ReversibleSequential, is_recomputing, reversible
from revcore_torch.memory import LiveBytes

SHAPE = (4, 8)
STREAM = 4 * 8 * 4  # bytes of float32
POLICIES = [Reverse(), Reverse(anchor_every=2), Reverse(keep_last=1), StoreAll(), Checkpoint(1), Checkpoint(3)]


class Block(nn.Module):
    """A block that keeps nothing itself, and counts."""

    def __init__(self, outputs: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.outputs, self.dropout, self.calls, self.again = outputs, dropout, 0, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.again += is_recomputing()
        f = torch.tanh(self.linear(x))
        if self.dropout:
            f = nn.functional.dropout(f, self.dropout)
        return f if self.outputs == 1 else (0.1 * f, f)


def streams(n: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(SHAPE, requires_grad=True) for _ in range(n))


def total(outputs: Any) -> Tensor:
    return torch.stack([y.sum() for y in outputs]).sum()


def saved_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the bytes that live after ``run`` and did not before, and its result."""
    with LiveBytes() as memory:
        result = run()
        return memory.live, result


# --- bytes ------------------------------------------------------------------------------------------------------------

# a program of some depth, its streams, and how many of them it changes
PROGRAMS: dict[str, tuple[Callable[[int], Program], int, int]] = {
    "additive": (lambda depth: revnet(depth), 2, 2),
    "momentum": (lambda depth: revnet(depth, Momentum(0.9)), 2, 2),
    "affine": (lambda depth: revnet(depth, Affine()), 2, 2),
    "three streams": (lambda depth: revnet(depth, Additive(0.5), num_streams=3), 3, 3),
    "momentum net": (lambda depth: momentum_net(depth), 2, 2),
    "repeat": (lambda depth: Program([Repeat(Couple(0, 1), depth)]), 2, 1),
}


def bytes_after_forward(program: Program, policy: Policy, dropout: float = 0.0) -> int:
    outputs = [step.coupling.num_outputs for step in program.unrolled if isinstance(step, Couple) and step.block]
    blocks = [Block(n, dropout) for n in outputs]
    given = streams(program.num_streams)
    live, result = saved_bytes(lambda: reversible(program, blocks, given, policy=policy))
    total(result).backward()
    assert all(block.linear.weight.grad is not None for block in blocks[-1:])
    return live


@pytest.mark.parametrize(("make", "n", "changed"), PROGRAMS.values(), ids=PROGRAMS)
# momentum at depth 128 and more drifts in float32, rightly warned of; bytes are counted here, not values
@pytest.mark.filterwarnings("ignore::revcore.DriftWarning")
def test_saved_bytes_are_equal_at_every_depth(make: Callable[[int], Program], n: int, changed: int) -> None:
    """The output streams, which the caller holds anyway, and nothing else."""
    measured = [bytes_after_forward(make(depth), Reverse()) for depth in (max(2, n), 8, 32, 128)]
    assert measured == [measured[0]] * 4
    assert measured[0] == changed * STREAM


def test_saved_bytes_with_dropout_are_equal_too() -> None:
    """Random states are no tensors: bytes of their own, checked below."""
    measured = [bytes_after_forward(revnet(depth), Reverse(), dropout=0.5) for depth in (2, 8, 32, 128)]
    assert measured == [measured[0]] * 4


def test_the_counter_sees_what_the_others_keep() -> None:
    for policy in (StoreAll(), Checkpoint(1), Reverse(anchor_every=1)):
        small, large = (bytes_after_forward(revnet(depth), policy) for depth in (8, 32))
        assert large >= small + 24 * STREAM
    assert bytes_after_forward(revnet(8), Reverse(keep_last=4)) > bytes_after_forward(revnet(8), Reverse())


def test_nothing_is_left_after_the_backward_pass() -> None:
    blocks, given = [Block() for _ in range(8)], streams(2)

    def step() -> None:
        y = reversible(revnet(8), blocks, given)
        (y[0] * y[1]).sum().backward()

    step()
    live, _ = saved_bytes(step)
    assert live == 0, "gradients are there already, and all else is gone without a collection of cycles"


# --- calls ------------------------------------------------------------------------------------------------------------


def counts(policy: Policy, train: bool, depth: int = 9) -> list[tuple[int, int]]:
    blocks = [Block() for _ in range(depth)]
    with torch.set_grad_enabled(train):
        y = reversible(revnet(depth), blocks, streams(2), policy=policy)
    if train:
        total(y).backward()
    return [(block.calls, block.again) for block in blocks]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_calls_of_each_block(policy: Policy) -> None:
    once = 9 if isinstance(policy, StoreAll) else getattr(policy, "keep_last", 0)
    assert counts(policy, train=True) == [(2, 1)] * (9 - once) + [(1, 0)] * once
    assert counts(policy, train=False) == [(1, 0)] * 9


@pytest.mark.parametrize("which", [0, 1])
def test_calls_where_one_output_is_used_alone(which: int) -> None:
    blocks = [Block() for _ in range(8)]
    reversible(revnet(8), blocks, streams(2))[which].sum().backward()
    used = 7 if which == 0 else 8  # the last step makes the second output
    assert [block.calls for block in blocks][:used] == [2] * used


# --- random states ----------------------------------------------------------------------------------------------------


def kept_states(dropout: float, depth: int = 8) -> int:
    """How many objects of a random state's size live on after the forward pass, as the allocator sees it."""
    size = torch.get_rng_state().numel()
    blocks, given = [Block(dropout=dropout) for _ in range(depth)], streams(2)
    tracemalloc.start()
    try:
        result = reversible(revnet(depth), blocks, given)
        traces = tracemalloc.take_snapshot().traces
        return len([trace for trace in traces if size <= trace.size <= size + 64]) if result else 0
    finally:
        tracemalloc.stop()


def test_a_random_state_is_kept_for_each_block_that_draws_and_none_for_others() -> None:
    assert kept_states(dropout=0.0) == 0
    # each block's, and the one that the last block ended with: the second run must end there, too
    assert kept_states(dropout=0.5) == 8 + 1


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_step_moves_the_generator_as_if_everything_were_stored(policy: Policy) -> None:
    blocks, given = [Block(dropout=0.5) for _ in range(5)], streams(2)

    def after(policy: Policy) -> tuple[list[float], list[float]]:
        torch.manual_seed(1)
        y = reversible(revnet(5), blocks, given, policy=policy)
        between = torch.get_rng_state().tolist()
        total(y).backward()
        assert torch.get_rng_state().tolist() == between, "the backward pass draws nothing"
        return between, torch.rand(3).tolist()

    assert after(policy) == after(StoreAll())


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_batch_statistics_move_once(policy: Policy) -> None:
    def model() -> ReversibleSequential:
        torch.manual_seed(0)
        return ReversibleSequential(
            *[nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(4)], policy=policy
        )

    x = torch.randn(16, 16)
    trained, watched = model(), model()
    for step in (1, 2):
        trained(x).square().sum().backward()
        watched.policy = StoreAll()
        watched(x)
        for (name, got), (_, expected) in zip(trained.named_buffers(), watched.named_buffers(), strict=True):
            assert torch.equal(got, expected), name
            assert torch.equal(got, torch.tensor(step)) or not name.endswith("num_batches_tracked"), name
    untouched = dict(model().named_buffers())
    assert not any(torch.equal(buffer, untouched[name]) for name, buffer in trained.named_buffers())
