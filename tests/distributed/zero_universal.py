"""Go on from a universal checkpoint on however many ranks there are, and print nothing if all is well.

python zero_universal.py FOLDER STAGE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.networks import Transformer, assert_close, batches
from tests.distributed.zero_engine import TOLERANCE, engine_of, init, train, trained

SAVED_AFTER = 2


def main(folder: Path, stage: int) -> None:
    data = batches()
    rank, world = dist.get_rank(), dist.get_world_size()
    expected = torch.load(folder / "expected.pt")
    # rows of a micro-batch: the batch has four
    settings = {"train_micro_batch_size_per_gpu": 4 // world, "checkpoint": {"load_universal": True}}
    engine = engine_of(Transformer(), stage, **settings)
    engine.load_checkpoint(str(folder), tag="universal")
    assert_close(trained(engine), expected["saved"], 0.0)
    train(engine, data[SAVED_AFTER:], rank, world)
    assert_close(trained(engine), expected["end"], TOLERANCE)


if __name__ == "__main__":
    init()
    main(Path(sys.argv[1]), int(sys.argv[2]))
    dist.destroy_process_group()
