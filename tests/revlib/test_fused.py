"""``fused_optimizer``: the same weights as without, bit for bit, and one block's gradients at a time."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore_torch as revlib
from revcore import InversionError, SpecError
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll
from revcore_torch.memory import LiveBytes
from tests.revlib.comparison import DEPTH, WIDTH, block, bytes_of, make_input

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 3) -> list[Tensor]:
    torch.manual_seed(3)
    for _ in range(steps):
        model(make_input()).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    return [p.detach() for p in model.parameters()]


def assert_fused_like_unfused(blocks: list[nn.Module], make: Any = SGD, **options: Any) -> ReversibleSequential:
    plain = ReversibleSequential(*copy.deepcopy(blocks), **options)
    fused = ReversibleSequential(*blocks, fused_optimizer=make, **options)
    expected = train(plain, [make(plain.parameters())])
    for got, want in zip(train(fused, []), expected, strict=True):
        assert torch.equal(got, want)
    return fused


@pytest.mark.parametrize("policy", [Reverse(), StoreAll(), Checkpoint(2), Reverse(keep_last=2)], ids=str)
def test_same_bits_as_without(policy: Any) -> None:
    assert_fused_like_unfused([block(0.4) for _ in range(DEPTH)], policy=policy)


def test_adam_and_its_states() -> None:
    fused = assert_fused_like_unfused(
        [block() for _ in range(3)], functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    )
    assert fused.revlib is not None
    assert [len(optimizer.state) for optimizer in fused.revlib.optimizers] == [4, 4, 4]


def test_blocks_that_share_parameters_step_once() -> None:
    shared = block()
    fused = assert_fused_like_unfused([shared, block(), shared, block()])
    assert fused.revlib is not None
    assert len(fused.revlib.optimizers) == 3
    first, second = block(), block()
    second[3] = first[0]  # type: ignore[operator, index]
    fused = assert_fused_like_unfused([first, block(), second])
    assert fused.revlib is not None
    assert len(fused.revlib.optimizers) == 2


def test_parameters_shared_with_the_model_around_it() -> None:
    class Around(nn.Module):
        def __init__(self, blocks: list[nn.Module], **options: Any) -> None:
            super().__init__()
            self.net = ReversibleSequential(*blocks, **options)

        def forward(self, x: Tensor) -> Tensor:
            first: Any = self.net[0]
            tied = first[0]
            y0, y1 = self.net(torch.cat((tied(x[:, :WIDTH]), x[:, WIDTH:]), 1)).chunk(2, 1)
            return tied(y0) + y1

    blocks = [block() for _ in range(3)]
    plain, fused = Around(copy.deepcopy(blocks)), Around(blocks, fused_optimizer=SGD)
    expected = train(plain, [SGD(plain.parameters())])
    assert all(map(torch.equal, train(fused, []), expected))


def test_frozen_and_unused_parameters() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = block(), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    blocks: list[nn.Module] = [Unused() for _ in range(3)]
    for p in blocks[1].parameters():
        p.requires_grad_(False)
    before = [p.clone() for p in blocks[1].parameters()]
    fused = assert_fused_like_unfused(blocks)
    assert all(map(torch.equal, blocks[1].parameters(), before))
    fused.requires_grad_(True)
    fused(make_input()).sum().backward()
    assert not any(map(torch.equal, blocks[1].used.parameters(), before))  # type: ignore[operator, union-attr]


def watching(blocks: list[nn.Module], seen: list[list[int]]) -> Any:
    """A maker of optimizers that note, at each step, which blocks have gradients."""

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.append([i for i, block in enumerate(blocks) if any(p.grad is not None for p in block.parameters())])
            return super().step(closure)

    return functools.partial(Watching, lr=0.1)


def test_one_blocks_gradients_live_at_a_time() -> None:
    blocks, seen = [block() for _ in range(DEPTH)], []
    model = ReversibleSequential(*blocks, fused_optimizer=watching(blocks, seen))
    model(make_input()).sum().backward()
    assert seen == [[i] for i in reversed(range(DEPTH))]

    def peak(depth: int, fused: bool) -> int:
        model = ReversibleSequential(*[block() for _ in range(depth)], fused_optimizer=SGD if fused else None)
        with LiveBytes() as memory:
            model(make_input()).sum().backward()
        return memory.peak

    assert peak(6, True) == peak(14, True)
    assert peak(14, False) - peak(6, False) == 8 * bytes_of(block())


def test_the_count_above_would_see_gradients_that_stay() -> None:
    blocks, seen = [block() for _ in range(DEPTH)], []
    model = ReversibleSequential(*blocks)
    optimizer = watching(blocks, seen)(model.parameters())
    model(make_input()).sum().backward()
    optimizer.step()
    assert seen == [[*range(DEPTH)]]


def test_two_uses_in_one_pass_step_once() -> None:
    blocks = [block() for _ in range(3)]
    plain, fused = (
        ReversibleSequential(*copy.deepcopy(blocks)),
        ReversibleSequential(*blocks, fused_optimizer=SGD),
    )
    x, y = make_input(), make_input()
    for model in (plain, fused):
        (model(x).sum() + model(y).pow(2).sum()).backward()
    SGD(plain.parameters()).step()
    for got, want in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_a_second_pass_over_changed_weights_is_refused() -> None:
    model = ReversibleSequential(*[block() for _ in range(3)], fused_optimizer=SGD)
    loss = model(make_input()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(InversionError, match="changed in place after the forward pass"):
        loss.backward()


def test_autograd_grad_steps_nothing() -> None:
    model = ReversibleSequential(*[block() for _ in range(3)], fused_optimizer=SGD)
    before = [p.clone() for p in model.parameters()]
    torch.autograd.grad(model(make_input()).sum(), [*model.parameters()])
    assert all(map(torch.equal, model.parameters(), before))


def test_a_failed_pass_leaves_nothing_waiting() -> None:
    model = ReversibleSequential(*[block() for _ in range(3)], fused_optimizer=SGD)
    expected = copy.deepcopy(model)
    middle: Any = model[1]

    def fail(_: Tensor) -> None:
        raise ValueError("on purpose")

    handle = middle[0].weight.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        model(make_input()).sum().backward()
    handle.remove()
    model.load_state_dict(expected.state_dict())
    model.zero_grad()
    torch.manual_seed(1)
    model(make_input()).sum().backward()
    torch.manual_seed(1)
    expected(make_input()).sum().backward()
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def test_a_copy_steps_its_own_parameters() -> None:
    model = ReversibleSequential(*[block() for _ in range(3)], fused_optimizer=SGD)
    model(make_input()).sum().backward()
    before = [p.clone() for p in model.parameters()]
    twin = copy.deepcopy(model)
    twin(make_input()).sum().backward()
    assert all(map(torch.equal, model.parameters(), before))
    assert not any(map(torch.equal, twin.parameters(), before))
    assert all(p.grad is None for p in twin.parameters())


def test_other_parameters_than_it_was_made_for_are_refused() -> None:
    model = ReversibleSequential(block(), block(), fused_optimizer=SGD)
    model.append(block())
    with pytest.raises(SpecError, match="the blocks have other parameters than fused_optimizer was given"):
        model(make_input())


def test_a_part_of_a_network_and_a_module_by_itself_step_too() -> None:
    model = ReversibleSequential(*[block() for _ in range(4)], fused_optimizer=SGD)
    model(make_input())
    before = [p.clone() for p in model.parameters()]
    model[:2](make_input()).sum().backward()
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert changed == [True] * 8 + [False] * 8
    module = revlib.ReversibleModule(block(), fused_optimizer=SGD)
    before = [p.clone() for p in module.parameters()]
    x0, x1 = make_input().chunk(2, 1)
    streams = revlib.replace_grad(*module((x0, x1, torch.zeros_like(x0), torch.zeros_like(x0))))
    torch.cat(streams, 1).sum().backward()
    assert not any(map(torch.equal, module.parameters(), before))
