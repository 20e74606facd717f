"""``memory_mode`` and ``target_device`` of ``ReversibleSequential``, and which arguments it refuses."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore_torch as revlib
from revcore import SpecError
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll
from revcore_torch.memory import LiveBytes
from revcore_torch.revlib import offload
from tests.plain.pytorch import Plain
from tests.revlib.comparison import (
    DEPTH,
    WIDTH,
    assert_like_plain,
    block,
    bytes_of,
    make_input,
    outcome,
)

MODES = revlib.MemoryModes
SGD = functools.partial(torch.optim.SGD, lr=0.1)


# --- memory_mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "policy"),
    [
        (MODES.no_savings, StoreAll()),
        (MODES.checkpoint, Checkpoint()),
        (MODES.autograd_graph, Reverse()),
        (MODES.autograd_function, Reverse()),
        (3, Reverse()),
        (None, Reverse()),
    ],
)
def test_memory_mode_is_a_policy(mode: Any, policy: Any) -> None:
    model = ReversibleSequential(*[block(0.3) for _ in range(DEPTH)], memory_mode=mode)
    assert model.policy == policy
    assert_like_plain(model, Plain(*copy.deepcopy([*model])), make_input(), DEPTH)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"memory_mode": 7}, "memory_mode came as 7, expected one of"),
        ({"memory_mode": MODES.checkpoint, "policy": Reverse()}, "either policy or memory_mode"),
        ({"memory_modes": 1}, "'memory_modes'. Those of revlib are memory_mode, target_device, fused_optimizer"),
        ({"target_device": "gpu"}, "target_device came as 'gpu', expected a device such as 'cuda'"),
        ({"fused_optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, "expected a function of parameters"),
        ({"fused_optimizer": list}, "returned list, expected a torch optimizer"),
        ({"coupling_forward": [None, torch.add], "coupling_inverse": [None, torch.add]}, "is x = "),
        ({"coupling_forward": [None, torch.add], "coupling_inverse": [None, None]}, "inverse came as None"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ReversibleSequential(block(), block(), **arguments)


def test_module_with_options_of_its_own_is_refused_in_a_sequential() -> None:
    for options in ({"target_device": "cpu"}, {"fused_optimizer": SGD}, {"memory_savings": False}):
        with pytest.raises(SpecError, match="block 1 is a ReversibleModule with"):
            ReversibleSequential(block(), revlib.ReversibleModule(block(), **options))
    with pytest.raises(SpecError, match="give the blocks themselves"):
        ReversibleSequential(revlib.ReversibleModule(block()), program=ReversibleSequential(block()).program)


def test_none_in_a_list_is_the_additive_coupling() -> None:
    model = ReversibleSequential(
        *[block() for _ in range(4)],
        coupling_forward=[None, lambda x, f: 0.5 * x + f],
        coupling_inverse=[None, lambda y, f: (y - f) / 0.5],
    )
    plain = Plain(*copy.deepcopy([*model]), update=(torch.add, lambda x, f: 0.5 * x + f))
    assert_like_plain(model, plain, make_input(), 4)


# --- target_device ----------------------------------------------------------------------------------------------------


class Moves:
    """Stands for another device: each tensor that is moved there is copied, and counted."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.count += 1
        return tensor.clone()


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Moves:
    moves = Moves()
    monkeypatch.setattr(offload, "_move", moves)
    return moves


class Counts(nn.Module):
    """Has a buffer that its call changes, and one that is constant."""

    calls: Tensor
    one: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("one", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.one + self.calls


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x[None])[0][0]


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.Tanh()).double()


def twice() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH).double()
    return nn.Sequential(layer, nn.Tanh(), layer)


@pytest.mark.parametrize("policy", [Reverse(), StoreAll(), Checkpoint(2), Reverse(anchor_every=2)], ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda: block(0.4), normed, twice, Counts, lambda: Recurrent().double()],
    ids=["dropout", "batch norm", "one layer twice", "buffers", "recurrent"],
)
def test_offloaded_network_equals_the_plain_one(make: Any, policy: Any, moves: Moves) -> None:
    model = ReversibleSequential(*[make() for _ in range(3)], target_device="cpu", policy=policy)
    plain = Plain(*copy.deepcopy([*model]))
    before = {name: id(p) for name, p in (*model.named_parameters(), *model.named_buffers())}
    assert_like_plain(model, plain, make_input(), 3, limit=64)
    assert before == {name: id(p) for name, p in (*model.named_parameters(), *model.named_buffers())}
    assert all(type(p) is nn.Parameter and p.is_leaf for p in model.parameters())
    assert moves.count > 0


