"""Hugging Face's ``Trainer`` on two processes, against plain PyTorch in one: a network of our own, and a converted
GPT-2; its own checkpoints, and a rank that is killed."""

from __future__ import annotations

import signal
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from revcore_torch import StoreAll
from tests.distributed.held import Held
from tests.distributed.networks import (
    STEPS,
    Transformer,
    assert_close,
    batches,
    clipped,
    train_alone,
    values_of,
)
from tests.distributed.ranks import Cases, Ranks, shared_folder

if TYPE_CHECKING or __name__ == "__main__":
    import transformers
    from safetensors.torch import load_file

    from revcore_torch.hf import make_reversible, stacks
    from tests.distributed.trainer_parts import Dies, Task, as_inputs, gpt2, train
    from tests.hf.models import by_hand

if find_spec("transformers") is None or find_spec("accelerate") is None:
    pytest.skip("transformers and accelerate are not installed", allow_module_level=True)

CASES = Cases(world=2)

warnings.filterwarnings("ignore", ".*pin_memory")  # PyTorch's loader, on a machine without an accelerator
warnings.filterwarnings("ignore", ".*no accelerator is found")


@CASES
def as_plain_training_in_one_process(rank: int, world: int) -> None:
    alone = Transformer(reversible=False).double()
    train_alone(alone, batches(), clipped)
    task = Task().double()
    train(task, shared_folder(rank))
    assert len(task.losses) == 2 * STEPS
    assert task.losses[0] != task.losses[-1]
    assert_close(values_of(task.model), values_of(alone))


@CASES
def what_is_held_is_flat_in_depth(rank: int, world: int) -> None:
    def held(depth: int, **settings: Any) -> int:
        task = Task(depth=depth, **settings).double()
        count = Held(task.model.blocks)
        train(task, shared_folder(rank), steps=2)
        assert len(count.bytes) == 4
        assert len({*count.bytes}) == 1
        return count.bytes[0]

    assert held(2) == held(8) > 0
    assert held(8, policy=StoreAll()) > held(8)


@CASES
def with_dropout_again_and_resumed(rank: int, world: int) -> None:
    folder = shared_folder(rank)
    first, again, resumed, other = (Task(p=0.2) for _ in range(4))
    train(first, folder, save_strategy="steps", save_steps=2)
    train(again, folder)
    assert again.losses == first.losses
    assert_close(values_of(again), values_of(first), tolerance=0.0)
    train(resumed, folder, resume=str(folder / "checkpoint-2"))
    assert resumed.losses == first.losses[4:]
    assert_close(values_of(resumed), values_of(first), tolerance=0.0)
    train(other, folder, seed=7)
    assert other.losses != first.losses  # dropout draws


@CASES
def the_best_is_loaded_at_the_end(rank: int, world: int) -> None:
    folder, task = shared_folder(rank), Task()
    every = {"eval_steps": 1, "save_steps": 1, "eval_strategy": "steps", "save_strategy": "steps"}
    trainer = train(task, folder, load_best_model_at_end=True, metric_for_best_model="loss", **every)
    found = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == STEPS
    assert trainer.state.best_metric == min(found)
    best = Path(trainer.state.best_model_checkpoint or "")
    assert best.name == f"checkpoint-{1 + found.index(min(found))}"
    stored = load_file(best / "model.safetensors")
    assert_close(values_of(task), stored, tolerance=0.0)


@CASES
def a_converted_model_with_checkpointing_switched_on_or_off(rank: int, world: int) -> None:
    alone = gpt2()
    by_hand(alone.transformer.h, "momentum", 0.9)
    optimizer = clipped(alone.parameters())
    for batch in batches():
        optimizer.zero_grad()
        alone(**as_inputs(batch)).loss.backward()
        optimizer.step()
    for checkpointing in (False, True):
        folder, calls = shared_folder(rank), []
        model = make_reversible(gpt2(), "momentum", beta=0.9)
        model.transformer.h[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer = train(model, folder, collate=as_inputs, activation_checkpointing=checkpointing)
        assert len(calls) == 2 * 2 * STEPS
        assert_close(values_of(model), values_of(alone), tolerance=1e-7)  # transformers makes float32 of logits
        trainer.save_model(str(folder / "saved"))
        torch.distributed.barrier()
        loaded = transformers.GPT2LMHeadModel.from_pretrained(folder / "saved", dtype=torch.float64)
        assert [*loaded.state_dict()] == [*gpt2().state_dict()]
        rows = as_inputs(batches()[0])
        again = make_reversible(loaded)
        assert stacks(again)[0].settings == stacks(model)[0].settings
        assert torch.equal(again.eval()(**rows).logits, model.eval()(**rows).logits)


outcomes, test_on_two_ranks = CASES.tests(__file__)


def killed(folder: Path) -> None:
    train(Task(p=0.2), folder, steps=9, callbacks=[Dies()], save_strategy="steps", save_steps=3)


def goes_on(folder: Path) -> None:
    resumed, whole = Task(p=0.2), Task(p=0.2)
    train(resumed, folder, steps=9, resume=True)
    train(whole, folder, steps=9)
    assert resumed.losses == whole.losses[2 * 6 :]
    assert_close(values_of(resumed), values_of(whole), tolerance=0.0)


def test_a_rank_is_killed_in_step_7_and_the_run_goes_on(tmp_path: Path) -> None:
    with Ranks(["-W", "error", __file__, "killed", tmp_path], 2, tmp_path) as ranks:
        assert ranks.wait()[1] == -signal.SIGKILL, ranks.said()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    with Ranks(["-W", "error", __file__, "goes_on", tmp_path], 2, tmp_path) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        {"killed": killed, "goes_on": goes_on}[sys.argv[1]](Path(sys.argv[2]))
    else:
        CASES.run()
