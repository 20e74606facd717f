"""When something fails, nothing moves, and the next attempt is clean; when a graph is dropped, everything is freed."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, is_recomputing
from revcore_torch.memory import LiveBytes
from tests.torch.harness import WIDTH, block, make_input, train
from tests.torch.registry import Section

failures = Section("Failures")
POLICIES = pytest.mark.parametrize(
    "policy", [Reverse(), pytest.param(Reverse(anchor_every=1), marks=pytest.mark.long), Checkpoint(2)], ids=str
)


class Moody(nn.Module):
    """Moves buffers, draws numbers, and fails when it is told to: in its first run, its second, or its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)
        self.fail: str | None = None
        self.error: BaseException = KeyError("told to")

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(torch.tanh(self.norm(self.linear(x))))
        if self.fail == ("again" if is_recomputing() else "first"):
            raise self.error
        return Failing.apply(h, self.error) if self.fail == "gradient" else h


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ctx.error


def make(policy: Any) -> tuple[ReversibleSequential, ReversibleSequential]:
    torch.manual_seed(0)
    model = ReversibleSequential(*[Moody() for _ in range(4)], policy=policy).double()
    return model, copy.deepcopy(model)


def forward(model: ReversibleSequential) -> Tensor:
    torch.manual_seed(4)
    return model(make_input()).pow(2).sum()


def traces(model: nn.Module) -> list[Tensor]:
    return [*(b.clone() for b in model.buffers()), torch.get_rng_state()]


def assert_equal(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def assert_clean_retry(model: ReversibleSequential, clean: ReversibleSequential) -> None:
    """Not even the buffers are loaded anew."""
    model.zero_grad()
    for b in model:
        b.fail = None  # type: ignore[assignment]
    results = []
    for m in (model, clean):
        torch.manual_seed(5)
        results.append([*train(m), *(p.grad for p in m.parameters()), *traces(m)])
    assert_equal(*results)


def assert_backward_fails_cleanly(refused: Any, model: ReversibleSequential, clean: ReversibleSequential) -> None:
    loss, _ = forward(model), forward(clean)
    before = traces(model)
    with refused:
        loss.backward()
    assert_equal(before, traces(model))
    assert_clean_retry(model, clean)


@failures.refuses("a block raises in the forward pass", KeyError, "told to", note="nothing moved; a retry is clean")
@POLICIES
def test_block_raises_in_forward(refused, policy):
    model, clean = make(policy)
    model[2].fail = "first"
    with refused:
        model(make_input())
    assert_clean_retry(model, clean)


@failures.refuses("a block raises when it is run again", KeyError, "told to", note="nothing moved; a retry is clean")
@POLICIES
def test_block_raises_in_backward(refused, policy):
    model, clean = make(policy)
    model[2].fail = "again"
    assert_backward_fails_cleanly(refused, model, clean)


@failures.refuses("a block's gradient raises", KeyError, "told to", note="nothing moved; a retry is clean")
@POLICIES
def test_gradient_raises(refused, policy):
    model, clean = make(policy)
    model[1].fail = "gradient"
    assert_backward_fails_cleanly(refused, model, clean)


@failures.refuses("Ctrl-C in the backward pass", KeyboardInterrupt, "stop", note="nothing moved; a retry is clean")
@POLICIES
def test_interrupted(refused, policy):
    model, clean = make(policy)
    model[2].fail, model[2].error = "again", KeyboardInterrupt("stop")
    assert_backward_fails_cleanly(refused, model, clean)


@failures.refuses(
    "out of memory in the backward pass", torch.OutOfMemoryError, "no memory", note="nothing moved; a retry is clean"
)
@POLICIES
def test_out_of_memory(refused, policy):
    model, clean = make(policy)
    model[2].fail, model[2].error = "again", torch.OutOfMemoryError("no memory")
    assert_backward_fails_cleanly(refused, model, clean)


@failures.works("a backward pass fails in the middle, and is tried again on the same graph (`retain_graph`)")
@POLICIES
def test_retry_on_the_same_graph(policy):
    model, clean = make(policy)
    torch.manual_seed(5)
    expected = torch.autograd.grad(clean(make_input()).pow(2).sum(), list(clean.parameters()))
    torch.manual_seed(5)
    loss = model(make_input()).pow(2).sum()
    model[0].fail = "again"
    with pytest.raises(KeyError, match="told to"):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    model[0].fail = None
    assert_equal(torch.autograd.grad(loss, list(model.parameters())), expected)


@failures.refuses(
    "the blocks' output is refused after earlier blocks moved buffers", revcore.SpecError, "block 2 returned shape"
)
@POLICIES
def test_failed_forward_takes_back(refused, policy):
    model = ReversibleSequential(Moody(), Moody(), nn.Linear(WIDTH, 1), policy=policy).double()
    before = traces(model)
    with refused:
        model(make_input())
    assert_equal(before, traces(model))


@failures.refuses(
    "parameters were changed, and nothing moves", revcore.InversionError, "block of step 1 cannot be run again"
)
@POLICIES
def test_refused_backward_moves_nothing(refused, policy):
    model, _ = make(policy)
    loss = model(make_input()).pow(2).sum()
    with torch.no_grad():
        model[1].norm.bias.add_(1.0)
    before = traces(model)
    with refused:
        loss.backward()
    assert_equal(before, traces(model))


@failures.works("an exception in the user's code between forward and backward")
@POLICIES
def test_exception_between(policy):
    model, clean = make(policy)
    forward(clean)
    with pytest.raises(ZeroDivisionError):
        forward(model).mul(1 // 0)
    assert_clean_retry(model, clean)


# --- what is freed ----------------------------------------------------------------------------------------------------

freed = Section("What is freed")


class WithContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Any = None, gate: Any = 1) -> Any:
        h = torch.tanh(self.linear(x if context is None else x * context)) * gate
        return h, h.mean()


def live_after(use: Any, policy: Any) -> int:
    """Return the bytes that live after ``use(model, x)`` is done and its result gone; no collector of cycles runs."""
    model = ReversibleSequential(*[WithContext() for _ in range(4)], policy=policy).double()
    x = make_input()
    gc.disable()
    try:
        with LiveBytes() as memory:
            result = use(model, x)
            assert memory.peak > 0
            del result
            model.zero_grad()
            x.grad = None
        return memory.live
    finally:
        gc.enable()


@freed.works("a graph is dropped without a backward pass")
@POLICIES
def test_dropped_graph(policy):
    leaf = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)

    def use(model, x):
        pairs = [((), {"gate": leaf * i}) for i in range(1, 5)]
        return model(x, leaf.exp(), layerwise_args_kwargs=pairs)

    assert live_after(use, policy) == 0


