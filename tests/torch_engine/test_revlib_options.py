"""``memory_mode``, ``target_device`` and ``fused_optimizer`` of ``ReversibleSequential``."""

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
from revcore_torch.revlib import offload
from tests.torch_engine.plain_revnet import PlainRevNet, assert_like_plain, outcome

WIDTH, DEPTH = 4, 5
MODES = revlib.MemoryModes
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def block(p: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(p), nn.Linear(WIDTH, WIDTH)).double()


def make_input() -> Tensor:
    return torch.randn(3, 2 * WIDTH, dtype=torch.float64)


def bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


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
    assert_like_plain(model, PlainRevNet(copy.deepcopy([*model])), make_input(), DEPTH)


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
    plain = PlainRevNet(copy.deepcopy([*model]), torch.add, lambda x, f: 0.5 * x + f)
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
    plain = PlainRevNet(copy.deepcopy([*model]))
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


# --- fused_optimizer --------------------------------------------------------------------------------------------------


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


def test_both_at_once(moves: Moves) -> None:
    assert_fused_like_unfused([block(0.4) for _ in range(DEPTH)], target_device="cpu")


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
