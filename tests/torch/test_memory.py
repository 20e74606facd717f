"""The byte counter: known counts, and what it says of the engine's policies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from revcore import Checkpoint, Reverse, StoreAll
from revcore.policy import Policy
from revcore_torch import ReversibleSequential
from revcore_torch.memory import LiveBytes

N = 1000
BYTES = 4 * N


def test_counts_what_lives_and_the_most_that_lived() -> None:
    with LiveBytes() as memory:
        a = torch.ones(N)
        b = a * 2
        del a
        c = b + 1
        assert (memory.live, memory.peak) == (2 * BYTES, 2 * BYTES)
        del b, c
    assert (memory.live, memory.peak) == (0, 2 * BYTES)


def test_views_and_in_place_operations_count_once() -> None:
    with LiveBytes() as memory:
        a = torch.ones(N)
        views = a.view(10, -1), a[:10], a.detach()
        a.add_(1).mul_(2)
        assert memory.live == memory.peak == BYTES
        del a
        assert memory.live == BYTES  # a view keeps its storage
        del views
    assert memory.live == 0


def test_tensors_made_before_count_neither_way() -> None:
    before = torch.ones(N)
    with LiveBytes() as memory:
        before.add_(1)
        view = before[:5]
        assert memory.live == 0
        del before, view
        assert memory.live == 0


def test_freed_after_the_block_still_counts_down() -> None:
    with LiveBytes() as memory:
        a = torch.ones(N)
    assert memory.live == BYTES
    del a
    assert memory.live == 0


def test_counts_what_autograd_saves() -> None:
    x = torch.ones(N, requires_grad=True)
    with LiveBytes() as memory:
        y = x.sin().sin().sin()  # each sine keeps its input: x, made before, and two more; y is the third
        assert memory.live == 3 * BYTES
        y.sum().backward()
    del y
    assert memory.live == BYTES  # x.grad


def test_sees_what_autograd_frees_on_its_way() -> None:
    x = torch.ones(N, requires_grad=True)
    seen: list[int] = []
    with LiveBytes() as memory:
        y = x
        for _ in range(8):
            y = y.sin()
            y.register_hook(lambda _: seen.append(memory.live))
        loss = y.sum()
        del y
        loss.backward()
    assert seen == sorted(seen, reverse=True)
    assert seen[0] - seen[-1] >= 6 * BYTES  # each sine's input, freed by the engine as soon as it was used


class Hoarder(nn.Module):
    """A block that keeps what it computed."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(x.detach())
        return torch.tanh(x)


def peak(depth: int, policy: Policy, block: Callable[[], nn.Module]) -> int:
    model = ReversibleSequential(*[block() for _ in range(depth)], policy=policy)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(64, 16, requires_grad=True)
    x.grad = torch.zeros_like(x)
    with LiveBytes() as memory:
        model(x).sum().backward()
    return memory.peak


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))


def test_reversible_peak_is_equal_at_every_depth() -> None:
    peaks = {depth: peak(depth, Reverse(), mlp) for depth in (4, 16, 64)}
    assert len(set(peaks.values())) == 1, peaks


def test_a_loss_on_an_activation_of_the_first_block_takes_as_much_at_every_depth() -> None:
    def peak_of_the_first(depth: int) -> int:
        model = ReversibleSequential(*[mlp() for _ in range(depth)])
        caught: list[Tensor] = []
        model[0][1].register_forward_hook(lambda _, __, out: caught.append(out))
        with LiveBytes() as memory:
            y = model(torch.randn(64, 16))
            caught[0].sum().backward()
            del y
        return memory.peak

    assert peak_of_the_first(4) == peak_of_the_first(16)


@pytest.mark.parametrize("policy", [StoreAll(), Checkpoint()], ids=repr)
def test_other_policies_grow_with_depth(policy: Policy) -> None:
    peaks = [peak(depth, policy, mlp) for depth in (4, 8, 12, 16)]
    growth = {after - before for before, after in pairwise(peaks)}
    # Four steps keep at least the four streams that they made, 64 × 8 numbers each.
    assert len(growth) == 1, peaks
    assert growth.pop() >= 4 * 64 * 8 * 4


def test_the_counter_sees_a_block_that_hoards() -> None:
    """The test of equal peaks can fail."""
    assert peak(16, Reverse(), Hoarder) >= peak(4, Reverse(), Hoarder) + 12 * 64 * 8 * 4
