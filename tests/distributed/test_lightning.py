"""Lightning around a reversible network: two processes against plain PyTorch in one, and its own checkpoints."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from revcore import SpecError
from revcore_torch import StoreAll
from tests.distributed.held import Held
from tests.distributed.networks import (
    CLIP,
    STEPS,
    Transformer,
    adamw,
    assert_close,
    batches,
    clipped,
    train_alone,
    values_of,
)
from tests.distributed.ranks import Cases, shared_folder

if TYPE_CHECKING or __name__ == "__main__":
    from tests.distributed.lightning_parts import Callback, L, ModelCheckpoint, RandomStates, Task, Watch, WithLoss, fit

if find_spec("lightning") is None:
    pytest.skip("Lightning is not installed", allow_module_level=True)

CASES = Cases(world=2, leaves=("$WORLD_SIZE",))

# of Lightning's own making, with PyTorch 2.13
for message in (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '\w+' does not have many workers",
    r"The number of training batches",
    r"Checkpoint directory .* exists and is not empty",
):
    warnings.filterwarnings("ignore", message)


@CASES
def as_plain_training_in_one_process(rank: int, world: int) -> None:
    alone = Transformer(reversible=False).double()
    train_alone(alone, batches(), clipped)
    task, watch = Task(), Watch()
    fit(task, callbacks=[watch])
    assert watch.calls == ["before", "after", "before", "after", "step"] * STEPS
    assert task.losses[0] != task.losses[-1]
    assert_close(values_of(task.model), values_of(alone))


@CASES
def what_is_held_is_flat_in_depth(rank: int, world: int) -> None:
    def held(depth: int, **settings: Any) -> int:
        task = Task(depth=depth, **settings)
        count = Held(task.model.blocks)
        fit(task)
        assert len(count.bytes) == 2 * STEPS
        assert len({*count.bytes}) == 1
        return count.bytes[0]

    assert held(2) == held(8) > 0
    assert held(8, policy=StoreAll()) > held(8)


@CASES
def with_dropout_again_and_resumed(rank: int, world: int) -> None:
    def run(seed: int, **settings: Any) -> Task:
        torch.manual_seed(seed + rank)
        task = Task(p=0.2).double()  # or the weights of a checkpoint come in as float32
        torch.manual_seed(seed + rank)
        fit(task, **settings)
        return task

    folder = shared_folder(rank)

    def saving() -> list[Callback]:
        return [ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}"), RandomStates()]

    first = run(3, folder=folder, callbacks=saving())
    again = run(3)
    assert again.losses == first.losses
    assert_close(values_of(again), values_of(first), tolerance=0.0)
    resumed = run(3, folder=folder, resume=folder / "step=2.ckpt", callbacks=saving())
    assert resumed.losses == first.losses[4:]
    assert_close(values_of(resumed), values_of(first), tolerance=0.0)
    assert run(4).losses != first.losses  # dropout draws


@CASES
def an_optimizer_in_the_backward_pass_is_refused(rank: int, world: int) -> None:
    task = Task(fused_optimizer=adamw)
    before = values_of(task.double())
    with pytest.raises(SpecError, match=r"DistributedDataParallel.*leave fused_optimizer out"):
        fit(task)
    assert_close(values_of(task), before, tolerance=0.0)


@CASES
def by_fabric(rank: int, world: int) -> None:
    alone = Transformer(reversible=False).double()
    train_alone(alone, batches(), clipped)
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="64-true")
    fabric.launch()
    made = WithLoss()
    model, optimizer = fabric.setup(made, adamw(made.parameters()))
    assert isinstance(model._forward_module, DistributedDataParallel)
    for batch in batches():
        optimizer.zero_grad()
        for i, row in enumerate(batch[rank::2]):
            with fabric.no_backward_sync(model, enabled=i == 0):
                fabric.backward(model(row[None]) / 2)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
    assert_close(values_of(made.model), values_of(alone))


outcomes, test_on_two_ranks = CASES.tests(__file__)


if __name__ == "__main__":
    CASES.run()
