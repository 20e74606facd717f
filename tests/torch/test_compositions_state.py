"""Blocks that draw random numbers, move buffers, or keep a state: what they did once is not done twice."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import revcore
import revcore_torch
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll, outside
from tests.torch.harness import (
    EVERYTHING,
    KEPT,
    WIDTH,
    Apply,
    after_linear,
    as_image,
    block,
    dropout_block,
    make_input,
    train,
)
from tests.torch.registry import Section

chance = Section("Random numbers in blocks")


@chance.same("`Dropout`", make=dropout_block, settings=EVERYTHING)
def test_dropout(model):
    return train(model), torch.rand(1)


@chance.same(
    "`AlphaDropout`, `Dropout1d`", make=lambda _: nn.Sequential(block(), nn.AlphaDropout(0.3), nn.Dropout1d(0.3))
)
def test_other_dropouts(model):
    return train(model), torch.rand(1)


@chance.same("`RReLU`", make=after_linear(lambda _: nn.RReLU()))
def test_rrelu(model):
    return train(model)


@chance.same(
    "noise drawn by hand (`torch.randn_like`)", make=after_linear(lambda _: Apply(lambda x: x + torch.randn_like(x)))
)
def test_noise(model):
    return train(model)


@chance.same("Gumbel softmax", make=after_linear(lambda _: Apply(lambda x: nn.functional.gumbel_softmax(x, hard=True))))
def test_gumbel_softmax(model):
    return train(model)


class StochasticDepth(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = dropout_block(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if torch.rand(()) < 0.4 else self.inner(x)


@chance.same("stochastic depth: a layer is left out by a draw of `torch.rand`", make=StochasticDepth)
def test_stochastic_depth(model):
    return train(model)


class OwnGenerator(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(width, width), torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)


def equal_under_each_policy(run: Any, *policies: Any) -> None:
    expected = run(StoreAll())
    for policy in policies or (Reverse(), Reverse(anchor_every=2), Checkpoint(), Checkpoint(every=2)):
        for a, b in zip(run(policy), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@chance.works("a block draws from a `torch.Generator` of its own", note="an attribute of one of its modules")
def test_own_generator():
    def run(policy):
        torch.manual_seed(0)
        model = ReversibleSequential(OwnGenerator(WIDTH), OwnGenerator(WIDTH), policy=policy).double()
        return [*train(model), torch.rand(3, generator=model[0].generator)]

    equal_under_each_policy(run)


@chance.works("blocks draw from a `torch.Generator` that they are given")
def test_given_generator():
    def run(policy):
        generator = torch.Generator().manual_seed(1)
        noise = Apply(lambda x, g: x.sin() * torch.rand(x.shape, generator=g, dtype=x.dtype))
        return [*train(ReversibleSequential(noise, noise, noise, policy=policy), generator), generator.get_state()]

    equal_under_each_policy(run)


@chance.works("the same, and a later block fails: the generators are put back")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_own_generator_of_a_failed_pass(policy):
    model = ReversibleSequential(OwnGenerator(WIDTH), Apply(fail), policy=policy).double()
    before = model[0].generator.get_state()
    with pytest.raises(KeyError, match="told to"):
        model(make_input())
    assert torch.equal(model[0].generator.get_state(), before)


def fail(*_: Any) -> None:
    raise KeyError("told to")


@pytest.fixture
def as_if_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block of this process drew from them before."""
    monkeypatch.setattr(outside, "recorded", [])


DRAWS = {
    "random": (random.random, random.getstate),
    "gauss": (lambda: random.gauss(0, 1), random.getstate),
    "numpy": (np.random.rand, lambda: str(np.random.get_state())),  # noqa: NPY002 - as users have it
    "numpy, normal": (np.random.randn, lambda: str(np.random.get_state())),  # noqa: NPY002
}
drawing = pytest.mark.parametrize(("draw", "state"), DRAWS.values(), ids=DRAWS)


@chance.works(
    "a block draws from Python's `random`, or from `numpy.random`",
    note="in a process's first such pass, the forward pass runs twice: the engine records their states from then on",
)
@drawing
def test_other_generators(as_if_new, draw, state):
    def run(policy):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        blocks = [nn.Sequential(nn.BatchNorm1d(WIDTH), Apply(lambda x: torch.sin(x) * draw())) for _ in range(4)]
        model = ReversibleSequential(*blocks, policy=policy).double()
        results = [*train(model), *train(model), *(b.double() for b in model.buffers())]
        states.append(state())
        return [*results, torch.tensor(draw())]

    states: list[Any] = []
    for _ in range(2):
        equal_under_each_policy(run)
    assert all(s == states[0] for s in states)


