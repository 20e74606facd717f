"""What the cases of ``test_trainer.py`` train, apart: the trainer takes long to import, and ranks alone need it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.networks import CLIP, STEPS, Transformer, adamw, batches, loss_of
from tests.hf.models import make


class Task(nn.Module):
    """A transformer that returns its loss; ``losses`` are those of this rank's rows, in training."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.model = Transformer(**settings)
        self.losses: list[float] = []

    def forward(self, tokens: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        loss = loss_of(self.model, tokens)
        if self.training:
            self.losses.append(loss.item())
        return {"loss": loss}


class InOrder(transformers.Trainer):
    """Rows come in their order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class Dies(transformers.TrainerCallback):
    """Rank 1 is gone when it has the gradients of step 7."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.process_index == 1 and state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def as_tokens(rows: Tensor) -> dict[str, Tensor]:
    return {"tokens": rows}


def as_inputs(rows: Tensor) -> dict[str, Tensor]:
    return {"input_ids": rows, "labels": rows}


def train(
    model: Any,
    folder: Path,
    steps: int = STEPS,
    resume: bool | str = False,
    callbacks: Sequence[Any] = (),
    collate: Any = as_tokens,
    **settings: Any,
) -> transformers.Trainer:
    """Train for steps of two batches of one row a rank."""
    settings = {"save_strategy": "no", "disable_tqdm": True, "report_to": [], **settings}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        max_grad_norm=CLIP, lr_scheduler_type="constant", use_cpu=True, **settings,
    )  # fmt: skip
    rows = torch.cat(batches(steps=max(steps, STEPS)))
    trainer = InOrder(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[*callbacks],  # type: ignore[arg-type]
        data_collator=lambda items: collate(torch.stack(items)), optimizers=(adamw(model.parameters()), None),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == steps
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return trainer


def gpt2() -> Any:
    model = make("gpt2", depth=2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
