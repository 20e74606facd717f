"""Exact networks in torch: gradients are those of the stored network to the bit, or an error says why they are not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore
from revcore import (
    BDIA,
    Additive,
    Anchor,
    Bijection,
    Checkpoint,
    Couple,
    InversionError,
    LinearCoupling,
    MemoryBudget,
    Momentum,
    Policy,
    Program,
    Reverse,
    SpecError,
    StoreAll,
    bdia,
    momentum_net,
    revnet,
)
from revcore_torch import ReversibleSequential, check_inverse, inverse, is_recomputing, reversible
from revcore_torch.memory import LiveBytes
from tests.helpers import name_of, tree_error
from tests.tiers import product

WIDTH = 8
PROGRAMS = {
    "additive": lambda depth: revnet(depth).exact(),
    "momentum 0.9": lambda depth: revnet(depth, Momentum(0.9)).exact(),
    "bdia": bdia,
    "momentum net 0.5": lambda depth: momentum_net(depth, 0.5).exact(),
}
POLICIES = [Reverse(), Checkpoint(3), Reverse(anchor_every=7, keep_last=2)]


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), dropout
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def mlp(dropout: float = 0.0) -> nn.Module:
    layers = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
    return nn.Sequential(*layers, nn.Dropout(dropout))


def network(program: Program, policy: Policy, make: Any = mlp) -> ReversibleSequential:
    torch.manual_seed(0)
    return ReversibleSequential(
        *[make() for _ in range(program.num_blocks)], program=program, policy=policy, split_dim=-1
    )


def gradients(model: ReversibleSequential, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    (y * y).mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **grads}  # type: ignore[dict-item]


def input_for(program: Program, *shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*shape, WIDTH * (program.num_streams if program.split == "chunk" else 1))


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name, value in got.items() if not torch.equal(value, expected[name])] == []
    assert all(value.isfinite().all() for value in expected.values())
    assert len({float(value.norm()) for value in expected.values()}) > 1


# --- to the bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "depth"), product(PROGRAMS, [16, 256], fast=lambda _, depth: depth == 16))
def test_gradients_are_those_of_the_stored_network(name: str, depth: int) -> None:
    program = PROGRAMS[name](depth)
    x = input_for(program, 3)
    expected = gradients(network(program, StoreAll()), x)
    for policy in POLICIES:
        assert_equal(gradients(network(program, policy), x), expected)


@pytest.mark.parametrize("name", product(PROGRAMS, fast=lambda name: name == "additive"))
def test_ordinary_gradients_are_not(name: str) -> None:
    """The test above would see what rounding does."""
    exact = PROGRAMS[name](16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", revcore.DriftWarning)
        steps = [
            Couple(s.target, s.sources, s.coupling.coupling, s.combine, s.block)  # type: ignore[union-attr]
            for s in exact.unrolled
        ]
        ordinary = Program(steps, split=exact.split, merge=exact.merge)
        x = input_for(ordinary, 3)
        expected, got = (gradients(network(ordinary, policy), x) for policy in (StoreAll(), Reverse()))
    assert not all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Attention, id="attention", marks=pytest.mark.long),
        pytest.param(lambda: Attention(0.2), id="attention dropout"),
        pytest.param(lambda: mlp(0.3), id="mlp dropout", marks=pytest.mark.long),
    ],
)
def test_blocks_of_other_kinds(make: Any) -> None:
    program = revnet(8, [Additive(), Momentum(0.9)]).exact()
    x = input_for(program, 2, 5)
    expected = gradients(network(program, StoreAll(), make), x)
    for policy in POLICIES:
        assert_equal(gradients(network(program, policy, make), x), expected)


def test_other_dtypes() -> None:
    program = momentum_net(8, 0.9).exact(40)
    expected, got = (
        gradients(network(program, policy).double(), input_for(program, 3).double())
        for policy in (StoreAll(), Reverse())
    )
    assert_equal(got, expected)
    program = revnet(8, Momentum(0.9)).exact()

    def narrow(policy: Policy) -> dict[str, Tensor]:
        torch.manual_seed(0)
        blocks = [mlp() for _ in range(8)]
        model = ReversibleSequential(*blocks, program=program, policy=policy, split_dim=-1, stream_dtype="float32")
        return gradients(model.bfloat16(), input_for(program, 3).bfloat16())

    assert_equal(narrow(Reverse()), narrow(StoreAll()))

    def autocast(policy: Policy) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(network(program, policy), input_for(program, 3))

    assert_equal(autocast(Reverse()), autocast(StoreAll()))


def test_anchors_permutations_and_images() -> None:
    pair = (Couple(0, 1, Momentum(0.9)), Couple(1, 0))
    steps = [*pair, Bijection.space_to_depth(2), Bijection.permute((1, 0)), *pair, Anchor(), *pair]
    program = Program(steps).exact()

    def halve(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.mean((-1, -2), keepdim=True) / 3, b.mean((-1, -2), keepdim=True)

    def run(policy: Policy) -> list[Tensor]:
        torch.manual_seed(0)
        blocks = [nn.Conv2d(n, n, 1) for n in (2, 2, 8, 8)] + [halve] + [nn.Conv2d(8, 8, 1) for _ in range(2)]
        streams = tuple(torch.randn(2, 2, 4, 4, requires_grad=True) for _ in range(2))
        a, b = reversible(program, blocks, streams, policy=policy)
        (a * b).sum().backward()
        parameters = [p.grad for block in blocks if isinstance(block, nn.Module) for p in block.parameters()]
        return [a.detach(), b.detach(), *(s.grad for s in streams), *parameters]  # type: ignore[list-item]

    for policy in (Reverse(), Checkpoint(2)):
        assert all(map(torch.equal, run(policy), run(StoreAll())))


@pytest.mark.long  # equal gradients make equal steps
def test_forty_steps_of_training_have_the_same_losses() -> None:
    def losses(policy: Policy) -> list[float]:
        model, found = network(bdia(8), policy), []
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        x, goal = torch.randn(16, WIDTH), torch.randn(16, WIDTH)
        for _ in range(40):
            optimizer.zero_grad()
            loss = (model(x) - goal).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    torch.manual_seed(5)
    stored = losses(StoreAll())
    torch.manual_seed(5)
    assert losses(Reverse()) == stored
    assert stored[-1] < 0.8 * stored[0]


def test_momentum_of_a_half_at_depth_32_trains_right_where_ordinary_gradients_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(revcore.drift, "_warned", set())  # another test of this process may have had the warning
    program, x = revnet(32, Momentum(0.5)), input_for(revnet(2), 3)
    expected, got = (gradients(network(program.exact(), policy), x) for policy in (StoreAll(), Reverse()))
    assert_equal(got, expected)
    expected = gradients(network(program, StoreAll()), x)
    with pytest.warns(revcore.DriftWarning):
        got = gradients(network(program, Reverse()), x)
    # of each tensor alone: over all, the layers near the output hide those near the input
    assert max(tree_error([got[name]], [expected[name]]) for name in got) > 0.05


def test_the_graph_kept_double_backward_and_two_passes() -> None:
    program = revnet(6, Momentum(0.9)).exact()

    def run(policy: Policy) -> list[Tensor]:
        model, x = network(program, policy), input_for(program, 3).requires_grad_()
        y = model(x).square().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad(y, x)
        return [first.detach(), second, again]

    reverse, stored = run(Reverse()), run(StoreAll())
    assert torch.equal(reverse[0], stored[0])
    assert torch.equal(reverse[0], reverse[2])
    assert tree_error([reverse[1]], [stored[1]]) < 1e-5


# --- what it keeps ----------------------------------------------------------------------------------------------------


BITS = {Additive(): 0, Momentum(0.9): 1, BDIA(0.5): 1, Momentum(0.3): 2}


@pytest.mark.parametrize(
    ("coupling", "guard", "checksum", "depth"),
    product(
        BITS,
        [0, 1],
        [True, False],
        [2, 16],
        # what is kept is a sum: each of its parts alone and all together tell them apart
        fast=lambda coupling, guard, checksum, depth: depth == 2 and (guard == checksum or coupling == Momentum(0.3)),
        name=name_of,
    ),
)
def test_bytes_kept_are_the_streams_and_what_is_stated(
    coupling: LinearCoupling, guard: int, checksum: bool, depth: int
) -> None:
    bits = BITS[coupling]
    program = revnet(depth, coupling).exact(guard=guard, checksum=checksum)
    blocks = [nn.Linear(WIDTH, WIDTH) for _ in range(depth)]
    streams = tuple(torch.randn(4, WIDTH, requires_grad=True) for _ in range(2))
    with LiveBytes() as memory:
        outputs = reversible(program, blocks, streams)
        elements = 4 * WIDTH
        assert memory.live == 2 * elements * 4 + depth * (elements * (bits + guard) // 8 + 4 * checksum)
        torch.stack([y.sum() for y in outputs]).sum().backward()
        del outputs
        assert memory.live == sum(p.nbytes for b in blocks for p in b.parameters()) + 2 * elements * 4


def test_each_block_runs_twice() -> None:
    calls: list[bool] = []

    def block(x: Tensor) -> Tensor:
        calls.append(is_recomputing())
        return torch.sin(x)

    x = torch.randn(3, requires_grad=True)
    y, z = reversible(revnet(5, Momentum(0.9)).exact(), [block] * 5, (x, x))
    (y + z).sum().backward()
    assert calls == [False] * 5 + [True] * 5


# --- noise ------------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Returns, the second time, another number for each: off by so many units in the last place."""

    def __init__(self, ulps: int = 8) -> None:
        super().__init__()
        self.linear, self.ulps = nn.Linear(WIDTH, WIDTH), ulps

    def forward(self, x: Tensor) -> Tensor:
        f = torch.tanh(self.linear(x))
        if not is_recomputing():
            return f
        signs = torch.linspace(0, 99, f.numel()).sin().sign().reshape(f.shape)
        size = f.detach().abs()
        return f + signs * self.ulps * (torch.nextafter(size, size + 1) - size)