@chance.works("the same, and a later block fails: they are put back")
@drawing
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_other_generators_of_a_failed_pass(as_if_new, policy, draw, state):
    model = ReversibleSequential(Apply(lambda x: torch.sin(x) * draw()), Apply(fail), policy=policy)
    before = state()
    with pytest.raises(KeyError, match="told to"):
        model(make_input())
    assert state() == before


@chance.works("another thread draws from them meanwhile")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_another_thread_draws_from_others(as_if_new, policy):
    def disturbed(x: Tensor) -> Tensor:
        thread = threading.Thread(target=random.random)
        thread.start()
        thread.join()
        return x.sin()

    equal_under_each_policy(lambda policy: train(ReversibleSequential(*[Apply(disturbed)] * 3, policy=policy)), policy)


class DisturbedMeanwhile(nn.Module):
    """While its block runs for the second time, another thread draws a number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(width, width), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if revcore_torch.is_recomputing():
            thread = threading.Thread(target=torch.rand, args=(5,))
            thread.start()
            thread.join()
        return self.dropout(h)


@chance.refuses(
    "another thread draws random numbers while a block that draws is run again",
    revcore.InversionError,
    "another thread drew from the same generator meanwhile",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_another_thread_draws(refused, policy):
    model = ReversibleSequential(*[DisturbedMeanwhile(WIDTH) for _ in range(2)], policy=policy).double()
    state = torch.get_rng_state()
    x = make_input()
    loss = model(x).pow(2).sum()
    with refused:
        loss.backward()
    assert not torch.equal(state, torch.get_rng_state())


@chance.works("another thread draws random numbers while a block that draws none runs for the first time")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_another_thread_draws_in_a_block_that_does_not(policy):
    def disturb(*_: Any) -> None:
        if not revcore_torch.is_recomputing():
            thread = threading.Thread(target=torch.rand, args=(5,))
            thread.start()
            thread.join()

    model = ReversibleSequential(block(), block()).double()
    expected = train(model)
    model.policy = policy
    model[0].register_forward_hook(disturb)
    for a, b in zip(train(model), expected, strict=True):
        torch.testing.assert_close(a, b)


# --- buffers ----------------------------------------------------------------------------------------------------------

buffers = Section("Buffers")
WITHOUT_KEPT = {name: setting for name, setting in EVERYTHING.items() if name not in KEPT}


class Statistics(nn.Module):
    """Everything that moves a buffer: batch norm, spectral norm (a power iteration); and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = parametrizations.spectral_norm(nn.Linear(width, width))
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.norm(self.linear(x))))


@buffers.same("`BatchNorm` and spectral norm: buffers move once", make=Statistics, settings=WITHOUT_KEPT)
def test_statistics(model):
    return train(model)


@buffers.same(
    "spectral norm with operations kept (`Reverse(recompute=[…])`)",
    make=Statistics,
    settings=KEPT,
)
def test_statistics_with_operations_kept(model):
    return train(model)


@buffers.same("the same over two forward passes and one backward", make=Statistics, tolerance=1e-10)
def test_statistics_of_two_forwards(model):
    x = make_input()
    (model(x).pow(2).sum() + model(2 * x).sin().sum()).backward()
    return x.grad


@buffers.same("the same with a forward pass between forward and backward", make=Statistics)
def test_statistics_moved_before_backward(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    with torch.no_grad():
        model(3 * x)
    loss.backward()
    return x.grad


@buffers.works("`BatchNorm` counts one batch a step")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_batch_norm_counts_once(policy):
    model = ReversibleSequential(*[nn.BatchNorm1d(WIDTH) for _ in range(3)], policy=policy).double()
    for step in (1, 2):
        train(model)
        assert [b.state_dict()["num_batches_tracked"] for b in model] == [step] * 3


@buffers.same(
    "`BatchNorm` with a cumulative average (`momentum=None`)",
    make=after_linear(lambda w: nn.BatchNorm1d(w, momentum=None)),
)
def test_batch_norm_cumulative(model):
    return train(model), train(model)


@buffers.same(
    "`BatchNorm` without running statistics", make=after_linear(lambda w: nn.BatchNorm1d(w, track_running_stats=False))
)
def test_batch_norm_without_statistics(model):
    return train(model)


@buffers.same("`BatchNorm` frozen in evaluation mode while the rest trains", make=Statistics)
def test_batch_norm_frozen(model):
    train(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval().requires_grad_(False)
    return train(model)


@buffers.same(
    "`BatchNorm2d` in convolutional blocks",
    make=as_image(lambda c: nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c)), 1, 3),
)
def test_batch_norm_2d(model):
    return train(model)


