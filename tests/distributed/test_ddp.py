"""``DistributedDataParallel`` around a reversible network: no special code, and the run of one process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revcore import Momentum, revnet
from revcore_torch import Checkpoint, MemoryBudget, Reverse, StoreAll
from tests.distributed.networks import (
    WIDTH,
    Transformer,
    adamw,
    assert_close,
    batches,
    distance,
    loss_of,
    part_of,
    train_alone,
    values_of,
    with_lora,
)
from tests.distributed.ranks import Cases

CASES = Cases(world=2)

Change = Callable[[Any], Any]


def train(
    model: nn.Module, rank: int, world: int, data: Sequence[Tensor], loss: Callable[..., Tensor] = loss_of, **ddp: Any
) -> list[float]:
    """Train on this rank's rows, as a user of DDP would; return this rank's losses."""
    wrapped, losses = DistributedDataParallel(model, **ddp), []
    optimizer = adamw(p for p in model.parameters() if p.requires_grad)
    for batch in data:
        optimizer.zero_grad()
        value = loss(wrapped, part_of(batch, rank, world))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def same_as_alone(change: Change = lambda model: model, settings: Mapping[str, Any] = {}, **ddp: Any) -> Any:
    """Return a case: the network, ``change``d, ends where the one that is written out by hand ends in one process."""

    def case(rank: int, world: int) -> None:
        before = Transformer(reversible=False).double()
        alone = change(Transformer(reversible=False).double())
        losses = train_alone(alone, batches())
        ours = change(Transformer(**settings).double())
        train(ours, rank, world, batches(), **ddp)
        assert losses[0] != losses[-1]
        assert_close(values_of(ours), values_of(alone))
        if change(before) is before:  # LoRA changes names
            assert distance(values_of(ours), values_of(before)) > 1e-3

    return case


# --- what DDP can be told ---------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.001},
}
for name, options in OPTIONS.items():
    CASES.add(name, same_as_alone(**options))


def with_unused_branch(model: Any) -> Any:
    model.branch = nn.Linear(3, 3, dtype=torch.float64)
    return model


CASES.add("a branch that is not used", same_as_alone(with_unused_branch, find_unused_parameters=True))


@CASES
def a_branch_that_is_not_used_and_not_looked_for(rank: int, world: int) -> None:
    """PyTorch's own refusal, before the second step, is not lost."""
    with pytest.raises(RuntimeError, match="Expected to have finished reduction in the prior iteration"):
        train(with_unused_branch(Transformer().double()), rank, world, batches())


@CASES
def no_sync(rank: int, world: int) -> None:
    """Two micro-batches a step, of which the first stays at home."""
    data = batches(rows=8)
    alone = Transformer(reversible=False).double()
    train_alone(alone, data)
    model = Transformer().double()
    wrapped, optimizer = DistributedDataParallel(model), adamw(model.parameters())
    for batch in data:
        first, second = part_of(batch, rank, world).chunk(2)
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        (loss_of(twin, first) / 2).backward()
        with wrapped.no_sync():
            (loss_of(wrapped, first) / 2).backward()
        assert_close(gradients_of(model), gradients_of(twin), 0.0)
        assert not are_equal_on_all_ranks(gradients_of(model), world)
        (loss_of(wrapped, second) / 2).backward()
        assert are_equal_on_all_ranks(gradients_of(model), world)
        optimizer.step()
    assert_close(values_of(model), values_of(alone))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def are_equal_on_all_ranks(tree: dict[str, Tensor], world: int) -> bool:
    ours = torch.cat([t.flatten() for t in tree.values()])
    all_of_them = [torch.empty_like(ours) for _ in range(world)]
    dist.all_gather(all_of_them, ours)
    return all(torch.equal(all_of_them[0], other) for other in all_of_them)


# --- what the network can be ------------------------------------------------------------------------------------------


def tied(model: Any) -> Any:
    model.head = nn.Linear(2 * WIDTH, model.embedding.num_embeddings, bias=False)
    model.head.weight = model.embedding.weight
    return model


def one_block_twice(model: Any) -> Any:
    model.blocks[2] = model.blocks[0]
    return model


def frozen(*parts: str) -> Change:
    def change(model: Any) -> Any:
        for part in parts:
            model.get_submodule(part).requires_grad_(False)
        return model

    return change


for name, change in {
    "tied weights": tied,
    "one block used twice": one_block_twice,
    "frozen embedding": frozen("embedding"),
    "frozen blocks in the middle": frozen("blocks.1", "blocks.2"),
    "LoRA": with_lora,
}.items():
    CASES.add(name, same_as_alone(change))
CASES.add("tied weights, find_unused_parameters", same_as_alone(tied, find_unused_parameters=True))


