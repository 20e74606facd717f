"""revlib's modules one by one: chains of ``ReversibleModule``, the slots between them, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore_torch as revlib
from revcore import InversionError, SpecError
from revcore_torch.core import MergeCalls, ReversibleWrapper, SingleBranchReversibleModule, take_0th_tensor
from revcore_torch.memory import LiveBytes
from revcore_torch.utils import module_list_to_momentum_net
from tests.helpers import assert_close
from tests.plain.pytorch import Plain
from tests.revlib.comparison import (
    DEPTH,
    WIDTH,
    assert_like_plain,
    block,
    damped,
    make_input,
    undamped,
)


class Chain(nn.Module):
    """Modules called by hand, as revlib's own ``ReversibleSequential`` did."""

    def __init__(self, modules: list[nn.Module], in_between: Any = None) -> None:
        super().__init__()
        self.stem = nn.ModuleList(modules)
        self.in_between = in_between or (lambda streams: streams)

    def forward(self, x: Tensor) -> Tensor:
        x0, x1 = x.chunk(2, 1)
        streams: Any = (x0, x1, torch.zeros_like(x0), torch.zeros_like(x1))
        for module in self.stem:
            streams = self.in_between(module(streams))
        return torch.cat(revlib.replace_grad(*streams), 1)


def chain(depth: int = DEPTH, make: Any = block, *coupling: Any) -> Chain:
    return Chain([revlib.ReversibleModule(make(), *coupling) for _ in range(depth)])


def blocks_of(model: Chain) -> list[Any]:
    modules: Any = model.stem
    return copy.deepcopy([module.wrapped_module.wrapped_module for module in modules])


# --- chains -----------------------------------------------------------------------------------------------------------


def test_chain_equals_the_plain_network() -> None:
    model = chain(DEPTH, lambda: block(0.4))
    assert_like_plain(model, Plain(*blocks_of(model)), make_input(), DEPTH)


def test_chain_with_a_coupling_that_is_not_additive() -> None:
    model = chain(DEPTH, block, damped, undamped)
    assert_like_plain(model, Plain(*blocks_of(model), update=damped), make_input(), DEPTH)


def test_chain_with_batch_norm_moves_statistics_once() -> None:
    def make() -> nn.Module:  # a bias before BatchNorm has no gradient but rounding
        return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.Tanh()).double()

    model = chain(DEPTH, make)
    assert_like_plain(model, Plain(*blocks_of(model)), make_input(), DEPTH, limit=64)


def test_chain_keeps_two_streams_at_any_depth() -> None:
    def memory(depth: int) -> tuple[int, int]:
        model = chain(depth)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        x = make_input().requires_grad_()
        with LiveBytes() as memory:
            y = model(x)
            held = memory.live
            y.sum().backward()
        return held, memory.peak

    stream = 3 * WIDTH * 8
    held, peak = memory(4)
    assert held == 2 * stream + 2 * stream  # the output, and the streams that it is made of; of slots, nothing
    assert memory(32) == (held, peak)


def test_single_branch_keeps_two_streams_at_any_depth() -> None:
    def memory(depth: int) -> tuple[int, int]:
        layers = module_list_to_momentum_net(nn.ModuleList([block() for _ in range(depth)]), beta=0.5)
        for p in layers.parameters():
            p.grad = torch.zeros_like(p)
        y = make_input()[:, :WIDTH].requires_grad_()
        with LiveBytes() as memory:
            for layer in layers:
                y = layer(y)
            held = memory.live
            y.sum().backward()
        return held, memory.peak

    assert memory(4) == memory(24)


def test_autograd_grad_and_frozen_parameters() -> None:
    model = chain()
    plain = Plain(*blocks_of(model))
    for net in (model, plain):
        for i, p in enumerate(net.parameters()):
            p.requires_grad_(i not in (0, 1, 2, 3, 9))
    x = make_input()  # has no gradient
    found, expected = (
        torch.autograd.grad(net(x).pow(2).sum(), [p for p in net.parameters() if p.requires_grad])
        for net in (model, plain)
    )
    assert_close([*found], [*expected], depth=DEPTH)