@buffers.same("`InstanceNorm`", make=as_image(lambda c: nn.InstanceNorm1d(c, affine=True), 3))
def test_instance_norm(model):
    return train(model)


@buffers.same(
    "`InstanceNorm` with running statistics", make=as_image(lambda c: nn.InstanceNorm1d(c, track_running_stats=True), 3)
)
def test_instance_norm_with_statistics(model):
    return train(model), train(model.eval())


@buffers.same(
    "`LayerNorm`, `GroupNorm`, `RMSNorm`",
    make=after_linear(lambda w: nn.Sequential(nn.LayerNorm(w), nn.GroupNorm(2, w), nn.RMSNorm(w))),
)
def test_other_norms(model):
    return train(model)


class Counter(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x)) * self.calls


@buffers.same("a buffer that the block counts up in place, and uses", make=Counter)
def test_counter_buffer(model):
    return train(model), train(model)


class Replaced(Counter):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return torch.tanh(self.linear(x)) * self.calls


@buffers.same("a buffer that the block replaces (`self.calls = self.calls + 1`), and uses", make=Replaced)
def test_replaced_buffer(model):
    return train(model), train(model)


@buffers.works("the same, and a later block fails: the old buffer is put back")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_replaced_buffer_of_a_failed_pass(policy):
    model = ReversibleSequential(Replaced(WIDTH), Replaced(WIDTH), policy=policy).double()
    before = list(model.buffers())
    model[1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="told to"):
        model(make_input())
    assert all(a is b for a, b in zip(before, model.buffers(), strict=True))
    assert not any(before)


class Hidden(nn.Module):
    """A recurrence over steps: its state is a buffer, and has a graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.state: Tensor
        self.register_buffer("state", torch.zeros(4, width))

    def forward(self, x: Tensor) -> Tensor:
        self.state = torch.tanh(self.linear(x) + self.state)
        return self.state * 2


@buffers.same("a buffer that holds a hidden state with its graph, over two passes", make=Hidden)
def test_hidden_state(model):
    x = make_input()
    (model(x).pow(2).sum() + model(x.sin()).pow(2).sum()).backward()
    for b in model:
        b.state = b.state.detach()
    return x.grad


class Codebook(nn.Module):
    """Vector quantisation with a codebook kept by a moving average, as VQ-VAE has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.codes: Tensor
        self.register_buffer("codes", torch.randn(5, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        nearest = torch.cdist(h, self.codes).argmin(1)
        out = h + (self.codes[nearest] - h).detach() * h.abs()
        if self.training:
            with torch.no_grad():
                self.codes[nearest] = 0.9 * self.codes[nearest] + 0.1 * h
        return out


@buffers.same("a codebook kept by a moving average (VQ-VAE)", make=Codebook)
def test_codebook(model):
    return train(model), train(model)


@buffers.refuses("`inverse` of a block that draws random numbers", revcore.InversionError, "draws random numbers")
def test_inverse_refuses_dropout(refused):
    model = ReversibleSequential(*[Statistics(WIDTH) for _ in range(3)]).double()
    state = torch.get_rng_state()
    with refused:
        model.inverse(make_input().detach())
    assert torch.equal(state, torch.get_rng_state())


@buffers.works("`inverse` moves no buffer")
def test_inverse_moves_no_buffer():
    model = ReversibleSequential(*[Statistics(WIDTH) for _ in range(3)]).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    y = model(make_input().detach())
    before = [b.clone() for b in model.buffers()]
    model.inverse(y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


class Stateful(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(width, width), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x) / self.calls)


@buffers.refuses(
    "a block keeps state in a plain attribute (`self.calls += 1`), and uses it",
    revcore.InversionError,
    "did something else the second time",
    note="under activation checkpointing the numbers are wrong; make it a buffer, which the engine puts back",
)
def test_stateful_attribute(refused):
    model = ReversibleSequential(Stateful(WIDTH), Stateful(WIDTH)).double()
    with refused:
        train(model)


class Rotary(nn.Module):
    """Makes its tables in the first call and keeps them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(width, width), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.outer(torch.arange(len(x)), torch.linspace(0, 1, x.shape[1])).to(x).cos()
        return torch.tanh(self.linear(x) * self.table)


@buffers.same("a block makes a table in its first call and keeps it (rotary embeddings)", make=Rotary)
def test_lazy_table(model):
    return train(model), train(model)


class LeavesActivation(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.linear(x))
        return self.last * 2


@buffers.same("a block leaves an activation on `self`, and the loss uses it", make=LeavesActivation)
def test_activation_on_self(model):
    x = make_input()
    y = model(x)
    (y.pow(2).sum() + sum(b.last.sin().sum() for b in model)).backward()
    return x.grad
