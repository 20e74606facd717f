"""Time, memory, block calls and gradients of one training step."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.torch_engine.ways import Net
from benchmarks.torch_engine.workloads import Blocks, Workload
from revcore_torch import memory


@dataclass
class Step:
    """One training step but for the optimizer: forward, loss, backward; gradients add up."""

    net: Net
    x: Tensor

    def __call__(self, after_forward: Callable[[], None] = lambda: None) -> None:
        y = self.net(self.x)
        after_forward()
        loss = y.square().mean()
        del y  # as where the loss is a function's last line; else the output would be held all the way back
        loss.backward()


# --- memory ---------------------------------------------------------------------------------------------------------


class LiveBytes(memory.LiveBytes):
    """The counter, which also sees storages that are resized in place: memcnn empties its inputs so."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.settle()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _see(self, leaf: Any, counts: bool) -> None:
        before = len(self._sizes)
        super()._see(leaf, counts)
        if counts and len(self._sizes) > before:
            storage = leaf.untyped_storage()
            self._storages[id(storage)] = weakref.ref(storage)

    def settle(self) -> None:
        """Read all sizes again."""
        for key, reference in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[key]
            else:
                self.live += storage.nbytes() - self._sizes[key]
                self._sizes[key] = storage.nbytes()


@dataclass(frozen=True)
class Bytes:
    """What a step took beyond parameters, gradients and input."""

    held: int
    peak: int


class Device(Protocol):
    """Where it runs, and how time and memory are read there."""

    name: str

    def describe(self) -> str: ...
    def memory(self, step: Step) -> Bytes: ...
    def seconds(self, step: Step, repeats: int) -> float: ...


class Cpu:
    name = "cpu"

    def describe(self) -> str:
        return f"{torch.get_num_threads()} threads"

    def memory(self, step: Step) -> Bytes:
        held: list[int] = []

        def read() -> None:
            live.settle()
            held.append(live.live)

        with LiveBytes() as live:
            step(read)
        return Bytes(held[0], live.peak)

    def seconds(self, step: Step, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats


class Cuda:
    name = "cuda"

    def describe(self) -> str:
        return torch.cuda.get_device_name()

    def memory(self, step: Step) -> Bytes:
        held: list[int] = []
        step()  # what libraries take for good on their first call is not the step's
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(lambda: held.append(torch.cuda.memory_allocated()))
        return Bytes(held[0] - before, torch.cuda.max_memory_allocated() - before)

    def seconds(self, step: Step, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats


def device(name: str) -> Device:
    """Return the device of that name."""
    return Cuda() if name == "cuda" else Cpu()


def largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Return the largest ``n ≤ most`` that fits to within 1/16, given that what fits goes on fitting below; 0 if none.

    >>> largest(lambda n: n <= 1000, 4, 10**6)
    976
    """
    good, bad = 0, start
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        if middle <= most and fits(middle):
            good = middle
        else:
            bad = middle
    return good


def floor(blocks: Blocks, workload: Workload) -> float:
    """What no way of rebuilding can do without, in S: two streams, their gradients, and one block's saved tensors.

    A block's saved source is a stream, and its parameters are there anyhow; neither counts twice.
    """
    most = 0
    for block in blocks[:2]:
        x = workload.input(1)
        x.grad = None
        there = {t.untyped_storage().data_ptr() for t in (x, *block.parameters())}
        saved: dict[int, int] = {}

        def pack(t: Tensor, there: set[int] = there, saved: dict[int, int] = saved) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in there:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(x)
        most = max(most, sum(saved.values()))
        del y
    return 4 + most / workload.stream_bytes


# --- calls and gradients --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted(blocks: Blocks) -> Iterator[list[int]]:
    """Count how often each block is called; memcnn calls ``forward`` itself, so hooks would miss it."""
    calls = [0] * len(blocks)
    for i, block in enumerate(blocks):

        def forward(*args: Any, i: int = i, plain: Any = block.forward) -> Any:
            calls[i] += 1
            return plain(*args)

        block.forward = forward
    try:
        yield calls
    finally:
        for block in blocks:
            del block.forward


def gradients(step: Step, blocks: Blocks) -> Tensor:
    """Return all gradients of one step, those of the input first, in one vector."""
    leaves = [step.x, *(p for block in blocks for p in block.parameters())]
    for leaf in leaves:
        assert leaf.grad is not None
        leaf.grad.zero_()
    step()
    return torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