def test_second_derivatives_and_retained_graphs() -> None:
    model = chain(3)
    plain = Plain(*blocks_of(model))
    x = make_input().requires_grad_()

    def twice(net: nn.Module) -> Any:
        y = net(x).pow(2).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        first = torch.autograd.grad(g.pow(2).sum(), [x, *net.parameters()], retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(y, [x, *net.parameters()])
        return [t for t in (*first, *again) if t is not None]

    assert_close(twice(model), twice(plain), depth=9)


def test_chain_with_other_things_in_between() -> None:
    """A clone of the slots hides the link between the modules, and costs memory only."""
    model = chain()
    model.in_between = lambda streams: tuple(t.clone() for t in streams)
    assert_like_plain(model, Plain(*blocks_of(model)), make_input(), DEPTH)


def test_without_gradients_and_under_functional_transforms() -> None:
    model = chain()
    plain, x = Plain(*blocks_of(model)), make_input()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    found, expected = (torch.func.grad(lambda x, net=net: net(x).pow(2).sum())(x) for net in (model, plain))
    assert_close(found, expected, depth=DEPTH)


def test_modules_in_a_sequential_bring_their_couplings() -> None:
    blocks = [block() for _ in range(4)]
    model = revlib.ReversibleSequential(
        blocks[0], revlib.ReversibleModule(blocks[1], damped, undamped), revlib.ReversibleModule(blocks[2]), blocks[3]
    )
    updates = torch.add, damped, torch.add, torch.add
    assert_like_plain(model, Plain(*copy.deepcopy(blocks), update=updates), make_input(), 4)
    assert [*model] == blocks


def test_memory_savings_and_cache_take_two_streams() -> None:
    x = make_input()
    one = block()
    expected = Plain(one)(x)
    cache = revlib.ReversibleModuleCache()
    for module in (revlib.ReversibleModule(one, memory_savings=False), revlib.ReversibleModule(one, cache=cache)):
        assert torch.equal(torch.cat(module(x.chunk(2, 1)), 1), expected)
    assert torch.equal(torch.cat((cache.x0, cache.x1), 1), expected)
    assert not cache.x1.requires_grad


def test_extra_outputs() -> None:
    class WithExtra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH).double()

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.linear(x), 2 * x]

    blocks = [WithExtra() for _ in range(2)]
    x = make_input().requires_grad_()
    y, aux = revlib.ReversibleSequential(*blocks)(x)
    x0, x1 = x.chunk(2, 1)
    middle = x0 + blocks[0].linear(x1)
    expected = torch.cat((middle, x1 + blocks[1].linear(middle)), 1)
    assert torch.equal(y, expected)
    assert torch.equal(aux[1][0], 2 * middle)
    found = torch.autograd.grad(y.sum() + aux[1][0].pow(2).sum(), x)
    assert_close([*found], [*torch.autograd.grad(expected.sum() + (2 * middle).pow(2).sum(), x)])
    # and by itself, as revlib's modules hand them out
    zeros = torch.zeros_like(x0)
    out = revlib.ReversibleModule(blocks[0])((x0, x1, zeros, zeros))
    assert torch.equal(take_0th_tensor(out[1]), middle)
    assert torch.equal(out[1][1], 2 * x1)


def test_reverse_and_swap_of_both_versions() -> None:
    one, x = block(), make_input()
    x0, x1 = x.chunk(2, 1)
    zeros = torch.zeros_like(x0)
    expected = Plain(one)(x)
    a, _, b, _ = revlib.reverse_and_swap(
        x0, zeros, x1, zeros, one, revlib.additive_coupling_forward, revlib.momentum_coupling_inverse
    )
    assert torch.equal(torch.cat((a, b), 1), expected)
    a, b, *slots, extra = revlib.reverse_and_swap(x0, x1, zeros, zeros, ReversibleWrapper(one), "", False, None, (), {})
    assert torch.equal(torch.cat((a, b), 1), expected)
    assert extra is None
    torch.cat(revlib.replace_grad(a, b, *slots), 1).sum().backward()
    gradient = one[0].weight.grad.clone()  # type: ignore[index]
    one.zero_grad()
    expected.sum().backward()
    assert_close(gradient, one[0].weight.grad)  # type: ignore[index]


def test_merge_calls_and_pickle() -> None:
    layers = module_list_to_momentum_net(nn.ModuleList([block() for _ in range(3)]), beta=0.5)
    assert [type(layer) for layer in layers] == [MergeCalls, MergeCalls, SingleBranchReversibleModule]
    x = make_input()[:, :WIDTH]
    y, z = x, x
    for layer, other in zip(layers, pickle.loads(pickle.dumps(layers)), strict=True):
        y, z = layer(y), other(z)
    assert torch.equal(y, z)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_slots_that_do_not_come_back_are_refused() -> None:
    model = chain()
    x0, x1 = make_input().chunk(2, 1)
    streams: Any = (x0, x1, torch.zeros_like(x0), torch.zeros_like(x0))
    for module in model.stem:
        streams = module(streams)
    with pytest.raises(InversionError, match=r"y0, y1 = replace_grad\(\*last"):
        (streams[0] + streams[1]).sum().backward()


def test_one_modules_output_goes_to_one_module() -> None:
    first, second = (revlib.ReversibleModule(block()) for _ in range(2))
    x0, x1 = make_input().chunk(2, 1)
    streams = first((x0, x1, torch.zeros_like(x0), torch.zeros_like(x0)))
    kept = second(streams)
    with pytest.raises(SpecError, match="was handed to two"):
        second(streams)
    del kept
    second(streams)  # the other way was given up


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: m((x, x)), r"2 tensors came, expected \(x0, x1, slot0, slot1\)"),
        (lambda m, x: m((x, x, torch.zeros(1), torch.zeros(1))), "begin with torch.zeros_like"),
        (lambda m, x: revlib.ReversibleModule(m, memory_savings=False)((x, x, x, x)), r"expected \(x0, x1\)"),
        (lambda m, x: revlib.ReversibleModule(block(), damped), "coupling_forward|inverse came as None"),
        (lambda m, x: revlib.ReversibleModule(block(), damped, damped), r"inverse is x = \(y - 1·f\) / 0.9"),
        (lambda m, x: revlib.reverse_and_swap(x, x), "expected 10"),
        (
            lambda m, x: revlib.reverse_and_swap(x, x, x, x, m.wrapped_module, "", False, lambda: None, (), {}),
            "fused_optimizer=make",
        ),
        (lambda m, x: SingleBranchReversibleModule([], block())(x), "no stream is waiting"),
        (lambda m, x: SingleBranchReversibleModule([], block(), start="x"), "expected 'zeros' or 'input'"),
        (lambda m, x: module_list_to_momentum_net(nn.ModuleList()), "came empty"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        call(revlib.ReversibleModule(block()), make_input()[:, :WIDTH])
