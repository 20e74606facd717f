"""What a step of a reversible network moves, keeps and refuses under FSDP2: counted, as for the plain one."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import revcore
from revcore.errors import InversionError
from revcore_torch import Checkpoint, Reverse, StoreAll
from revcore_torch.memory import LiveBytes
from tests.distributed.networks import Transformer, assert_close, batches, distance, loss_of, part_of
from tests.distributed.ranks import Cases
from tests.distributed.sharding import VIEW, events, gradients, shard
from tests.plain.pytorch import Plain

if TYPE_CHECKING or __name__ == "__main__":
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor

CASES = Cases(world=2)
DEPTH = 4


class Checkpointed(Plain):
    """The plain network under PyTorch's activation checkpointing."""

    def forward(self, input: Tensor) -> Tensor:
        x0, x1 = input.chunk(2, -1)
        for block in self:
            x0, x1 = x1, x0 + checkpoint(block, x1, use_reentrant=False)  # type: ignore[operator]
        return torch.cat((x0, x1), -1)


def step(model: Any, rank: int, world: int) -> list[str]:
    """Return what goes on in the second training step: the first one makes what is made once."""
    rows = part_of(batches()[0], rank, world)
    loss_of(model, rows).backward()
    with events(list(model.blocks)) as log:
        loss = loss_of(model, rows)
        log.append("turn")
        loss.backward()
    return log


def only(log: list[str], *words: str) -> list[str]:
    return [entry for entry in log if entry.split()[0] in words]


def assert_reduced_as_layers_finish(log: list[str], depth: int) -> None:
    """Fail unless gradients of block ``i`` leave before block ``i − 2`` runs again."""
    reduces = [at for at, entry in enumerate(log) if entry == "reduce"]
    assert len(reduces) == depth + 1, log
    for i in range(2, depth):
        assert reduces[depth - 1 - i] < log.index(f"again {i - 2}"), (i, log)


@CASES
def collectives(rank: int, world: int) -> None:
    for each in (True, False):
        for reshard in (True, False):
            plain, ours = (
                step(shard(Transformer(reversible=kind), each, reshard_after_forward=reshard), rank, world)
                for kind in (False, True)
            )
            groups = DEPTH + 1 if each else 1
            moved = ["gather"] * groups + ["turn"] + ["gather"] * groups * reshard
            assert only(ours, "gather", "turn") == only(plain, "gather", "turn") == moved, (each, reshard, ours, plain)
            assert only(ours, "reduce") == only(plain, "reduce") == ["reduce"] * groups
            assert only(ours, "run") == [f"run {i}" for i in range(DEPTH)]
            assert only(ours, "again") == [f"again {i}" for i in reversed(range(DEPTH))]
            if each:
                assert_reduced_as_layers_finish(ours, DEPTH)


@CASES
def collectives_under_checkpointing(rank: int, world: int) -> None:
    model: Any = Transformer(reversible=False)
    model.blocks = Checkpointed(*model.blocks)
    theirs = step(shard(model), rank, world)
    ours, by_policy = (step(shard(Transformer(policy=policy)), rank, world) for policy in (Reverse(), Checkpoint()))
    for words in (("gather", "turn"), ("reduce", "turn")):
        assert only(theirs, *words) == only(ours, *words) == only(by_policy, *words)
    assert len(only(theirs, "run")) == 2 * DEPTH


@CASES
def parameters_between_the_passes(rank: int, world: int) -> None:
    for reshard in (True, False):
        model = shard(Transformer().double(), reshard_after_forward=reshard)
        for _ in range(2):
            gathered: dict[str, Tensor] = {}

            def look(i: int, block: Any, seen: dict[str, Tensor]) -> Any:
                return lambda *_: seen.update({f"{i}.{name}": p for name, p in block.named_parameters()})

            # of a layer inside: after the block's own hook the parameters are sharded again
            handles = [
                block.norm.register_forward_hook(look(i, block, gathered)) for i, block in enumerate(model.blocks)
            ]
            loss = loss_of(model, part_of(batches()[0], rank, world))
            held = sum(p.untyped_storage().nbytes() for p in gathered.values())
            sizes = sum(p.numel() * p.element_size() for p in gathered.values())
            assert not any(isinstance(p, DTensor) for p in gathered.values())
            assert (held, sizes > 0) == (0 if reshard else sizes, True)
            parts = [p for block in model.blocks for p in block.parameters()]
            assert all(isinstance(p, DTensor) == reshard for p in parts)
            if reshard:
                local = [p.to_local() for p in parts]
                assert sum(t.untyped_storage().nbytes() for t in local) * world == sizes
            loss.backward()
            for handle in handles:
                handle.remove()
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert sum(p.untyped_storage().nbytes() for p in gathered.values()) == 0


