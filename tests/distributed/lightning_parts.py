"""What the cases of ``test_lightning.py`` train, apart: Lightning takes long to import, and ranks alone need it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.networks import CLIP, STEPS, Transformer, adamw, batches, loss_of

__all__ = ["Callback", "L", "ModelCheckpoint", "RandomStates", "Task", "Watch", "WithLoss", "fit"]


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
    """Train for :data:`~tests.distributed.networks.STEPS` steps of two batches of one row a rank."""
    settings.setdefault("callbacks", [])
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", precision="64-true", max_epochs=1, accumulate_grad_batches=2,
        gradient_clip_val=CLIP, use_distributed_sampler=False, default_root_dir=folder, logger=False,
        enable_checkpointing=folder is not None, enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip
    rows = torch.cat(batches())[trainer.global_rank :: 2]
    trainer.fit(task, Rows(rows), ckpt_path=resume)
    assert trainer.global_step == STEPS


class WithLoss(nn.Module):
    """Fabric makes float32 of what comes out of a model: of logits that would be a rounding, of a loss it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer()

    def forward(self, batch: Tensor) -> Tensor:
        return loss_of(self.model, batch)
