"""ZeRO: blocks of other kinds; what is refused; what a step costs in bytes held, blocks run and elements gathered."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revcore import Checkpoint, Policy, Reverse, SpecError, StoreAll, revnet
from revcore_torch import reversible
from revcore_torch.hf import make_reversible
from revcore_torch.memory import LiveBytes
from tests.distributed.networks import (
    MLP,
    VOCABULARY,
    WIDTH,
    Transformer,
    assert_close,
    batches,
    loss_of,
    part_of,
    values_of,
)
from tests.distributed.ranks import OF_DEEPSPEED, Cases
from tests.distributed.zero_engine import TOLERANCE, engine_of, init, train, train_alone, trained

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

CASES = Cases(world=2, leaves=OF_DEEPSPEED)
STAGES = 0, 1, 2, 3


# --- blocks of other kinds --------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A block with PyTorch's attention, which uses a parameter of the module inside it by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.9))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.attention(x, x, x, need_weights=False)[0]


class Checkpointed(nn.Module):
    """A block that is checkpointed inside; ``by`` checkpoints a call."""

    def __init__(self, by: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.by = MLP(), by

    def forward(self, x: Tensor) -> Tensor:
        return self.by(self.inner, x)


def blocks_of(rank: int, world: int, make: Callable[[], nn.Module]) -> None:
    results: list[dict[str, Tensor]] = []
    for rebuilt in (True, False):
        torch.manual_seed(3)
        blocks = [make() for _ in range(4)]
        model = Transformer(reversible=rebuilt)
        for i, block in enumerate(blocks):
            model.blocks[i] = block
        if rebuilt:
            engine = engine_of(model, 3)
            train(engine, batches(), rank, world)
            results.append(trained(engine))
        else:
            for block in blocks:
                block.__dict__["by"] = lambda call, x: call(x)
            train_alone(model, batches())
            results.append(values_of(model))
    ours, expected = results
    assert_close(ours, expected, TOLERANCE)


@CASES
def attention_of_pytorch(rank: int, world: int) -> None:
    blocks_of(rank, world, Foreign)


@CASES
def checkpointing_inside_a_block(rank: int, world: int) -> None:
    blocks_of(rank, world, lambda: Checkpointed(functools.partial(checkpoint, use_reentrant=False)))


@CASES
def checkpointing_of_deepspeed_inside_a_block(rank: int, world: int) -> None:
    import deepspeed

    deepspeed.checkpointing.configure(None, partition_activations=False)
    checkpoint_of: Any = deepspeed.checkpointing.checkpoint
    with pytest.warns(UserWarning, match=r"keeps tensors on ctx \(CheckpointFunction.deepspeed_saved_tensors\)"):
        blocks_of(rank, world, lambda: Checkpointed(checkpoint_of))


def hf_llama(policy: Policy, layer: Callable[[Any, int], nn.Module]) -> Any:
    import transformers

    torch.manual_seed(1)
    settings = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        initializer_range=0.3,  # RMSNorm divides by small activations, and what is rebuilt has rounding errors
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings)
    model.model.layers = nn.ModuleList(layer(settings, i) for i in range(4))
    return make_reversible(model, "momentum", beta=0.9, policy=policy)


@CASES
def hugging_face(rank: int, world: int) -> None:
    def loss(model: Any, batch: Tensor) -> Tensor:
        return loss_of(lambda tokens: model(input_ids=tokens, use_cache=False).logits, batch)

    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    class Scaled(LlamaDecoderLayer):
        """A layer with a parameter of its own, which DeepSpeed gathers in hooks of the layer."""

        def __init__(self, settings: Any, number: int) -> None:
            super().__init__(settings, number)
            self.scale = nn.Parameter(torch.full((settings.hidden_size,), 0.9))

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.scale * super().forward(*args, **kwargs)

    model = hf_llama(StoreAll(), Scaled)
    train_alone(model, batches(), loss=loss)
    for policy in (Reverse(), Checkpoint(every=2)):
        engine = engine_of(hf_llama(policy, Scaled), 3)
        train(engine, batches(), rank, world, loss)
        assert_close(trained(engine), values_of(model), TOLERANCE)


# --- what is refused --------------------------------------------------------------------------------------------------


class ByFunctions(nn.Module):
    """A network whose blocks are functions: of layers, called or used by themselves."""

    def __init__(self, block_of: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.blocks = [block_of(layer) for layer in self.layers]  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(reversible(revnet(4), self.blocks, x.chunk(2, -1)), -1)


@CASES
def functions_as_blocks(rank: int, world: int) -> None:
    x = torch.randn(2, 16)
    for by_itself in (
        lambda layer: functools.partial(F.linear, weight=layer.weight, bias=layer.bias),
        lambda layer: lambda x: F.linear(x, layer.weight, layer.bias),
        lambda layer: layer.forward,
    ):
        engine = engine_of(ByFunctions(by_itself), 3)
        before = trained(engine)
        with pytest.raises(SpecError, match=r"Wrap the function in an nn\.Module"):
            engine(x)
        assert_close(trained(engine), before, 0.0)
    engine = engine_of(ByFunctions(lambda layer: lambda x: layer(x.tanh())), 3)
    engine.backward(engine(x).square().mean())
    engine.step()


def optimizer_in_backward(rank: int, world: int, *, stage: int) -> None:
    fused = functools.partial(torch.optim.SGD, lr=0.1)
    engine = engine_of(Transformer(fused_optimizer=fused), stage)
    before = trained(engine)
    with pytest.raises(SpecError, match="Take out fused_optimizer="):
        train(engine, batches(), rank, world)
    assert_close(trained(engine), before, 0.0)


for stage in STAGES:
    CASES.add(f"optimizer in backward, stage {stage}", functools.partial(optimizer_in_backward, stage=stage))


@CASES
def products_kept_where_a_bias_is_added_in_place(rank: int, world: int) -> None:
    engine = engine_of(Transformer(policy=Reverse(recompute=[torch.ops.aten.mm.default])), 3)
    with pytest.raises(SpecError, match=r"aten\.mm\.default in place"):
        train(engine, batches(), rank, world)


# --- costs ------------------------------------------------------------------------------------------------------------


class Gathers:
    """Counts the elements that are gathered from all ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from deepspeed.comm.torch import TorchBackend

        gather, self.elements = TorchBackend.all_gather_into_tensor, 0

        def counted(backend: Any, output_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.elements += output_tensor.numel()
            return gather(backend, output_tensor, *args, **kwargs)

        monkeypatch.setattr(TorchBackend, "all_gather_into_tensor", counted)


def parted(model: nn.Module, world: int) -> bool:
    parameters: list[Any] = [*model.parameters()]
    return all(
        p.numel() == 0 and p.ds_status.name == "NOT_AVAILABLE" and p.ds_tensor.numel() == -(-p.ds_numel // world)
        for p in parameters
    )


def costs_of(model: Transformer, stage: int, rank: int, world: int) -> list[dict[str, Any]]:
    """Return, of each step, the bytes held after the forward pass, runs of each block and elements gathered."""
    engine, runs, costs = engine_of(model, stage), [0] * len(model.blocks), []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: operator.setitem(runs, i, runs[i] + 1))
    with pytest.MonkeyPatch.context() as monkeypatch:
        gathers = Gathers(monkeypatch)
        for batch in batches(steps=3):
            runs[:], gathers.elements = [0] * len(runs), 0
            with LiveBytes() as memory:
                loss = loss_of(engine, part_of(batch, rank, world))
                held = memory.live
            forward = gathers.elements
            assert stage < 3 or parted(model, world)
            engine.backward(loss)
            assert stage < 3 or parted(model, world)
            costs.append({"held": held, "runs": [*runs], "forward": forward, "backward": gathers.elements - forward})
            engine.step()
    return costs


def sizes(model: Transformer) -> tuple[int, int]:
    """Return how many parameters are in blocks, and how many elsewhere."""
    within = sum(p.numel() for p in model.blocks.parameters())
    return within, sum(p.numel() for p in model.parameters()) - within


def costs(rank: int, world: int, *, stage: int) -> None:
    held = {}
    for depth in (4, 8):
        within, elsewhere = sizes(Transformer(depth))
        plain = costs_of(Transformer(depth, reversible=False), stage, rank, world)
        ours = costs_of(Transformer(depth), stage, rank, world)
        # gloo's thread may hold a buffer for a moment after it has been sent
        held[depth] = min(cost.pop("held") for cost in plain), min(cost.pop("held") for cost in ours)
        assert ours[0] == ours[1] == ours[2]
        assert ours[0]["runs"] == [2] * depth
        if stage == 3:
            assert all(cost["forward"] == within + elsewhere for cost in (*plain, *ours))
            assert all(cost["backward"] == within + elsewhere for cost in plain)
            assert ours[0]["backward"] == 2 * within + elsewhere, "once for the second run, once for the gradient"
    assert held[4][1] == held[8][1] < held[4][0] < held[8][0]


CASES.add("costs, stage 1", functools.partial(costs, stage=1))
CASES.add("costs, stage 3", functools.partial(costs, stage=3))


outcomes, test_on_two_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    CASES.run(init)