def test_parameters_are_moved_for_each_run_and_gone_after_it(moves: Moves) -> None:
    def memory(depth: int) -> tuple[int, int, int]:
        model = ReversibleSequential(*[block() for _ in range(depth)], target_device="cpu")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        x = make_input().requires_grad_()
        moves.count = 0
        with LiveBytes() as memory:
            y = model(x)
            assert moves.count == 4 * depth
            held = memory.live
            y.sum().backward()
        assert moves.count == 2 * 4 * depth
        return held, memory.peak, bytes_of(model[0])

    held, peak, of_a_block = memory(3)
    assert held == 2 * (2 * 3 * WIDTH * 8)  # the output and the streams
    assert memory(12) == (held, peak, of_a_block)
    assert of_a_block < peak < held + 4 * of_a_block


def test_what_is_on_the_device_already_is_not_copied() -> None:
    model = ReversibleSequential(*[block() for _ in range(3)], target_device="cpu")
    x = make_input()
    plain = ReversibleSequential(*copy.deepcopy([*model]))
    with LiveBytes() as memory:
        model(x)
    peak = memory.peak
    with LiveBytes() as memory:
        plain(x)
    assert peak == memory.peak


def test_another_device_really() -> None:
    """The meta device has no data, but it is another one; its gradients cannot come back."""
    model = ReversibleSequential(*[block() for _ in range(3)], target_device="meta")
    y = model(torch.empty(3, 2 * WIDTH, device="meta", dtype=torch.float64))
    assert (y.device.type, {p.device.type for p in model.parameters()}) == ("meta", {"cpu"})
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        y.sum().backward()


def test_a_part_and_the_inverse_run_on_the_device_too(moves: Moves) -> None:
    model = ReversibleSequential(*[block() for _ in range(4)], target_device="cpu")
    x = make_input()
    torch.testing.assert_close(model.inverse(model(x)), x)
    torch.testing.assert_close(model[2:](model[:2](x)), model(x))
    moves.count = 0
    model[:2](x)
    assert moves.count == 2 * 4


def test_parameters_are_put_back_when_a_block_fails(moves: Moves) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("on purpose")

    model = ReversibleSequential(block(), Fails(), target_device="cpu")
    with pytest.raises(ValueError, match="on purpose"):
        model(make_input())
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_replaced_buffers_are_refused(moves: Moves) -> None:
    class Replaces(Counts):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return x

    with pytest.raises(SpecError, match="replaced its buffer or parameter calls"):
        ReversibleSequential(Replaces(), target_device="cpu")(make_input())


def test_module_by_itself_is_offloaded(moves: Moves) -> None:
    module = revlib.ReversibleModule(block(), target_device="cpu")
    x0, x1 = make_input().chunk(2, 1)
    y = torch.cat(revlib.replace_grad(*module((x0, x1, torch.zeros_like(x0), torch.zeros_like(x0)))), 1)
    y.sum().backward()
    assert moves.count == 8
    assert all(p.grad is not None for p in module.parameters())


# --- together ---------------------------------------------------------------------------------------------------------


def test_offloaded_blocks_step_in_the_backward_pass(moves: Moves) -> None:
    plain = ReversibleSequential(*[block(0.4) for _ in range(DEPTH)])
    both = ReversibleSequential(*copy.deepcopy([*plain]), target_device="cpu", fused_optimizer=SGD)
    for model in (plain, both):
        outcome(model, make_input().fill_(0.5))
    SGD(plain.parameters()).step()
    assert all(map(torch.equal, both.parameters(), plain.parameters()))
    assert all(p.grad is None for p in both.parameters())


def test_compiled(moves: Moves) -> None:
    def parameters(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = ReversibleSequential(*[block() for _ in range(3)], target_device="cpu", fused_optimizer=SGD)
        call: Any = torch.compile(model, backend="eager") if compiled else model
        call(make_input()).sum().backward()
        return [*model.parameters()]

    for got, expected in zip(parameters(True), parameters(False), strict=True):
        assert torch.equal(got, expected)


def test_options_do_not_change_a_value() -> None:
    x = make_input()
    model = ReversibleSequential(*[block(0.3) for _ in range(3)])
    other = ReversibleSequential(*copy.deepcopy([*model]), target_device="cpu", memory_mode=2)
    for a, b in zip(outcome(model, x), outcome(other, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