@CASES
def compiled_blocks(rank: int, world: int) -> None:
    alone, ours = Transformer(reversible=False).double(), Transformer().double()
    train_alone(alone, batches())
    for block in ours.blocks:
        block.compile(backend="aot_eager")
    with warnings.catch_warnings():
        # PyTorch's own, on loading the compiler, and as it looks at what is compiled
        warnings.filterwarnings("ignore", r"`torch\.jit\.script_method` is", DeprecationWarning)
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        train(ours, rank, world, batches())
    assert_close(values_of(ours), values_of(alone))


POLICIES: dict[str, Any] = {
    "anchors": Reverse(anchor_every=2, keep_last=1),
    "Checkpoint": Checkpoint(every=2),
    "a policy for each step": [StoreAll(), Reverse(), Checkpoint(), Reverse()],
    "MemoryBudget": MemoryBudget(fraction=0.85),
}
for name, policy in POLICIES.items():
    CASES.add(name, same_as_alone(settings={"policy": policy}))


@CASES
def exact(rank: int, world: int) -> None:
    """Bit for bit what storing everything gives."""
    ends = []
    for policy in (Reverse(), StoreAll()):
        model = Transformer(program=revnet(4, Momentum(0.5)).exact(bits=20), policy=policy).double()
        ends.append((train(model, rank, world, batches()), values_of(model)))
    assert ends[0][0] == ends[1][0]
    assert_close(ends[0][1], ends[1][1], 0.0)


# --- what is drawn, counted, rounded ----------------------------------------------------------------------------------


@CASES
def dropout(rank: int, world: int) -> None:
    """Run to run to the bit, and as with everything stored; each rank draws its own."""

    def run(policy: Any, p: float = 0.3) -> tuple[list[float], dict[str, Tensor]]:
        model = Transformer(p=p, policy=policy).double()
        torch.manual_seed(100 + rank)
        return train(model, rank, world, batches()), values_of(model)

    (losses, values), again, stored = run(Reverse()), run(Reverse()), run(StoreAll())
    assert losses == again[0]
    assert_close(values, again[1], 0.0)
    assert losses[0] == stored[0][0]
    assert_close(values, stored[1])
    assert distance(values, run(Reverse(), p=0.0)[1]) > 1e-3


class Normed(nn.Module):
    """A block that counts: BatchNorm over batch and time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x).flatten(0, 1)).tanh().view_as(x)


def batch_norm(broadcast: bool) -> Any:
    """Statistics are each rank's own, or the first's: those of the plain network under DDP, and counted once."""

    def case(rank: int, world: int) -> None:
        ends = []
        for reversible in (True, False):
            model = Transformer(reversible=reversible)
            torch.manual_seed(4)
            for i in range(len(model.blocks)):
                model.blocks[i] = Normed()
            train(model.double(), rank, world, batches(), forward_sync_buffers=broadcast)
            ends.append((values_of(model), {name: b.clone() for name, b in model.named_buffers()}))
        (values, buffers), (plain_values, plain_buffers) = ends
        assert_close(values, plain_values)
        assert_close(buffers, plain_buffers)
        assert buffers["blocks.0.norm.num_batches_tracked"] == len(batches())
        means = {"mean": buffers["blocks.3.norm.running_mean"]}
        assert not are_equal_on_all_ranks(means, world)  # after the last step nobody sends them

    return case


for broadcast in (True, False):
    CASES.add(f"BatchNorm, forward_sync_buffers={broadcast}", batch_norm(broadcast))


@CASES
def autocast(rank: int, world: int) -> None:
    """In bfloat16 the two differ by less than storing everything differs from float64."""

    def half(model: Any, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, batch)

    def run(policy: Any) -> dict[str, Tensor]:
        model = Transformer(policy=policy)
        train(model, rank, world, batches(), half)
        return values_of(model)

    alone = Transformer(reversible=False).double()
    train_alone(alone, batches())
    ours, stored = run(Reverse()), run(StoreAll())
    own_error = distance(stored, values_of(alone))
    assert own_error > 1e-5
    assert distance(ours, stored) < own_error / 2, (distance(ours, stored), own_error)


@CASES
def converted_hugging_face_model(rank: int, world: int) -> None:
    transformers = pytest.importorskip("transformers")
    from revcore_torch.hf import make_reversible

    def llama(policy: Any) -> Any:
        torch.manual_seed(5)
        config = transformers.LlamaConfig(
            num_hidden_layers=3, hidden_size=8, num_attention_heads=2, intermediate_size=12, vocab_size=16,
            max_position_embeddings=8,
        )  # fmt: skip
        return make_reversible(transformers.LlamaForCausalLM(config).double(), "momentum", beta=0.9, policy=policy)

    def loss(model: Any, batch: Tensor) -> Tensor:
        return loss_of(lambda tokens: model(input_ids=tokens).logits, batch)

    alone, ours = llama(StoreAll()), llama(Reverse())
    optimizer = adamw(alone.parameters())
    for batch in batches():
        optimizer.zero_grad()
        loss(alone, batch).backward()
        optimizer.step()
    train(ours, rank, world, batches(), loss)
    assert_close(values_of(ours), values_of(alone))


outcomes, test_on_two_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    CASES.run()