def held_after_forward(depth: int, policy: Any, rank: int, world: int) -> int:
    """Return the bytes made in a forward pass that live after it; gathered parameters are made in a step before."""
    model = shard(Transformer(depth, policy=policy).double())
    rows = part_of(batches()[0], rank, world)
    loss_of(model, rows).backward()
    model.zero_grad(set_to_none=False)
    gc.collect()
    with LiveBytes() as memory:
        loss = loss_of(model, rows)
        gc.collect()
        held = memory.live
    loss.backward()
    return held


@CASES
def held_bytes_do_not_grow_with_depth(rank: int, world: int) -> None:
    assert held_after_forward(4, Reverse(), rank, world) == held_after_forward(8, Reverse(), rank, world)
    assert held_after_forward(4, StoreAll(), rank, world) < held_after_forward(8, StoreAll(), rank, world)


@CASES
def weights_changed_before_the_backward_pass(rank: int, world: int) -> None:
    rows = part_of(batches()[0], rank, world)

    def run(policy: Any, moved: bool, foreach: bool = False, each: bool = True, **settings: Any) -> Any:
        model = shard(Transformer(policy=policy).double(), each, **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=foreach)
        loss_of(model, rows).backward()  # the optimizer's first step makes nothing new
        optimizer.step()
        loss = loss_of(model, rows)
        if moved:
            optimizer.step()
        optimizer.zero_grad()
        loss.backward()
        return gradients(model)

    true = run(StoreAll(), moved=False)
    for foreach in (False, True):
        for policy in (Reverse(), Checkpoint()):
            with pytest.raises(InversionError, match=r"parameters were changed in place after the forward pass"):
                run(policy, True, foreach)
    for kept in ({"reshard_after_forward": False}, {"each": False}):  # the old ones are still there
        assert_close(run(Reverse(), True, **kept), true)


HALF = torch.bfloat16


def half(**settings: Any) -> dict[str, Any]:
    return {"mp_policy": MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=torch.float32, **settings)}


def error(rank: int, world: int, policy: Any, root: Any, stream_dtype: Any = None, **settings: Any) -> Any:
    """Return how far gradients are from float64's, and in which dtype the input of the blocks came."""
    true = Transformer(8, reversible=False).double()
    loss_of(true, batches()[0]).backward()
    model = shard(Transformer(8, policy=policy, stream_dtype=stream_dtype), root=root, **half(**settings))
    seen: list[torch.dtype] = []
    model.blocks.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    loss_of(model, part_of(batches()[0], rank, world)).backward()
    found = gradients(model)
    assert {g.dtype for g in found.values()} == {torch.float32}
    return distance(found, {n: p.grad for n, p in true.named_parameters() if p.grad is not None}), seen[0]


@CASES
def bfloat16(rank: int, world: int) -> None:
    ours: dict[str, float] = {}
    for name, root, stream_dtype, settings, came in (
        ("blocks alone", {}, None, {}, torch.float32),
        ("blocks alone, float32 out", {}, None, {"output_dtype": torch.float32}, torch.float32),
        ("all", None, None, {}, HALF),
        ("all, float32 streams", None, "float32", {}, HALF),
    ):
        (stored, _), (ours[name], seen) = (
            error(rank, world, policy, root, stream_dtype, **settings) for policy in (StoreAll(), Reverse())
        )
        assert seen == came, name
        bound = 2 if name == "all" else 1.05  # of store-all's own error
        if rank == 0:  # for docs/distributed.md
            print(f"{name}: store-all {stored:.2e}, reversible {ours[name]:.2e}", flush=True)
        assert stored > 1e-5
        assert ours[name] <= bound * stored, (name, ours[name], stored)
    assert ours["blocks alone"] < 0.7 * ours["all"]


@CASES
def a_warning_where_streams_are_bfloat16(rank: int, world: int) -> None:
    for root, warned in (({}, 0), (None, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("ignore", VIEW)
            warnings.simplefilter("always", category=UserWarning)
            error(rank, world, Reverse(keep_last=1), root)  # a policy that no other case was warned of
        words = [str(w.message) for w in caught if "run back in bfloat16" in str(w.message)]
        assert len(words) == warned, words
        assert all("float32 streams (blocks may stay in bfloat16" in text for text in words)


@CASES
def a_block_that_widens_is_refused(rank: int, world: int) -> None:
    with pytest.raises(
        revcore.SpecError, match=r"step 0 turned a stream of torch.bfloat16.*hold the streams in the wi"
    ):
        error(rank, world, Reverse(), None, output_dtype=torch.float32)


def test_gradients_that_all_leave_at_the_end_are_found() -> None:
    again = [f"again {i}" for i in reversed(range(DEPTH))]
    with pytest.raises(AssertionError):
        assert_reduced_as_layers_finish(again + ["reduce"] * (DEPTH + 1), DEPTH)
    alternating = [entry for block in again for entry in (block, "reduce")]
    assert_reduced_as_layers_finish([*alternating, "reduce"], DEPTH)


outcomes, test_on_two_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", VIEW)
    warnings.filterwarnings("ignore", "this program of .* steps, run back in")
    CASES.run()