def rebuilt_input(program: Program, ulps: int = 8) -> tuple[Tensor, Tensor]:
    """Return the first stream as a block of the first step sees it the second time, and as it was."""
    torch.manual_seed(0)
    blocks = [Noisy(ulps) for _ in range(program.num_blocks)]
    seen: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    streams = tuple(torch.randn(16, WIDTH, requires_grad=True) for _ in range(2))
    loss: Any = sum(y.square().sum() for y in reversible(program, blocks, streams))
    loss.backward()
    first, then, then_again, again = seen
    return torch.cat((then_again, again)), torch.cat((then, first))


@pytest.mark.parametrize("coupling", [Additive(), Momentum(0.9), BDIA(0.5)], ids=name_of)
def test_eight_ulps_of_noise(coupling: LinearCoupling) -> None:
    program = revnet(64, coupling)
    assert torch.equal(*rebuilt_input(program.exact(guard=1)))
    assert not torch.equal(*rebuilt_input(program.exact(checksum=False)))
    with pytest.raises(InversionError, match="the stream that was rebuilt is not the one that was there"):
        rebuilt_input(program.exact())


def test_noise_beyond_the_guard_is_told() -> None:
    program = revnet(8).exact(guard=1)
    assert torch.equal(*rebuilt_input(program, ulps=200))
    with pytest.raises(InversionError, match=r"write program\.exact\(guard=1\) \(or 2, or 4\)"):
        rebuilt_input(program, ulps=20_000)
    assert torch.equal(*rebuilt_input(revnet(8).exact(guard=4), ulps=20_000))


