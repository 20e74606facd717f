"""A training run that is saved every three steps, goes on from what was saved, and may stop in the middle of step 7.

python zero_run.py FOLDER STAGE STEPS [hang]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.networks import Transformer, batches, loss_of, part_of
from tests.distributed.ranks import PATIENCE
from tests.distributed.zero_engine import engine_of, init

EVERY, STEP = 3, 7


def random_states() -> list[Tensor]:
    """Return the state of every rank's generator: below stage 3 DeepSpeed keeps one ``client_state`` for all."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, torch.get_rng_state())
    return states


def main(folder: Path, stage: int, steps: int, hang: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = engine_of(Transformer(p=0.3), stage)
    torch.manual_seed(10 + rank)
    saved = folder / "checkpoints"
    done = 0
    if (saved / "latest").exists():
        _, state = engine.load_checkpoint(str(saved))
        done = state["done"]
        torch.set_rng_state(state["random"][rank])
    data = batches(steps=steps)
    for step in range(done, steps):
        if hang and step + 1 == STEP:
            engine.module.blocks[1].register_full_backward_hook(lambda *_: stop(folder, rank))
        loss = loss_of(engine, part_of(data[step], rank, world))
        engine.backward(loss)
        engine.step()
        with (folder / f"losses{rank}").open("a") as out:
            print(json.dumps([step + 1, loss.item()]), file=out)
        if (step + 1) % EVERY == 0:
            engine.save_checkpoint(str(saved), client_state={"done": step + 1, "random": random_states()})


def stop(folder: Path, rank: int) -> None:
    """Say that the backward pass has come this far, and go no further."""
    (folder / f"hangs{rank}").touch()
    time.sleep(PATIENCE)


if __name__ == "__main__":
    init()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["hang"])
    dist.destroy_process_group()
