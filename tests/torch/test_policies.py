"""What each policy keeps and runs again, counted: bytes, matrix products, calls. No policy changes a value."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll, is_recomputing
from revcore_torch.keep import from_host, to_host
from revcore_torch.memory import LiveBytes

WIDTH, ROWS, DEPTH = 8, 4, 6
STREAM = ROWS * WIDTH * 8
ADDMM = torch.ops.aten.addmm.default
GELU = torch.ops.aten.gelu.default
TANH = torch.ops.aten.tanh.default


class Operations(TorchDispatchMode):
    """Count the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def block(p: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(p), nn.Linear(WIDTH, WIDTH))


def network(policy: Any, make: Callable[[], nn.Module] = block, depth: int = DEPTH) -> ReversibleSequential:
    torch.manual_seed(0)
    return ReversibleSequential(*[make() for _ in range(depth)], policy=policy).double()


def make_input() -> Tensor:
    return torch.randn(
        ROWS, 2 * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()


def gradients(model: nn.Module, times: int = 1) -> list[Tensor]:
    """Return all gradients after a forward pass and ``times`` backward passes over its graph."""
    torch.manual_seed(5)
    x = make_input()
    loss = model(x).pow(2).sum()
    for i in range(times):
        loss.backward(retain_graph=i < times - 1)
    return [x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def assert_like_store_all(model: ReversibleSequential, times: int = 1) -> None:
    plain = copy.deepcopy(model)
    plain.policy = StoreAll()
    for got, expected in zip(gradients(model, times), gradients(plain, times), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def addmms(policy: Any, p: float = 0.0) -> int:
    """Return the matrix products of a block that run in the backward pass beside those of the gradients."""
    model = network(policy, lambda: block(p))
    loss = model(make_input()).sum()
    with Operations() as operations:
        loss.backward()
    return operations.count["aten.addmm.default"]


def held(policy: Any, **settings: Any) -> float:
    """Return the streams' worth of tensors that live after the forward pass, beside the output."""
    model = network(policy, **settings)
    x = make_input()
    with LiveBytes() as memory:
        y = model(x)
        live = memory.live
    return live / STREAM - y.nbytes / STREAM


# --- selected operations ----------------------------------------------------------------------------------------------


def keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is ADDMM else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIONS = [[ADDMM], [TANH], [ADDMM, TANH, torch.ops.aten.native_dropout.default], keep_products]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("recompute", SELECTIONS, ids=["products", "tanh", "dropout too", "a function"])
@pytest.mark.parametrize("kind", [Reverse, Checkpoint])
def test_selected_operations_change_no_value(kind: Any, recompute: Any, p: float, times: int) -> None:
    assert_like_store_all(network(kind(recompute=recompute), lambda: block(p)), times)


def test_what_is_drawn_after_a_kept_draw_is_drawn_alike() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = torch.bernoulli(x.detach().sigmoid())
            return (x * kept).tanh() + x.sin() * torch.rand_like(x)

    assert_like_store_all(network(Reverse(recompute=[torch.ops.aten.bernoulli.default]), Twice))


def test_kept_products_are_not_run_again() -> None:
    assert addmms(StoreAll()) == 0
    assert addmms(Reverse()) == 2 * DEPTH
    assert addmms(Reverse(recompute=[ADDMM])) == 0
    assert addmms(Reverse(recompute=[ADDMM], keep_last=2)) == 0


def test_a_selection_of_the_last_product_skips_half() -> None:
    class Last:
        """Keep each block's second product, whose result is the block's."""

        def __init__(self) -> None:
            self.seen = 0

        def __call__(self, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
            self.seen += op is ADDMM
            return op is ADDMM and self.seen % 2 == 0

    policy = Reverse(recompute=Last())
    assert addmms(policy) == DEPTH
    assert held(policy) == 2 + DEPTH  # the streams, and each block's output


def test_kept_results_are_freed_as_the_backward_pass_goes() -> None:
    model = network(Reverse(recompute=[ADDMM])).requires_grad_(False)  # so that no gradient of theirs lives meanwhile
    x = make_input()
    lives: list[int] = []
    for each in model:
        each.register_forward_pre_hook(lambda *_: lives.append(memory.live))
    with LiveBytes() as memory:
        y = model(x)
        after_forward = memory.live
        del lives[:]
        loss = y.sum()
        loss.backward()
        assert after_forward - y.nbytes == (2 + 2 * DEPTH) * STREAM
        # between one second run and the next, the step in between gives up its two results
        assert [a - b for a, b in pairwise(lives[2:])] == [2 * STREAM] * (DEPTH - 3)
        del y
        assert x.grad is not None
        assert memory.live == loss.nbytes + x.grad.nbytes


def test_a_kept_result_that_is_changed_in_place_is_refused() -> None:
    model = network(Reverse(recompute=[ADDMM]), lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)))
    with pytest.raises(revcore.SpecError, match=r"step 0 changed the result of aten\.addmm\.default in place"):
        model(make_input())


@pytest.mark.parametrize("policy", [Reverse(recompute=[torch.ops.aten.mm.default]), Reverse()], ids=str)
def test_a_kept_product_that_a_bias_is_added_to_in_place_is_refused(policy) -> None:
    """A product of batches lies under a view that counts versions by itself; DeepSpeed's linear layer adds to it."""

    class Biased(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            y = input.matmul(self.weight.t())
            y += self.bias
            return y

    model, x = network(policy, lambda: Biased(WIDTH, WIDTH)), torch.randn(3, 2, 2 * WIDTH, dtype=torch.float64)
    model.split_dim = -1
    if policy == Reverse():
        model(x).sum().backward()
        return
    with pytest.raises(revcore.SpecError, match=r"step 0 changed the result of aten\.mm\.default in place"):
        model(x)


def test_a_packet_of_operators_is_refused() -> None:
    with pytest.raises(revcore.SpecError, match=r"recompute holds .*expected operators such as torch\.ops\.aten\.mm"):
        network(Reverse(recompute=[torch.ops.aten.addmm]))(make_input())


@pytest.mark.parametrize("again", [lambda x: x.sin().tanh().tanh(), lambda x: x.sin()], ids=["more", "fewer"])
def test_a_block_that_runs_a_kept_operation_another_number_of_times_is_refused(again: Any) -> None:
    class Fickle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return again(x) if is_recomputing() else x.tanh()

    model = network(Reverse(recompute=[TANH]), Fickle)
    loss = model(make_input()).sum()
    with pytest.raises(revcore.InversionError, match=r"ran aten\.tanh\.default [02] times the second time and 1 times"):
        loss.backward()


def test_an_operation_that_writes_into_its_argument_is_not_kept() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.sin() + 1).mul_(2).tanh()

    assert_like_store_all(network(Reverse(recompute=[torch.ops.aten.mul_.Tensor]), Writes))


# --- by step ----------------------------------------------------------------------------------------------------------

BY_STEP: list[list[Any]] = [
    [Reverse()] * 3 + [StoreAll()] * 3,
    [StoreAll()] * 3 + [Reverse()] * 3,
    [Reverse(), StoreAll(), Checkpoint(), Reverse(), StoreAll(), Reverse(recompute=[ADDMM])],
    [Checkpoint(every=2)] * 4 + [Reverse(keep_last=1)] * 2,
]


@pytest.mark.parametrize("policies", BY_STEP, ids=range(len(BY_STEP)))
def test_policies_by_step_change_no_value(policies: list[Any]) -> None:
    assert_like_store_all(network(policies, lambda: block(0.4)))


def test_policies_by_step_keep_what_each_says() -> None:
    assert held([StoreAll()] * 2 + [Reverse()] * 4) == held(StoreAll(), depth=2) + 2
    assert addmms([StoreAll()] * 2 + [Reverse()] * 4) == 2 * 4
    assert addmms([Checkpoint()] * 6) == addmms(Checkpoint())


def test_checkpoints_stop_before_the_last_product() -> None:
    assert addmms(Checkpoint()) == addmms(Checkpoint(), p=0.4) == DEPTH
    assert addmms(Checkpoint(every=2)) == 2 * DEPTH - DEPTH // 2


def test_a_block_that_draws_after_all_is_saved_runs_to_its_end() -> None:
    runs: list[str] = []

    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            f = x.tanh()
            runs.append("saved")
            f = f + torch.rand_like(x)
            runs.append("drawn")
            return f

    model = network(Checkpoint(), Late, depth=1)
    model(make_input()).sum().backward()
    assert runs == ["saved", "drawn"] * 2


def test_a_wrong_number_of_policies_is_refused_before_a_block_runs() -> None:
    model = network([Reverse()] * 5)
    model[0].register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(revcore.SpecError, match="policy came with 5 entries, expected one for each of the 6 steps"):
        model(make_input())


# --- in the host's memory ---------------------------------------------------------------------------------------------

OFFLOADING = [
    StoreAll(offload=True),
    Reverse(offload=True),
    Reverse(anchor_every=2, keep_last=1, offload=True, recompute=[ADDMM]),
    Checkpoint(every=2, offload=True),
]


@pytest.mark.parametrize("policy", OFFLOADING, ids=str)
def test_offloading_changes_no_value(policy: Any) -> None:
    assert_like_store_all(network(policy, lambda: block(0.4)))


def test_what_is_in_the_hosts_memory_stays_there_and_parameters_stay_where_they_are() -> None:
    kept = torch.ones(3)
    assert to_host(kept) is kept
    assert from_host(to_host(kept)) is kept
    weight = torch.empty(3, device="meta", requires_grad=True)
    assert to_host(weight) is weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", OFFLOADING, ids=str)
def test_offloading_leaves_nothing_of_the_streams_on_the_gpu(policy: Any) -> None:
    model = network(policy).cuda()
    x = make_input().detach().cuda().requires_grad_()
    before = torch.cuda.memory_allocated()
    y = model(x)
    assert torch.cuda.memory_allocated() - before <= y.nbytes + 512 * (DEPTH + 1)  # the allocator's granularity
    y.pow(2).sum().backward()
    plain = copy.deepcopy(model)
    plain.policy = StoreAll()
    expected = torch.autograd.grad(plain(x).pow(2).sum(), list(plain.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