@freed.works("a graph is dropped after one of two backward passes")
@POLICIES
def test_dropped_after_a_backward_pass(policy):
    def use(model, x):
        y, _ = model(x)
        y.sum().backward(retain_graph=True)
        return y

    assert live_after(use, policy) == 0


@freed.works("after a backward pass, while the loss is still held", note="nothing but the loss and the output is kept")
@POLICIES
def test_after_backward(policy):
    model = ReversibleSequential(*[WithContext() for _ in range(8)], policy=policy).double()
    x, leaf = make_input().detach(), make_input(width=WIDTH)
    with LiveBytes() as memory:
        y, aux = model(x, leaf.exp())
        loss = y.pow(2).sum()
        del aux
        loss.backward()
        model.zero_grad()
        leaf.grad = None
        kept = y.nbytes + 2 * loss.nbytes
        assert memory.live <= kept + 64, (memory.live, kept)


@freed.works("a graph is dropped after a gradient of a gradient")
@POLICIES
def test_dropped_after_double_backward(policy):
    def use(model, x):
        y, _ = model(x)
        (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return y, g

    assert live_after(use, policy) == 0


@freed.works("the same, the gradient alone being held, before and after its own backward pass")
@POLICIES
def test_dropped_after_double_backward_of_a_gradient_alone(policy):
    def use(model, x):
        (g,) = torch.autograd.grad(model(x)[0].pow(2).sum(), x, create_graph=True)
        return g

    def use_and_go_on(model, x):
        g = use(model, x)
        g.pow(2).sum().backward()
        return g

    assert live_after(use, policy) == 0
    assert live_after(use_and_go_on, policy) == 0


@freed.works("the output is held after a gradient of a gradient: no streams beside it")
@POLICIES
def test_output_held_after_double_backward(policy):
    model = ReversibleSequential(*[block() for _ in range(4)], policy=policy).double()
    x = make_input()
    with LiveBytes() as memory:
        y = model(x)
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (g.pow(2).sum() + y.sum()).backward()
        model.zero_grad()
        x.grad = None
        del g
        assert memory.live == y.nbytes


@freed.works("a graph is dropped after its backward pass failed")
@POLICIES
def test_dropped_after_a_failure(policy):
    def use(model, x):
        def fail(*_):
            raise KeyError("told to")

        handle = model[1].register_full_backward_hook(fail)
        y, _ = model(x)
        handle.remove()
        try:
            y.sum().backward()
        except KeyError as error:
            error.__traceback__ = None
        # PyTorch's queue of this thread holds the nodes that were ready, until its next backward pass
        torch.ones((), requires_grad=True).backward()
        return y

    assert live_after(use, policy) == 0


@freed.works("only an extra output is held, the graph behind it too")
@POLICIES
def test_extra_output_held(policy):
    assert live_after(lambda model, x: model(x)[1][2], policy) == 0


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Any) -> Tensor:
        h = torch.tanh(self.linear(x))
        memory.items.append(h)
        return h


class Memory:
    def __init__(self) -> None:
        self.items: list[Tensor] = []


@freed.refuses(
    "a graph whose activations the blocks left in an object that they got as argument",
    revcore.SpecError,
    "a block changed what an argument holds",
    note="and freed then",
)
@POLICIES
def test_cycle_through_an_argument(refused, policy):
    model = ReversibleSequential(*[Remembers() for _ in range(4)], policy=policy).double()
    x = make_input()
    with LiveBytes() as memory:
        with refused:
            model(x, Memory())
        gc.collect()
        assert memory.live == 0


class LeavesActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x)
        return self.last


@freed.works("a block leaves an activation on `self`: freed when the next forward pass replaces it")
@POLICIES
def test_activation_on_self_is_freed(policy):
    model = ReversibleSequential(*[LeavesActivation() for _ in range(4)], policy=policy).double()
    x = make_input()
    with LiveBytes() as memory:
        live = []
        for _ in range(3):
            model(x)
            gc.collect()
            live.append(memory.live)
    assert live[0] == live[1] == live[2]


@freed.works("two streams are kept after the forward pass, at any depth")
@pytest.mark.parametrize(
    "depth", [pytest.param(2, marks=pytest.mark.long), 6, pytest.param(18, marks=pytest.mark.long)]
)
def test_two_streams_are_kept(depth):
    model = ReversibleSequential(*[block() for _ in range(depth)]).double()
    x = make_input()
    with LiveBytes() as memory:
        y = model(x)
        assert memory.live == 2 * y.nbytes
