"""What DDP gains is not lost: gradients go out as layers finish, memory does not grow with depth, blocks run twice.

What happens in a backward pass is a log: ``("run", i)`` where block ``i`` runs again, ``("gradient", i)`` where a
parameter of it has its whole gradient, ``("bucket", layers)`` where DDP sends the gradients of these layers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from revcore import Reverse, StoreAll
from revcore_torch.memory import LiveBytes
from tests.distributed.networks import Transformer, assert_close, batches, loss_of, part_of
from tests.distributed.ranks import Cases

CASES = Cases(world=2)
DEPTH = 6
Log = list[tuple[str, Any]]


def log_of_a_step(model: Any, rank: int, world: int) -> Log:
    """Return the log of the backward pass of the third step, when DDP has put its buckets in order."""
    log: Log = []
    layers = {id(p): i for i, block in enumerate(model.blocks) for p in block.parameters()}
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: log.append(("run", i)))
        for p in block.parameters():
            p.register_post_accumulate_grad_hook(lambda p: log.append(("gradient", layers[id(p)])))
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.002)

    def hook(_, bucket):  # DDP takes no annotations but its own
        log.append(("bucket", sorted({layers[id(p)] for p in bucket.parameters() if id(p) in layers})))
        return allreduce_hook(None, bucket)  # pyright: ignore[reportArgumentType]

    wrapped.register_comm_hook(None, hook)
    for batch in batches()[:3]:
        model.zero_grad()
        loss = loss_of(wrapped, part_of(batch, rank, world))
        log.clear()
        loss.backward()
    return log


def without_runs(log: Log) -> Log:
    return [event for event in log if event[0] != "run"]


def late_buckets(log: Log) -> list[tuple[str, Any]]:
    """Return the buckets that were sent after another block had run since the last of their layers was done."""
    late = []
    for at, (kind, layers) in enumerate(log):
        if kind == "bucket" and layers:
            done = max(i for i, event in enumerate(log[:at]) if event[0] == "gradient" and event[1] in layers)
            if any(event[0] == "run" for event in log[done:at]):
                late.append(log[at])
    return late


def assert_overlaps(log: Log, plain: Log) -> None:
    """Fail unless buckets go out as in the plain network, and between the runs of blocks."""
    assert without_runs(log) == plain
    assert [i for kind, i in log if kind == "run"] == list(reversed(range(DEPTH)))
    assert late_buckets(log) == []
    runs = [at for at, event in enumerate(log) if event[0] == "run"]
    early = [event for event in log[: runs[-1]] if event[0] == "bucket"]
    assert len(early) >= DEPTH / 2, f"only {early} went out before the last block had run"


class AllAtOnce(nn.Sequential):
    """A reversible network as one ``autograd.Function``: right gradients, that come together at the end."""

    def forward(self, input: Tensor) -> Tensor:
        return _Whole.apply(self, input, *self.parameters())  # type: ignore[return-value]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, network: nn.Sequential, input: Tensor, *parameters: Tensor) -> Tensor:
        x0, x1 = input.chunk(2, -1)
        for block in network:
            x0, x1 = x1, x0 + block(x1)
        ctx.network, ctx.streams = network, (x0, x1)
        return torch.cat((x0, x1), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        y0, y1 = ctx.streams
        g0, g1 = gradients[0].chunk(2, -1)
        found: list[Tensor] = []
        for block in reversed(list(ctx.network)):
            source = y0.detach().requires_grad_()
            with torch.enable_grad():
                f = block(source)
            parts = torch.autograd.grad(f, (source, *block.parameters()), g1)
            y0, y1 = y1 - f.detach(), y0
            g0, g1 = g1, g0 + parts[0]
            found = [*parts[1:], *found]
        return None, torch.cat((g0, g1), -1), *found


@CASES
def gradients_go_out_as_layers_finish(rank: int, world: int) -> None:
    plain = log_of_a_step(Transformer(DEPTH, reversible=False).double(), rank, world)
    assert len([event for event in plain if event[0] == "bucket"]) > DEPTH
    assert_overlaps(log_of_a_step(Transformer(DEPTH).double(), rank, world), plain)


@CASES
def gradients_that_come_at_the_end_are_noticed(rank: int, world: int) -> None:
    """The network in one ``autograd.Function`` has right gradients and no overlap."""
    plain = Transformer(DEPTH, reversible=False).double()
    other: Any = Transformer(DEPTH, reversible=False).double()
    other.blocks = AllAtOnce(*other.blocks)
    log = log_of_a_step(plain, rank, world)
    late = log_of_a_step(other, rank, world)
    theirs, ours = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, other))
    assert_close(ours, theirs)
    runs = [at for at, event in enumerate(late) if event[0] == "run"]
    assert len(runs) == DEPTH
    sent = [event for event in late[: runs[-1]] if event[0] == "bucket" and event[1]]
    assert sent == []
    with pytest.raises(AssertionError):
        assert_overlaps(late, log)
    with pytest.raises(AssertionError, match="went out before the last block had run"):  # the order alone does not do
        assert_overlaps(late, without_runs(late))


def live_after_forward(policy: Any, depth: int, rank: int, world: int) -> int:
    wrapped = DistributedDataParallel(Transformer(depth, policy=policy).double())
    live = 0
    for batch in batches()[:3]:  # in the first two DDP makes its buckets
        with LiveBytes() as memory:
            loss = loss_of(wrapped, part_of(batch, rank, world))
            live = memory.live
        loss.backward()
    return live


@CASES
def what_is_held_does_not_grow_with_depth(rank: int, world: int) -> None:
    shallow, deep = (live_after_forward(Reverse(), depth, rank, world) for depth in (2, 8))
    assert shallow == deep > 0, (shallow, deep)
    assert live_after_forward(StoreAll(), 2, rank, world) < live_after_forward(StoreAll(), 8, rank, world)


@CASES
def blocks_run_twice_a_step(rank: int, world: int) -> None:
    options: dict[str, Any]
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        model, calls = Transformer().double(), Counter[int]()
        for i, block in enumerate(model.blocks):
            block.register_forward_hook(lambda *_, i=i, calls=calls: calls.update([i]))
        wrapped = DistributedDataParallel(model, **options)
        for batch in batches():
            loss_of(wrapped, part_of(batch, rank, world)).backward()
        assert calls == dict.fromkeys(range(4), 2 * len(batches()))


outcomes, test_on_two_ranks = CASES.tests(__file__)


def test_a_bucket_that_waits_for_a_block_is_late() -> None:
    log: Log = [("run", 1), ("gradient", 1), ("run", 0), ("bucket", [1]), ("gradient", 0), ("bucket", [0])]
    assert late_buckets(log) == [("bucket", [1])]


if __name__ == "__main__":
    CASES.run()
