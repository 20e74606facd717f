"""Lightning around a reversible network: two processes against plain PyTorch in one, and its own checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revcore import SpecError
from revcore_torch import StoreAll
from tests.distributed.held import Held
from tests.distributed.networks import (
    CLIP,
    Transformer,
    adamw,
    assert_close,
    batches,
    clipped,
    loss_of,
    train_alone,
    values_of,
)
from tests.distributed.ranks import TRAINERS, Cases, Outcomes, shared_folder

pytest.importorskip("lightning")

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

CASES = Cases(world=2, imports=TRAINERS, leaves=("$WORLD_SIZE",))

# of Lightning's own making, with PyTorch 2.13
for message in (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '\w+' does not have many workers",
    r"The number of training batches",
    r"Checkpoint directory .* exists and is not empty",
):
    warnings.filterwarnings("ignore", message)


class Task(L.LightningModule):
    """A transformer and its loss; ``losses`` are those of this rank's rows."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.model = Transformer(**settings)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.parameters())


class Watch(Callback):
    """Counts what Lightning calls around each step."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        assert isinstance(trainer.strategy.model, DistributedDataParallel)
        self.calls.append("before")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        assert all(p.grad is not None for p in pl_module.parameters())
        self.calls.append("after")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls.append("step")


class Rows:
    """A loader of one row a batch that knows where it is, as torchdata's: one that does not begins anew on resuming."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.at = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1 : self.at]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class RandomStates(Callback):
    """The ranks' random states go along with a checkpoint: Lightning's has none, and is rank 0's alone."""

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, torch.get_rng_state())
        return {"states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state: Tensor | None = state_dict["states"][dist.get_rank()]

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if (state := self.__dict__.pop("state", None)) is not None:
            torch.set_rng_state(state)


def fit(task: L.LightningModule, folder: Path | None = None, resume: Path | None = None, **settings: Any) -> None:
    """Train for five steps of two batches of one row a rank."""
    settings.setdefault("callbacks", [])
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", precision="64-true", max_epochs=1, accumulate_grad_batches=2,
        gradient_clip_val=CLIP, use_distributed_sampler=False, default_root_dir=folder, logger=False,
        enable_checkpointing=folder is not None, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    rows = torch.cat(batches())[trainer.global_rank :: 2]
    trainer.fit(task, Rows(rows), ckpt_path=resume)
    assert trainer.global_step == 5


@CASES
def as_plain_training_in_one_process(rank: int, world: int) -> None:
    alone = Transformer(reversible=False).double()
    train_alone(alone, batches(), clipped)
    task, watch = Task(), Watch()
    fit(task, callbacks=[watch])
    assert watch.calls == ["before", "after", "before", "after", "step"] * 5
    assert task.losses[0] != task.losses[-1]
    assert_close(values_of(task.model), values_of(alone))


@CASES
def what_is_held_is_flat_in_depth(rank: int, world: int) -> None:
    def held(depth: int, **settings: Any) -> int:
        task = Task(depth=depth, **settings)
        count = Held(task.model.blocks)
        fit(task)
        assert len(count.bytes) == 10
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
        return [ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename="{step}"), RandomStates()]

    first = run(3, folder=folder, callbacks=saving())
    again = run(3)
    assert again.losses == first.losses
    assert_close(values_of(again), values_of(first), tolerance=0.0)
    resumed = run(3, folder=folder, resume=folder / "step=3.ckpt", callbacks=saving())
    assert resumed.losses == first.losses[6:]
    assert_close(values_of(resumed), values_of(first), tolerance=0.0)
    assert run(4).losses != first.losses  # dropout draws


@CASES
def an_optimizer_in_the_backward_pass_is_refused(rank: int, world: int) -> None:
    task = Task(fused_optimizer=adamw)
    before = values_of(task.double())
    with pytest.raises(SpecError, match=r"DistributedDataParallel.*leave fused_optimizer out"):
        fit(task)
    assert_close(values_of(task), before, tolerance=0.0)


class WithLoss(nn.Module):
    """Fabric makes float32 of what comes out of a model: of logits that would be a rounding, of a loss it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer()

    def forward(self, batch: Tensor) -> Tensor:
        return loss_of(self.model, batch)


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


outcomes = CASES.fixture(__file__)


@pytest.mark.parametrize("name", CASES.names)
def test_on_two_ranks(name: str, outcomes: Outcomes) -> None:
    outcomes.check(name)


if __name__ == "__main__":
    CASES.run()
