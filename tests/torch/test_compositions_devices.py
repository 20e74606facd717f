"""Threads and GPUs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll
from tests.torch.harness import EVERYTHING, block, dropout_block, make_input, norm
from tests.torch.registry import Section

POLICIES = pytest.mark.parametrize(
    "policy", [Reverse(), pytest.param(Reverse(anchor_every=2), marks=pytest.mark.long), Checkpoint()], ids=str
)

# --- threads ----------------------------------------------------------------------------------------------------------

threads = Section("Threads")


def in_thread(function: Any, *args: Any) -> None:
    failed = []

    def run() -> None:
        try:
            function(*args)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@threads.same("the backward pass in another thread than the forward pass", settings=EVERYTHING)
def test_backward_in_another_thread(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    in_thread(loss.backward)
    return x.grad


@threads.same("the forward pass in another thread")
def test_forward_in_another_thread(model):
    x = make_input()
    losses = []
    in_thread(lambda: losses.append(model(x).pow(2).sum()))
    losses[0].backward()
    return x.grad


@threads.works("several threads train one model at once", note="blocks without random numbers")
@POLICIES
def test_threads_at_once(policy):
    torch.manual_seed(0)
    model = ReversibleSequential(*[block() for _ in range(6)], policy=policy).double()
    inputs = [(i + 1) * make_input().detach() for i in range(4)]
    expected = [gradients_of(model, x) for x in inputs]
    got: list[Any] = [None] * len(inputs)
    barrier = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        barrier.wait(timeout=60)
        for _ in range(5):
            got[i] = gradients_of(model, inputs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def gradients_of(model: nn.Module, x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).pow(2).sum(), [x, *model.parameters()])


@threads.works("several threads go back through one graph at once (`retain_graph`)")
@POLICIES
def test_one_graph_in_several_threads(policy):
    torch.manual_seed(0)
    model = ReversibleSequential(*[block() for _ in range(6)], policy=policy).double()
    x = make_input()
    loss = model(x).pow(2).sum()
    expected = torch.autograd.grad(loss, x, retain_graph=True)[0]
    got: list[Any] = []
    failed: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        try:
            barrier.wait(timeout=60)
            got.extend(torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(5))
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed, failed[0]
    assert len(got) == 20
    assert all(torch.equal(g, expected) for g in got)


# --- CUDA -------------------------------------------------------------------------------------------------------------

cuda = Section("CUDA")
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and there is none"),
]


def on_gpu(test: Any) -> Any:
    for mark in GPU:
        test = mark(test)
    return test


@cuda.works("training on a GPU, with dropout", note="marked `gpu`, skipped without one; not yet run on one")
@on_gpu
@POLICIES
def test_on_a_gpu(policy):
    results = []
    for p in (StoreAll(), policy):
        torch.manual_seed(0)
        model = ReversibleSequential(*[dropout_block() for _ in range(5)], policy=p).double().cuda()
        x = make_input().detach().cuda().requires_grad_()
        model(x).pow(2).sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters()), torch.cuda.get_rng_state()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@cuda.works("autocast on a GPU with a `GradScaler`", note="marked `gpu`, skipped without one; not yet run on one")
@on_gpu
@POLICIES
def test_grad_scaler_on_a_gpu(policy):
    grads = []
    for p in (StoreAll(), policy):
        torch.manual_seed(0)
        model = ReversibleSequential(*[dropout_block() for _ in range(5)], policy=p).cuda()
        x = make_input().detach().float().cuda()
        scaler = torch.amp.GradScaler("cuda")
        with torch.autocast("cuda", torch.float16):
            loss = model(x).float().pow(2).sum()
        scaler.scale(loss).backward()
        grads.append([p.grad for p in model.parameters()])
    assert norm([a - b for a, b in zip(*grads, strict=True)]) <= 1e-2 * norm(grads[0])


@cuda.works(
    "a training step captured as a CUDA graph, and replayed",
    note="marked `gpu`, skipped without one; not yet run on one",
)
@on_gpu
@POLICIES
def test_cuda_graph(policy):
    torch.manual_seed(0)
    model = ReversibleSequential(*[block() for _ in range(5)], policy=policy).double().cuda()
    x = make_input().detach().cuda().requires_grad_()
    inputs = [x, *model.parameters()]

    def step() -> Any:
        return torch.autograd.grad(model(x).pow(2).sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(2)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@cuda.works("the backward pass on another CUDA stream", note="marked `gpu`, skipped without one; not yet run on one")
@on_gpu
@POLICIES
def test_cuda_streams(policy):
    torch.manual_seed(0)
    model = ReversibleSequential(*[block() for _ in range(5)], policy=policy).double().cuda()
    x = make_input().detach().cuda().requires_grad_()
    expected = torch.autograd.grad(model(x).pow(2).sum(), x)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss = model(x).pow(2).sum()
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected, rtol=1e-11, atol=1e-11)
