"""``MemoryBudget`` keeps its promise: the real peak is within the budget, or an error says the least before it runs."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import random
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from revcore import (
    Affine,
    Anchor,
    Bijection,
    Checkpoint,
    Couple,
    MemoryBudget,
    Momentum,
    Policy,
    Program,
    Reverse,
    SpecError,
    StoreAll,
    revnet,
)
from revcore_torch import ReversibleSequential, budget, plan, reversible
from revcore_torch.budget import AGAIN, KEPT, REBUILT, _Passes, _Search
from revcore_torch.memory import LiveBytes
from revcore_torch.steps import Arguments
from tests.helpers import tree_error
from tests.tiers import product

W = 8


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)
        self.attention = nn.MultiheadAttention(W, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


class Closing(nn.Module):
    """A plain function over a tensor that no module owns."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(W, W)
        self.function = lambda x: torch.tanh(x @ weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Counted(nn.Module):
    """Counts the calls of a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.calls = block, 0

    def forward(self, *args: Any) -> Any:
        self.calls += 1
        return self.block(*args)


class ConvNorm(nn.Sequential):
    def __init__(self, hidden: int) -> None:
        super().__init__(nn.Conv2d(W, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, W, 1))


class Shrink(nn.Module):
    """An anchor: each stream's mean over pairs."""

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.tanh(nn.functional.avg_pool2d(x, 2)) for x in streams)