# --- its range --------------------------------------------------------------------------------------------------------


def grow(x: Tensor) -> Tensor:
    return 30 * x


@pytest.mark.parametrize("policy", [Reverse(), StoreAll(), Checkpoint()], ids=str)
def test_leaving_the_range_raises_and_changes_nothing(policy: Policy) -> None:
    norm = nn.BatchNorm1d(WIDTH)
    blocks = [norm, nn.Dropout(0.5), *[grow] * 6]
    x = torch.randn(4, WIDTH)
    random, mean = torch.get_rng_state(), norm.running_mean.clone()  # type: ignore[union-attr]
    words = r"step \d took a stream out of the exact range: .*bits=\d+ reaches \d+"
    with pytest.raises(InversionError, match=words):
        reversible(revnet(8).exact(), blocks, (x, x), policy=policy)
    if not isinstance(policy, StoreAll):  # where an ordinary network leaves what an ordinary network leaves
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(InversionError, match=words):
        reversible(revnet(8).exact(), blocks, (x, x), policy=policy)


def test_no_numbers_and_the_input() -> None:
    blocks = [torch.sin, lambda x: x / 0 * 0, torch.sin]
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(InversionError, match="step 1 gave a stream with NaN or infinity"):
        reversible(revnet(3).exact(), blocks, (x, x))
    with pytest.raises(InversionError, match="the input took a stream out"):
        reversible(revnet(3).exact(), blocks, (x * 5000, x))
    with pytest.raises(SpecError, match=r"stream 0 of the input came as bfloat16.*stream_dtype"):
        reversible(revnet(3).exact(), blocks, (x.bfloat16(), x.bfloat16()))
    with pytest.raises(SpecError, match="complex64, but exact arithmetic needs"):
        reversible(revnet(3).exact(), blocks, (x.to(torch.cfloat), x.to(torch.cfloat)))


