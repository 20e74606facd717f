"""Accelerate around a reversible network: two processes against plain PyTorch in one, and its own checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revcore import SpecError
from revcore_torch import Reverse, StoreAll
from tests.distributed.held import Held
from tests.distributed.networks import (
    CLIP,
    STEPS,
    Transformer,
    adamw,
    assert_close,
    batches,
    clipped,
    loss_of,
    part_of,
    train_alone,
    values_of,
)
from tests.distributed.ranks import Cases, shared_folder
from tests.distributed.sharding import VIEW, wholes

if TYPE_CHECKING or __name__ == "__main__":
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch.distributed.tensor import DTensor

if find_spec("accelerate") is None:
    pytest.skip("Accelerate is not installed", allow_module_level=True)

CASES = Cases(world=2, leaves=("$ACCELERATE_", "$FSDP_"))

warnings.filterwarnings("ignore", VIEW)


def prepared(model: nn.Module, **settings: Any) -> tuple[Accelerator, Any, Any, Any]:
    """Return an accelerator and what it made of a model, its optimizer and a loader; a batch is two rows a rank."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it holds the settings of the first one in a process
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    rows = torch.cat(batches())
    # a loader without a generator takes a number from the one that dropout draws from, in a resumed run once more
    loader = torch.utils.data.DataLoader(rows, batch_size=1, generator=torch.Generator())  # type: ignore[arg-type]
    return accelerator, *accelerator.prepare(model, adamw(model.parameters()), loader)


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, loader: Iterable[Tensor], save: Path | None = None
) -> list[float]:
    """Train as Accelerate's guide says; return the losses of this rank's rows. ``save``: after the second step."""
    losses = []
    for row in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model, row)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
                assert norm is not None
                assert norm > 2 * CLIP
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if save is not None and len(losses) == 4:
            accelerator.save_state(str(save))
    return losses


@CASES
def as_plain_training_in_one_process(rank: int, world: int) -> None:
    alone = Transformer(reversible=False).double()
    losses = train_alone(alone, batches(), clipped)
    made = Transformer().double()
    accelerator, model, optimizer, loader = prepared(made)
    assert accelerator.distributed_type is DistributedType.MULTI_CPU
    assert isinstance(model, DistributedDataParallel)
    assert accelerator.unwrap_model(model) is made
    assert [*accelerator.get_state_dict(model)] == [*made.state_dict()]
    mine = train(accelerator, model, optimizer, loader)
    assert len(mine) == 2 * STEPS
    assert losses[-1] != losses[0]
    assert_close(values_of(made), values_of(alone))


@CASES
def what_is_held_is_flat_in_depth(rank: int, world: int) -> None:
    def held(depth: int, **settings: Any) -> int:
        made = Transformer(depth, **settings).double()
        count = Held(made.blocks)
        train(*prepared(made))
        assert len(count.bytes) == 2 * STEPS
        assert len({*count.bytes}) == 1
        return count.bytes[0]

    assert held(2) == held(8) > 0
    assert held(8, policy=StoreAll()) > held(2, policy=StoreAll()) > held(8)


@CASES
def bfloat16_as_with_everything_stored(rank: int, world: int) -> None:
    found = []
    for policy in (Reverse(), StoreAll()):
        made = Transformer(policy=policy)
        accelerator, *rest = prepared(made, mixed_precision="bf16")
        assert accelerator.mixed_precision == "bf16"
        train(accelerator, *rest)
        found.append(values_of(made))
    assert_close(*found, tolerance=1e-6)  # the streams are float32


@CASES
def with_dropout_again_and_resumed(rank: int, world: int) -> None:
    def begin(seed: int) -> Any:
        torch.manual_seed(seed + rank)
        made = Transformer(p=0.2)
        torch.manual_seed(seed + rank)
        return made, *prepared(made)

    folder = shared_folder(rank)
    made, *run = begin(3)
    losses = train(*run, save=folder)
    expected = values_of(made)
    made, *run = begin(3)
    assert train(*run) == losses
    assert_close(values_of(made), expected, tolerance=0.0)
    made, accelerator, model, optimizer, loader = begin(4)
    accelerator.load_state(str(folder))
    assert train(accelerator, model, optimizer, accelerator.skip_first_batches(loader, 4)) == losses[4:]
    assert_close(values_of(made), expected, tolerance=0.0)
    made, *run = begin(4)
    assert train(*run) != losses  # dropout draws


@CASES
def sharding_on_the_cpu_is_plain_ddp(rank: int, world: int) -> None:
    """Where this fails, Accelerate has learnt to shard on a CPU: then it is to be tested here, as FSDP2 itself is."""
    made = Transformer()
    accelerator, model, *_ = prepared(made, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    assert accelerator.distributed_type is DistributedType.MULTI_CPU
    assert isinstance(model, DistributedDataParallel)


@CASES
def an_optimizer_in_the_backward_pass_is_refused(rank: int, world: int) -> None:
    made = Transformer(fused_optimizer=adamw)
    before = values_of(made)
    with pytest.raises(SpecError, match=r"DistributedDataParallel.*leave fused_optimizer out"):
        train(*prepared(made))
    assert_close(values_of(made), before, tolerance=0.0)


@CASES
def sharding_as_where_there_are_accelerators(rank: int, world: int) -> None:
    """Accelerate is told that the CPU is one, and its own code wraps the blocks. Last, for its state stays behind."""
    alone = Transformer(reversible=False).double()
    train_alone(alone, batches(), clipped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU))
        patch.setattr(PartialState, "set_device", lambda self: setattr(self, "device", torch.device("cpu")))
        patch.setenv("ACCELERATE_USE_FSDP", "false")  # the plugin sets it, for the rest of the process
        ways: list[dict[str, Any]] = [{}, {"cpu_ram_efficient_loading": True}, {"activation_checkpointing": True}]
        for more in ways:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Attention", "MLP"], **more,
            )  # fmt: skip
            accelerator = Accelerator(fsdp_plugin=plugin)
            made = Transformer().double()
            model, optimizer = accelerator.prepare(made, adamw(made.parameters()))
            assert accelerator.distributed_type is DistributedType.FSDP
            assert all(isinstance(p, DTensor) for p in model.parameters())
            for batch in batches():
                accelerator.backward(loss_of(model, part_of(batch, rank, world)))
                assert accelerator.clip_grad_norm_(model.parameters(), CLIP) > 2 * CLIP  # type: ignore[operator]
                optimizer.step()
                optimizer.zero_grad()
            ours = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in wholes(model).items()}
            assert_close(ours, values_of(alone))


outcomes, test_on_two_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    CASES.run()
