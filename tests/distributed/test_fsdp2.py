"""FSDP2 (``fully_shard``) around a reversible network: no special code, and the run of one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll
from tests.distributed.networks import (
    MLP,
    Attention,
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
from tests.distributed.ranks import Cases, shared_folder
from tests.distributed.sharding import VIEW, line, shard, train, wholes

if TYPE_CHECKING or __name__ == "__main__":
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

CASES = Cases(world=2)

Change = Callable[[Any], None]


def equals_one_process(
    name: str, change: Change = lambda _: None, each: bool = True, tied: bool = False, after: Change = lambda _: None,
    clip: float | None = None, parts: int = 1, keep: bool = False, network: dict[str, Any] | None = None,
    offload: bool = False, **settings: Any,
) -> None:  # fmt: skip
    """Add a case: ``change`` is done to both networks, ``after`` to the sharded one."""

    def case(rank: int, world: int) -> None:
        alone, model = Transformer(reversible=False, tied=tied), Transformer(tied=tied, **(network or {}))
        for net in (alone, model):
            change(net.double())
        losses = train(alone, batches(), clip=clip)
        if offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        shard(model, each, **settings)
        after(model)
        train(model, batches(), rank, world, clip=clip, parts=parts, keep=keep)
        assert losses[0] != losses[-1]
        assert_close(wholes(model), values_of(alone))

    CASES.add(name, case)


equals_one_process("each block")
equals_one_process("each block, not resharded after the forward pass", reshard_after_forward=False)
equals_one_process("the root alone", each=False)
equals_one_process("the root alone, resharded after the forward pass", each=False, reshard_after_forward=True)
equals_one_process("parameters offloaded to the CPU", offload=True)
equals_one_process("the head is the embedding", tied=True)
equals_one_process("two passes a step", parts=2)
equals_one_process("two passes a step, not resharded between them", parts=2, keep=True, reshard_after_forward=False)
equals_one_process("gradients clipped", clip=0.1)
equals_one_process("checkpointed", network={"policy": Checkpoint()})
equals_one_process("the last two blocks stored", network={"policy": Reverse(keep_last=2)})
equals_one_process("anchored at every second step", network={"policy": Reverse(anchor_every=2)})


def one_block_twice(net: Any) -> None:
    net.blocks[3] = net.blocks[1]


def freeze(net: Any) -> None:
    net.embedding.requires_grad_(False)
    net.blocks[2].requires_grad_(False)
    net.blocks[1].up.requires_grad_(False)


def prefetch(model: Any) -> None:
    blocks = list(model.blocks)
    for block, later in pairwise(blocks):
        block.set_modules_to_forward_prefetch([later])
        later.set_modules_to_backward_prefetch([block])


def compile_blocks(model: Any) -> None:
    for block in model.blocks:
        block.compile(backend="aot_eager")


equals_one_process("one block used twice", one_block_twice)
equals_one_process("parts frozen", freeze)
equals_one_process("LoRA", with_lora)
equals_one_process("explicit prefetching", after=prefetch)
equals_one_process("blocks compiled", after=compile_blocks)


def trained(rank: int, world: int, policy: Any, p: float = 0.0, **network: Any) -> dict[str, torch.Tensor]:
    model = shard(Transformer(p=p, policy=policy, **network).double())
    torch.manual_seed(rank)
    train(model, batches(), rank, world)
    return wholes(model)


@CASES
def dropout(rank: int, world: int) -> None:
    ours, again, stored = (trained(rank, world, policy, p=0.5) for policy in (Reverse(), Reverse(), StoreAll()))
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    assert_close(ours, stored)
    assert distance(ours, trained(rank, world, Reverse())) > 1e-3  # it dropped something


@CASES
def momentum(rank: int, world: int) -> None:
    settings: dict[str, Any] = {"coupling": revcore.Momentum(0.9)}
    alone = Transformer(policy=StoreAll(), **settings).double()
    train_alone(alone, batches())
    assert_close(trained(rank, world, Reverse(), **settings), values_of(alone))


@CASES
def exact(rank: int, world: int) -> None:
    settings: dict[str, Any] = {"program": revcore.revnet(4).exact()}
    ours, stored = (trained(rank, world, policy, **settings) for policy in (Reverse(), StoreAll()))
    assert all(torch.equal(value, stored[name]) for name, value in ours.items())


@CASES
def an_anchor_among_the_steps(rank: int, world: int) -> None:
    class Turn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = MLP()

        def forward(self, x0: torch.Tensor, x1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.mlp(x1), x0.tanh()

    def make(policy: Any) -> Any:
        net: Any = Transformer(policy=policy)
        steps = [revcore.Couple(0, 1), revcore.Couple(1, 0), revcore.Anchor(), revcore.Couple(0, 1)]
        blocks = [*net.blocks[:2], Turn(), net.blocks[3]]
        net.blocks = ReversibleSequential(*blocks, split_dim=-1, program=revcore.Program(steps), policy=policy)
        return net.double()

    alone, model = make(StoreAll()), shard(make(Reverse()))
    train_alone(alone, batches())
    train(model, batches(), rank, world)
    assert_close(wholes(model), values_of(alone))


@CASES
def hugging_face(rank: int, world: int) -> None:
    transformers = pytest.importorskip("transformers")
    from revcore_torch.hf import make_reversible

    config = transformers.LlamaConfig(
        num_hidden_layers=3, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        vocab_size=16, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    def train(model: Any, rank: int, world: int) -> None:
        optimizer = adamw(model.parameters())
        for batch in batches():
            rows = batch.chunk(world)[rank]
            optimizer.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()

    # under Checkpoint layers run again that FSDP2 has not gathered for their own backward pass; wide streams must pass
    # what FSDP2 puts around each layer
    ways = [(torch.float64, None, 1e-11, Checkpoint(every=2)), (torch.float64, None, 1e-11, Reverse())]
    ways += [(torch.float32, "float64", 1e-6, Reverse())]
    for dtype, wide, tolerance, policy in ways:
        models: list[Any] = []
        for each in (StoreAll(), policy):
            torch.manual_seed(1)
            model = transformers.LlamaForCausalLM(config).to(dtype)
            models.append(make_reversible(model, "momentum", beta=0.5, policy=each, stream_dtype=wide))
        alone, model = models
        train(alone, 0, 1)
        for layer in model.model.layers:
            fully_shard(layer, mesh=line())
        train(fully_shard(model, mesh=line()), rank, world)
        assert_close(wholes(model), values_of(alone), tolerance)


@CASES
def one_process_goes_on_with_what_two_saved(rank: int, world: int) -> None:
    def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    folder = shared_folder(rank)
    model = shard(Transformer().double())
    optimizer = adamw(model.parameters())
    for batch in batches()[:2]:
        optimizer.zero_grad()
        loss_of(model, part_of(batch, rank, world)).backward()
        optimizer.step()
    save(state_of(model, optimizer), checkpoint_id=folder)
    if rank > 0:
        return
    one = Transformer().double()
    optimizer = adamw(one.parameters())
    state = state_of(one, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(state, checkpoint_id=folder, no_dist=True)
    set_state_dict(one, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for batch in batches()[2:]:
        optimizer.zero_grad()
        loss_of(one, batch).backward()
        optimizer.step()
    alone = Transformer(reversible=False).double()
    train_alone(alone, batches())
    assert_close(values_of(one), values_of(alone))


def fsdp1(use_orig_params: bool, policy: Any = None, each: bool = True) -> Callable[[int, int], None]:
    """Return a case: FSDP2's elder, which runs modules with views of one flat parameter in the place of their own."""

    def case(rank: int, world: int) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        alone, model = Transformer(reversible=False).double(), Transformer(policy=policy or Reverse()).double()
        train_alone(alone, batches())
        whole = FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy({Attention, MLP}) if each else None,
            use_orig_params=use_orig_params, device_id=torch.device("cpu"),
        )  # fmt: skip
        train(whole, batches(), rank, world)
        with FullyShardedDataParallel.summon_full_params(whole):
            values = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in values_of(whole).items()}
        assert_close(values, values_of(alone))

    return case


for use_orig_params in (True, False):
    CASES.add(f"FSDP1, use_orig_params={use_orig_params}", fsdp1(use_orig_params))
CASES.add("FSDP1, checkpointed", fsdp1(True, Checkpoint()))
CASES.add("FSDP1, the root alone", fsdp1(True, each=False))


outcomes, test_on_two_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", VIEW)
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # dynamo looks there
    warnings.filterwarnings("ignore", "this program of .* steps, run back in")
    CASES.run()