class Scale(nn.Module):
    """A bijection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(W, 1, 1))

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * self.log.exp() for x in streams)

    def inverse(self, *streams: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * (-self.log).exp() for x in streams)


def mlp(hidden: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(W), nn.Linear(W, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, W)
    )  # fmt: skip


def bare(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(W, hidden), nn.GELU(), nn.Linear(hidden, W))


def random_model(seed: int) -> tuple[ReversibleSequential, Tensor]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    depth, streams = draw.randint(1, 6), draw.choice((2, 2, 3))
    wants = draw.random() < 0.5
    kind = draw.choice(("text", "rows", "image", "program"))
    if kind == "text":
        x = torch.randn(2, 12, streams * W, requires_grad=wants)
        makers: list[Callable[[], nn.Module]] = [SelfAttention, mlp, lambda: mlp(draw.choice((8, 64)))]
        blocks = [draw.choice(makers)() for _ in range(depth)]
        model = ReversibleSequential(*blocks, split_dim=-1, num_streams=streams)
    elif kind == "rows":
        x = torch.randn(48, streams * W, requires_grad=wants)
        makers = [Closing, nn.Tanh, lambda: mlp(draw.choice((8, 16, 128))), lambda: nn.BatchNorm1d(W)]
        blocks = [draw.choice(makers)() for _ in range(depth)] + [mlp()]
        coupling = draw.choice((None, [Momentum(0.9)]))
        model = ReversibleSequential(*blocks, num_streams=streams, coupling=coupling)
    elif kind == "image":
        x = torch.randn(2, W, 6, 6, requires_grad=wants)
        blocks = [ConvNorm(draw.choice((4, 8, 32))) for _ in range(depth)]
        model = ReversibleSequential(*blocks, split_dim=None, num_streams=streams)  # every stream is the whole input
    else:
        x = torch.randn(2, 2 * W, 6, 6, requires_grad=wants)
        steps = (
            Couple(0, (1,)),
            Couple(1, (0,)),
            Bijection(),
            Couple(0, (1,), Momentum(0.9)),
            Anchor(),
            Couple(1, (0,)),
        )
        program = Program(steps)
        model = ReversibleSequential(
            ConvNorm(8), ConvNorm(draw.choice((4, 32))), Scale(), ConvNorm(16), Shrink(), ConvNorm(8), program=program
        )
    for parameter in model.parameters():
        if draw.random() < 0.3:
            parameter.grad = torch.zeros_like(parameter)
    return model, x


def train(model: Any, x: Tensor, policy: Policy, whole: bool) -> tuple[int, dict[str, Any]]:
    """Return the real peak, and gradients and buffers; the model is as before then.

    ``whole``: the caller holds the output, and its gradient is a new tensor.
    """
    tensors = {**dict(model.named_parameters()), "x": x}
    state, grads = copy.deepcopy(model.state_dict()), {name: t.grad for name, t in tensors.items()}
    for t in tensors.values():
        t.grad = None if t.grad is None else t.grad.clone()
    model.policy = policy
    torch.manual_seed(0)
    with LiveBytes() as memory:
        y = model(x)
        loss = budget._Incoming.apply(y) if whole else y.sum()
        if not whole:
            del y
        loss.backward()
    found = {name: t.grad for name, t in tensors.items()} | {name: b.clone() for name, b in model.named_buffers()}
    model.load_state_dict(state)
    for name, t in tensors.items():
        t.grad = grads[name]
    return memory.peak, {name: t.double() for name, t in found.items() if t is not None}


def least_of(model: Any, x: Tensor) -> int:
    """Return what the error of a budget too small says, which comes before anything has run."""
    model.policy = MemoryBudget(bytes=1)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ran = []
    hook = model[0].register_forward_hook(lambda _, __, out: ran.append({type(t) for t in pytree.tree_leaves(out)}))
    with pytest.raises(SpecError, match=r"the budget is 1 bytes, but the least .* write MemoryBudget") as error:
        model(x)
    hook.remove()
    assert all(types == {FakeTensor} for types in ran)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)
    found = re.search(r"is ([\d,]+): write", str(error.value))
    assert found is not None
    return int(found[1].replace(",", ""))


# One of each kind of model is fast, with two streams and three, with and without a gradient of the input.
@pytest.mark.parametrize("seed", product(range(20), fast=lambda seed: seed in (1, 2, 3, 4, 9)))
def test_twenty_random_models_keep_to_their_budgets(seed: int) -> None:
    model, x = random_model(seed)
    most, expected = train(model, x, StoreAll(), whole=True)
    least = least_of(model, x)
    assert least <= most
    middle = least + int(random.Random(seed).uniform(0.1, 0.9) * (most - least))
    for size in (least, middle):
        peak, found = train(model, x, MemoryBudget(bytes=size), whole=True)
        assert peak <= size
        assert tree_error(found, expected) < 16 * len(model) * 2**-23
        assert train(model, x, MemoryBudget(bytes=size), whole=False)[0] <= size


def test_more_memory_means_less_recomputation_down_to_none() -> None:
    model, x = ReversibleSequential(*[Counted(mlp()) for _ in range(4)]), torch.randn(64, 2 * W)
    most, _ = train(model, x, StoreAll(), whole=True)

    def calls(budget: MemoryBudget) -> int:
        """Return how often blocks run in a training step; what was planned for one budget is known for the others."""
        model.policy = budget
        model.zero_grad()
        before = sum(block.calls for block in model)  # type: ignore[attr-defined, misc]
        model(x).sum().backward()
        return sum(block.calls for block in model) - before  # type: ignore[attr-defined, misc]

    found = [calls(MemoryBudget(bytes=int(most * share))) for share in (0.5, 0.7, 0.9, 1)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > found[-1] == 4
    assert calls(MemoryBudget(fraction=1)) == 4
    assert calls(MemoryBudget(bytes=10**12)) == 4


def search(model: ReversibleSequential, x: Tensor) -> _Search:
    return _Search(_Passes(model.program, tuple(model), x, Arguments((), {}, None), model.split, model.merge), {})


@pytest.mark.parametrize(
    ("make", "hidden"),
    [
        pytest.param(bare, (32,) * 3, id="equal"),
        pytest.param(bare, (32, 8, 64), id="unlike"),
        pytest.param(mlp, (32,) * 4, id="four equal", marks=pytest.mark.long),
        pytest.param(mlp, (32, 8, 64, 16), id="four unlike", marks=pytest.mark.long),
    ],
)
def test_the_choice_is_the_best_but_for_one_step_at_the_most(
    make: Callable[[int], nn.Module], hidden: tuple[int, ...]
) -> None:
    """Held against every one of the choices there are, each planned."""
    model, x = ReversibleSequential(*[make(h) for h in hidden]), torch.randn(128, 2 * W)
    every = search(model, x)
    number = len(hidden)
    peaks = {choice: every.peak(choice) for choice in itertools.product((KEPT, REBUILT, AGAIN), repeat=number)}
    known = {every.assignment(choice): taken for choice, taken in every.tried.items()}
    alike = kept, rebuilt, again = (KEPT,) * number, (REBUILT,) * number, (AGAIN,) * number
    model_of = every.model(every.tried[kept], every.tried[rebuilt], every.tried[again])
    least = min(peaks.values())
    step = max(max(costs) for costs in model_of.costs)
    policies = {StoreAll(): KEPT, Reverse(): REBUILT, Checkpoint(): AGAIN}
    for share in (0, 0.3, 0.6, 0.9, 1):
        size = least + int(share * (peaks[kept] - least))
        one = search(model, x)
        one.tried = {choice: every.tried[choice] for choice in alike}
        one.passes.run = known.__getitem__  # type: ignore[method-assign]
        chosen = tuple(policies[policy] for policy in one.within(MemoryBudget(bytes=size)))  # type: ignore[index]
        best = min(model_of.cost(choice) for choice, peak in peaks.items() if peak <= size)
        assert peaks[chosen] <= size
        assert model_of.cost(chosen) <= best + step
        assert len(one.tried) <= 3 + budget.CHECKS + 4
        if len(set(hidden)) == 1:
            last = [(REBUILT,) * (number - k) + (KEPT,) * k for k in range(number + 1)]
            assert model_of.cost(chosen) <= min((model_of.cost(c) for c in last if peaks[c] <= size), default=math.inf)


def test_what_has_no_inverse_is_run_again_from_its_input() -> None:
    program = Program((Couple(0, (1,)), Anchor(), Couple(1, (0,))))

    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(256)

        def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.inner(x) for x in streams)

    model, x = ReversibleSequential(mlp(8), Heavy(), mlp(256), program=program), torch.randn(64, 2 * W)
    chosen = search(model, x).within(MemoryBudget(bytes=least_of(model, x)))
    assert chosen[1] == Checkpoint()


def test_functions_streams_and_arguments_of_ones_own() -> None:
    weight = torch.randn(W, W, requires_grad=True)
    streams = torch.randn(64, W), torch.randn(64, W, requires_grad=True)

    def block(x: Tensor, scale: Tensor, *, power: int) -> tuple[Tensor, Tensor]:
        f = torch.tanh(x @ weight) ** power * scale
        return f, f.mean()

    def step(policy: Policy) -> tuple[int, list[Any]]:
        weight.grad = streams[1].grad = None
        scale = torch.tensor(2.0, requires_grad=True)
        with LiveBytes() as memory:
            (a, b), aux = reversible(revnet(4), [block] * 4, streams, scale, power=3, policy=policy)
            (a.sum() + b.sum() + sum(each[0] for each in aux)).backward()
        return memory.peak, [weight.grad, streams[1].grad, scale.grad]

    most, expected = step(StoreAll())
    with pytest.raises(SpecError, match="the least that this network takes"):
        step(MemoryBudget(fraction=0.01))
    assert weight.grad is None
    peak, found = step(MemoryBudget(fraction=0.7))
    assert peak <= 0.75 * most
    assert tree_error(found, expected) < 1e-5


def test_affine_couplings_and_autocast() -> None:
    blocks = [nn.Linear(W, 2 * W) for _ in range(4)]

    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = torch.tanh(self.inner(x)).chunk(2, 1)
            return a, b

    model = ReversibleSequential(*map(Pair, blocks), coupling=[Affine()])
    x = torch.randn(64, 2 * W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        least = least_of(model, x)
        assert train(model, x, MemoryBudget(bytes=least), whole=True)[0] <= least


def test_a_choice_is_kept_for_calls_of_the_same_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    run = _Passes.run
    monkeypatch.setattr(_Passes, "run", lambda self, assignment: (ran.append(1), run(self, assignment))[1])
    model = ReversibleSequential(mlp(), mlp(), policy=MemoryBudget(fraction=0.8))
    x = torch.randn(16, 2 * W)

    def planned(x: Tensor) -> bool:
        ran.clear()
        model(x).sum().backward()
        return bool(ran)

    assert planned(x)
    assert planned(x)  # now gradients are there
    assert not planned(x)
    assert not planned(torch.randn(16, 2 * W))
    assert planned(torch.randn(17, 2 * W))
    model.eval()
    assert planned(x)
    model.zero_grad()
    assert planned(x)
    model.policy = MemoryBudget(bytes=10**9)  # another budget, measured already
    model.zero_grad()
    assert not planned(x)
    with torch.no_grad():
        ran.clear()
        model(torch.randn(3, 2 * W))
    assert not ran


def test_the_cache_keeps_no_model_alive() -> None:
    model = ReversibleSequential(*[mlp() for _ in range(2)], policy=MemoryBudget(fraction=0.9))
    model(torch.randn(64, 2 * W)).sum().backward()
    parameter = weakref.ref(next(model.parameters()))
    del model
    gc.collect()
    assert parameter() is None


def test_what_cannot_be_planned_asks_for_a_fixed_policy() -> None:
    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum().item() > 0 else x

    model = ReversibleSequential(mlp(), Looking(), policy=MemoryBudget(fraction=0.5))
    with pytest.raises(SpecError, match=r"MemoryBudget runs the network on fake tensors.*needs the data.*Reverse\(\)"):
        model(torch.randn(4, 2 * W))


def test_a_budget_inside_a_block_of_a_network_with_a_budget() -> None:
    inner = ReversibleSequential(nn.Linear(W // 2, W // 2), nn.Linear(W // 2, W // 2), policy=MemoryBudget(fraction=1))
    model, x = ReversibleSequential(mlp(), inner, mlp(64)), torch.randn(32, 2 * W)
    _, expected = train(model, x, StoreAll(), whole=True)
    least = least_of(model, x)
    peak, found = train(model, x, MemoryBudget(bytes=least), whole=True)
    assert peak <= least
    assert tree_error(found, expected) < 1e-5


def test_nothing_to_train_is_no_error() -> None:
    model = ReversibleSequential(nn.Tanh(), nn.Tanh(), policy=MemoryBudget(fraction=1))
    x = torch.randn(4, 2 * W)
    assert model(x).shape == x.shape
    assert torch.func.vmap(model)(x[:, None]).shape == (4, 1, 2 * W)


def test_the_planner_plans_a_budget() -> None:
    model, x = ReversibleSequential(*[mlp() for _ in range(4)]), torch.randn(64, 2 * W)
    rows = plan(model, x, policies=[StoreAll(), MemoryBudget(fraction=0.7), Reverse()]).rows
    assert rows[0].peak > rows[1].peak > rows[2].peak
    assert rows[0].work < rows[1].work < rows[2].work
