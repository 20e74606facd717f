"""FSDP2 and ``torch.distributed.checkpoint``: a rank is killed in the middle of a step, and training goes on from disk.

As a script on two ranks: ``test_fsdp2_resume.py FOLDER die`` trains until rank 1 kills itself; ``… FOLDER go-on``
starts from the newest checkpoint in the folder, and writes down what it and a run that nothing stopped came to.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import Transformer, adamw, assert_close, batches, distance, loss_of, part_of, train_alone, values_of
from ranks import PATIENCE, Ranks
from sharding import VIEW, shard, wholes
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from revcore_torch import is_recomputing

STEPS, EVERY, FATAL = 10, 3, 7  # steps count from 1; a checkpoint after each third


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": 0, "random": {}}


class Run:
    """A training run with dropout, whose checkpoints hold all that its losses depend on."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.step = rank, world, 0
        self.model = shard(Transformer(p=0.5).double())
        self.optimizer = adamw(self.model.parameters())
        torch.manual_seed(rank)

    def save(self, folder: Path) -> None:
        # every rank draws dropout masks of its own, so each has a key of its own
        more = {"step": self.step, "random": {str(self.rank): torch.get_rng_state()}}
        save({**state_of(self.model, self.optimizer), **more}, checkpoint_id=folder / f"{self.step:03}")

    def load(self, folder: Path) -> None:
        state = state_of(self.model, self.optimizer)
        state["random"] = {str(self.rank): torch.get_rng_state()}
        # DCP writes the metadata last: what has none was not finished
        newest = max(path.parent for path in folder.glob("*/.metadata"))
        load(state, checkpoint_id=newest)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        torch.set_rng_state(state["random"][str(self.rank)])
        self.step = state["step"]

    def train(self, folder: Path | None = None) -> list[float]:
        losses = []
        for batch in batches(steps=STEPS)[self.step :]:
            self.step += 1
            self.optimizer.zero_grad()
            loss = loss_of(self.model, part_of(batch, self.rank, self.world))
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            if folder is not None and self.step % EVERY == 0:
                self.save(folder)
        return losses


def die_in(run: Run, step: int) -> None:
    """Let the process be killed in a backward pass, between two blocks."""

    def hook(*_: Any) -> None:
        if run.step == step and is_recomputing():
            os.kill(os.getpid(), signal.SIGKILL)

    run.model.blocks[1].register_forward_pre_hook(hook)


def main(folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
    rank, world = dist.get_rank(), dist.get_world_size()
    run = Run(rank, world)
    if what == "die":
        if rank == 1:
            die_in(run, FATAL)
        run.train(folder)
        raise AssertionError("nobody was killed")
    run.load(folder)
    start = run.step
    resumed, whole_run = run.train(), Run(rank, world)
    losses = whole_run.train()
    equal = all(torch.equal(value, wholes(run.model)[name]) for name, value in wholes(whole_run.model).items())
    (folder / f"{rank}.json").write_text(json.dumps([start, resumed, losses, equal]))
    model = shard(Transformer().double())  # without dropout, for one process to go on with
    optimizer = adamw(model.parameters())
    for batch in batches(steps=STEPS)[:EVERY]:
        optimizer.zero_grad()
        loss_of(model, part_of(batch, rank, world)).backward()
        optimizer.step()
    save(state_of(model, optimizer), checkpoint_id=folder / "even")
    dist.destroy_process_group()


@pytest.fixture(scope="module", name="folder")
def what_is_left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kill a rank, start again, and return the folder."""
    folder = tmp_path_factory.mktemp("resume")
    with Ranks(["-W", "error", __file__, folder, "die"], 2, folder) as ranks:
        codes = ranks.wait(180)
        assert codes[1] == -signal.SIGKILL, ranks.said()
        assert codes[0] != 0
        assert "nobody was killed" not in ranks.said()
    assert sorted(path.parent.name for path in folder.glob("*/.metadata")) == ["003", "006"]
    with Ranks(["-W", "error", __file__, folder, "go-on"], 2, folder) as ranks:
        assert ranks.wait(180) == [0, 0], ranks.said()
    return folder


pytestmark = pytest.mark.xdist_group("fsdp2_resume")


def test_losses_are_those_of_the_run_that_nothing_stopped(folder: Path) -> None:
    for rank in range(2):
        start, resumed, losses, equal = json.loads((folder / f"{rank}.json").read_text())
        assert start == 6
        assert len(losses) == STEPS
        assert resumed == losses[start:]
        assert equal


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_one_process_goes_on_with_what_two_saved(folder: Path) -> None:
    model, other = Transformer().double(), Transformer().double()
    optimizer = adamw(model.parameters())
    state = state_of(model, optimizer)
    load(state, checkpoint_id=folder / "even")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert distance(values_of(model), values_of(other)) > 1e-3  # it did load something
    for batch in batches(steps=STEPS)[EVERY : EVERY + 2]:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    alone = Transformer(reversible=False).double()
    train_alone(alone, batches(steps=STEPS)[: EVERY + 2])
    assert_close(values_of(model), values_of(alone))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", VIEW)
    warnings.filterwarnings("ignore", "this program of .* steps, run back in")
    main(Path(sys.argv[1]), sys.argv[2])