def test_under_torch_func_a_value_out_of_range_is_none() -> None:
    """Nobody can raise there for one example of many."""

    def run(x: Tensor) -> Tensor:
        return sum(reversible(revnet(2).exact(), [grow, torch.sin], (x, x)))  # type: ignore[return-value, arg-type]

    out = torch.func.vmap(run)(torch.tensor([[1.0], [2.0], [1000.0]]))
    assert out.isfinite().flatten().tolist() == [True, True, False]
    grads = torch.func.vmap(torch.func.grad(lambda x: run(x).sum()))(torch.tensor([[1.0], [2.0], [1000.0]]))
    assert grads[2].isnan().all()
    x = torch.tensor([[1.0], [2.0]], requires_grad=True)
    run(x).sum().backward()
    assert tree_error([grads[:2]], [x.grad]) < 1e-6


# --- what else is called ----------------------------------------------------------------------------------------------


def test_inverse_and_check_inverse() -> None:
    x = torch.randn(3, 2 * WIDTH)
    model = network(revnet(9).exact(), Reverse())
    encoded = revnet(2).exact().lattice.encode(x)  # type: ignore[union-attr]
    assert torch.equal(model.inverse(model(x)), encoded)
    assert check_inverse(network(revnet(9, Momentum(0.5)).exact(), Reverse()), x).worst == 0
    carrying = revnet(3, Momentum(0.9)).exact()
    with pytest.raises(SpecError, match="the inverse needs the digits that a forward pass keeps"):
        inverse(carrying, [torch.sin] * 3, (x, x))


def test_a_memory_budget() -> None:
    program = revnet(4, Momentum(0.9)).exact()
    x = input_for(program, 64)
    expected = gradients(network(program, StoreAll()), x)
    assert_equal(gradients(network(program, MemoryBudget(fraction=0.6)), x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's, after a break
def test_a_compiled_model_runs_it_outside_of_the_graph() -> None:
    program = revnet(2, Momentum(0.9)).exact()
    x = input_for(program, 3)
    model = network(program, Reverse())
    compiled: Any = torch.compile(model, backend="eager")
    expected = gradients(network(program, StoreAll()), x)
    got = gradients(compiled, x)
    got = {re.sub("^_orig_mod.", "", name): value for name, value in got.items()}
    assert tree_error(got, expected) < 1e-5
    torch._dynamo.reset()


def streams_of(values: Sequence[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(values), torch.tensor(values)


def test_there_is_one_zero() -> None:
    y0, _ = reversible(revnet(1).exact(), [lambda x: -x], streams_of([0.0, -0.0]))
    assert not torch.signbit(y0).any()
