"""One rank of a pipeline of DeepSpeed's, for a test to kill: never stopped, or stopped in the middle of a step.

``python resume_pipeline.py pipeline FOLDER first`` and ``… second`` do and leave what ``resume.py`` says.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.networks import batches
from tests.distributed.pipelines import additive, init, layers_of, start, train
from tests.distributed.ranks import PATIENCE
from tests.distributed.resume import EVERY, STEPS, STOP


def stop(block: nn.Module, folder: Path) -> None:
    """Let rank 1 stand still in the backward pass of the next step's second micro-batch."""
    passes = 0

    def stand_still(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            (folder / "inside").touch()
            time.sleep(PATIENCE)

    block.register_full_backward_hook(stand_still)


def losses(folder: Path | None, stops: bool = False) -> list[float]:
    """Train from the last checkpoint in ``folder``, or without any; return the losses, those before it as well."""
    model = additive(p=0.3)
    engine = start(layers_of(model))
    torch.manual_seed(10 + dist.get_rank())
    found: list[float] = []
    if folder is not None and (folder / "latest").exists():
        _, state = engine.load_checkpoint(str(folder))
        torch.set_rng_state(state["random"][dist.get_rank()])
        found = state["losses"]
        print(f"Going on after step {engine.global_steps}.")
    data = batches(steps=STEPS)
    while engine.global_steps < STEPS:
        if stops and engine.global_steps + 1 == STOP and dist.get_rank() == 1:
            stop(model.body[3], folder)  # type: ignore[arg-type]
        found += train(engine, data[engine.global_steps :][:1])
        if folder is not None and engine.global_steps % EVERY == 0:
            states: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(states, torch.get_rng_state())
            engine.save_checkpoint(str(folder), client_state={"random": states, "losses": found})
    return found


def main(folder: Path, part: str) -> None:
    torch.set_num_threads(1)
    init()
    if part == "first":
        name, found = "whole", losses(None)
    else:
        name, found = "resumed", losses(folder)
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(found))
    if part == "first":
        losses(folder, stops=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3])
