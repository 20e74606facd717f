"""The trainers and adapters around Hugging Face models: ``Trainer`` and PEFT's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import torch
import transformers

from revcore_torch import Reverse, StoreAll
from revcore_torch.hf import make_reversible, stacks
from tests.helpers import tree_error
from tests.hf.models import VOCABULARY, inputs, make


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = torch.randint(3, VOCABULARY, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trained(policy: Any, folder: Path, steps: int, resume: bool = False) -> dict[str, Any]:
    model = make_reversible(make("gpt2", dtype=torch.float32), "momentum", beta=0.9, policy=policy)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# PyTorch's loader and Trainer, of themselves on a machine without an accelerator
@pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*no accelerator is found")
def test_the_trainer_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    expected = trained(StoreAll(), tmp_path / "a", 4)
    found = trained(Reverse(), tmp_path / "b", 4)
    assert tree_error(found, expected) < 1e-4
    (tmp_path / "b" / "checkpoint-4").rename(tmp_path / "later")
    resumed = trained(Reverse(), tmp_path / "b", 4, resume=True)
    assert all(torch.equal(resumed[name], found[name]) for name in found)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
@pytest.mark.parametrize("first", ["reversible", "adapted"])
def test_lora_trains_its_adapters_alone(first: str) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    found = []
    for policy in (Reverse(), StoreAll()):
        model: Any = make("llama")
        if first == "reversible":
            make_reversible(model, "momentum", beta=0.5, policy=policy)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(**options)).double()
        if first == "adapted":
            make_reversible(model, "momentum", beta=0.5, policy=policy)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zeros at first, and so no gradient of lora_A
                    parameter.normal_(0, 0.1)
        torch.manual_seed(1)
        model(**inputs("llama")).loss.backward()
        assert len(stacks(model)) == 1
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all("lora_" in name for name in gradients)
        assert len(gradients) == 3 * 2 * 2
        found.append(gradients)
    assert tree_error(*found) < 1e-9
