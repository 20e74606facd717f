"""``torch.distributed.pipelining``: a stage is a part of the network; one process's gradients, and no third run."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from revcore import Additive, Momentum
from revcore_torch import Reverse, StoreAll
from tests.distributed.networks import (
    STEPS,
    Transformer,
    adamw,
    assert_close,
    batches,
    train_alone,
    values_of,
    with_lora,
)
from tests.distributed.ranks import Cases

if TYPE_CHECKING or __name__ == "__main__":
    from torch.distributed import pipelining

CASES = Cases(world=2)
DEPTH, MICRO_BATCHES = 5, 4


def stage_of(model: Any, cut: int, rank: int) -> nn.Sequential:
    """Return a rank's half; what travels between them is the concatenated tensor that the first half returns."""
    if rank == 0:
        return nn.Sequential(model.embedding, model.blocks[:cut])
    return nn.Sequential(model.blocks[cut:], model.norm, model.head)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(model: Any, cut: int, rank: int, world: int, schedule: str = "Schedule1F1B") -> list[float]:
    """Train this rank's part of ``model``; return the losses on the last rank."""
    part = stage_of(model, cut, rank)
    stage = pipelining.PipelineStage(part, rank, world, next(model.parameters()).device)
    pipeline, optimizer, found = getattr(pipelining, schedule)(stage, MICRO_BATCHES, loss), adamw(part.parameters()), []
    for batch in batches(rows=8):
        optimizer.zero_grad()
        if rank == 0:
            pipeline.step(batch[:, :-1].contiguous())
        else:
            losses: list[Tensor] = []
            pipeline.step(target=batch[:, 1:].contiguous(), losses=losses)
            found.append(sum(value.item() for value in losses) / MICRO_BATCHES)
        optimizer.step()
    return found


def assert_same_part(model: Any, alone: Any, cut: int, rank: int) -> None:
    """Fail unless this rank's part ended where the same part of the network in one process ended."""
    plain = {0: ("embedding.",), 1: ("norm.", "head.")}[rank]
    blocks = tuple(f"blocks.{i}." for i in range(DEPTH) if (i < cut) == (rank == 0))
    ours, theirs = ({n: v for n, v in values_of(m).items() if n.startswith(plain + blocks)} for m in (model, alone))
    assert_close(ours, theirs)


def frozen(model: Any) -> Any:
    for i in (1, 3):  # one in each half
        model.blocks[i].requires_grad_(False)
    return model


def tied(model: Any) -> Any:
    """Let two blocks of the second half have one weight."""
    model.blocks[4].qkv.weight = model.blocks[2].qkv.weight
    return model


def same_as_alone(cut: int, schedule: str = "Schedule1F1B", change: Any = lambda model: model, **settings: Any) -> Any:
    def case(rank: int, world: int) -> None:
        alone = change(Transformer(DEPTH, reversible=False).double())
        expected = train_alone(alone, batches(rows=8))
        model = change(Transformer(DEPTH, **settings).double())
        losses = train(model, cut, rank, world, schedule)
        assert_same_part(model, alone, cut, rank)
        if rank == world - 1:
            assert losses == pytest.approx(expected, rel=1e-12)

    return case


for cut in (2, 3):  # an even and an odd number of steps before the cut
    CASES.add(f"1F1B, cut at {cut}", same_as_alone(cut))
CASES.add("GPipe", same_as_alone(2, "ScheduleGPipe"))
CASES.add("frozen blocks", same_as_alone(2, change=frozen))
CASES.add("tied weights", same_as_alone(2, change=tied))
CASES.add("LoRA", same_as_alone(2, change=with_lora))
CASES.add("anchors", same_as_alone(3, policy=Reverse(anchor_every=2)))


def two_stages_a_rank(schedule: str, **settings: Any) -> Any:
    """Return a case: the first rank has the first and the third of four stages; the last has two blocks."""

    def case(rank: int, world: int) -> None:
        alone = Transformer(DEPTH, reversible=False).double()
        train_alone(alone, batches(rows=8))
        model = Transformer(DEPTH, **settings).double()
        cuts = [model.blocks[:1], model.blocks[1:2], model.blocks[2:3], model.blocks[3:]]
        parts = [nn.Sequential(model.embedding, cuts[0]), *cuts[1:3], nn.Sequential(cuts[3], model.norm, model.head)]
        device = next(model.parameters()).device
        stages = [pipelining.PipelineStage(parts[i], i, 2 * world, device) for i in (rank, rank + world)]
        pipeline, optimizer = getattr(pipelining, schedule)(stages, MICRO_BATCHES, loss), adamw(model.parameters())
        for batch in batches(rows=8):
            optimizer.zero_grad()
            if rank == 0:
                pipeline.step(batch[:, :-1].contiguous())
            else:
                pipeline.step(target=batch[:, 1:].contiguous())
            optimizer.step()
        here = {id(p) for i in (rank, rank + world) for p in parts[i].parameters()}
        names = [name for name, p in model.named_parameters() if id(p) in here]
        ours, theirs = values_of(model), values_of(alone)
        assert_close({name: ours[name] for name in names}, {name: theirs[name] for name in names})

    return case


CASES.add("interleaved 1F1B", two_stages_a_rank("ScheduleInterleaved1F1B"))
CASES.add("zero bubble, StoreAll", two_stages_a_rank("ScheduleInterleavedZeroBubble", policy=StoreAll()))


@CASES
def couplings_that_take_turns(rank: int, world: int) -> None:
    """The second half goes on in the list where the first ended."""
    couplings = [Additive(0.5), Momentum(0.9)]
    alone = Transformer(DEPTH, coupling=couplings, policy=StoreAll()).double()
    train_alone(alone, batches(rows=8))
    model = Transformer(DEPTH, coupling=couplings).double()
    train(model, 3, rank, world)
    assert_same_part(model, alone, 3, rank)


@CASES
def blocks_run_twice_a_micro_batch(rank: int, world: int) -> None:
    model, calls = Transformer(DEPTH).double(), Counter[int]()
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.update([i]))
    train(model, 2, rank, world)
    once = 1 if rank == 0 else 2  # PyTorch runs a stage to find its shapes, and the last one backward as well
    here = range(2) if rank == 0 else range(2, DEPTH)
    assert calls == dict.fromkeys(here, 2 * MICRO_BATCHES * STEPS + once)


outcomes, test_on_two_stages = CASES.tests(__file__)


if __name__ == "__main__":
    CASES.run()
