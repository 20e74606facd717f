"""One rank of a training run, for a test to kill: the example's, never stopped, or stopped in the middle of a step.

``python resume.py ENGINE FOLDER first`` trains to the end without a checkpoint, writes ``FOLDER/whole.json``, and
trains again with checkpoints in ``FOLDER``; there rank 1 stops in the backward pass of step ``STOP``, with
``FOLDER/inside`` for a sign. ``… second`` goes on from the last checkpoint and writes ``FOLDER/resumed.json``. Both
files hold losses.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from examples.distributed.torch_engines import EngineName, Learner, run
from revcore import Reverse
from revcore_torch import ReversibleSequential
from tests.distributed.ranks import PATIENCE

STEPS, STOP, EVERY = 9, 7, 3


def stop(learner: Learner, folder: Path) -> None:
    """Let rank 1 stand still in the backward pass of step ``STOP``, when the head's gradients have been sent."""
    body = next(m for m in learner.model.modules() if isinstance(m, ReversibleSequential))
    steps = 0

    def stand_still(_: Any) -> None:
        (folder / "inside").touch()
        time.sleep(PATIENCE)

    def after_forward(module: Any, _: Any, output: Any) -> None:
        nonlocal steps
        steps += module.training
        if module.training and steps == STOP and dist.get_rank() == 1:
            output.register_hook(stand_still)

    body.register_forward_hook(after_forward)


def main(engine: EngineName, folder: Path, part: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))

    def losses(checkpoints: Path | None, prepared: Any) -> str:
        found = run(engine, STEPS, 1, 0, Reverse(), checkpoints, EVERY, Console(), prepared).losses
        return json.dumps(found)

    def nothing(learner: Learner) -> None: ...

    if part == "first":
        whole = losses(None, nothing)
        if dist.get_rank() == 0:
            (folder / "whole.json").write_text(whole)
        losses(folder, lambda learner: stop(learner, folder))
    else:
        resumed = losses(folder, nothing)
        if dist.get_rank() == 0:
            (folder / "resumed.json").write_text(resumed)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])  # type: ignore[arg-type]
