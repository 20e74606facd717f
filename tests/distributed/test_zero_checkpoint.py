"""Checkpoints of DeepSpeed's: a run goes on from one as if nothing had happened, after a rank was killed as well."""

from __future__ import annotations

import functools
import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from revcore import Momentum, SpecError
from tests.distributed.networks import Transformer, assert_close, batches, values_of
from tests.distributed.ranks import OF_DEEPSPEED, Cases, Outcomes, Ranks
from tests.distributed.zero_engine import engine_of, init, train, trained
from tests.distributed.zero_run import STEP, random_states
from tests.distributed.zero_universal import SAVED_AFTER

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

CASES = Cases(world=2, leaves=OF_DEEPSPEED)
FOLDER = "REVCORE_OUTCOMES"  # of the environment: the test's own


def place(name: str) -> str:
    return str(Path(os.environ[FOLDER]) / name)


def resumes(rank: int, world: int, *, stage: int) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder, data = place(f"stage{stage}"), batches(steps=4)
    torch.manual_seed(10 + rank)
    engine = engine_of(Transformer(p=0.3), stage)
    train(engine, data[:2], rank, world)
    engine.save_checkpoint(folder, client_state={"random": random_states()})
    middle = trained(engine)
    losses = train(engine, data[2:], rank, world)
    expected = trained(engine)

    again = engine_of(Transformer(p=0.3), stage)
    _, state = again.load_checkpoint(folder)
    torch.set_rng_state(state["random"][rank])
    assert_close(trained(again), middle, 0.0)
    assert train(again, data[2:], rank, world) == losses
    assert_close(trained(again), expected, 0.0)

    torch.manual_seed(0)
    other = engine_of(Transformer(p=0.3), stage)
    other.load_checkpoint(folder)
    assert train(other, data[2:], rank, world) != losses, "the generator's state matters"

    if stage:
        model = Transformer()
        whole: Any = get_fp32_state_dict_from_zero_checkpoint(folder)
        model.load_state_dict(whole)
        assert_close(values_of(model), middle, 0.0)


for stage in (0, 1, 2, 3):
    CASES.add(f"goes on, stage {stage}", functools.partial(resumes, stage=stage), long=stage in (0, 2))


def blocks_of(engine: Any) -> dict[str, Tensor]:
    """Return the parameters of blocks: what stands before them in the model, ``load_state_dict`` loads before them."""
    return {name: p for name, p in trained(engine).items() if name.startswith("blocks.")}


def another_program(rank: int, world: int, *, stage: int) -> None:
    """DeepSpeed's files keep what the state dict says of its network, and weights of another one are refused."""
    folder = place(f"program{stage}")
    engine = engine_of(Transformer(), stage)
    train(engine, batches(steps=1), rank, world)
    engine.save_checkpoint(folder)
    other = engine_of(Transformer(coupling=Momentum(0.9)), stage)
    before = blocks_of(other)
    with pytest.raises(SpecError, match="Momentum"):
        other.load_checkpoint(folder)
    assert_close(blocks_of(other), before, 0.0)


for stage in (0, 1, 2, 3):
    CASES.add(f"of another program, stage {stage}", functools.partial(another_program, stage=stage), long=stage < 3)


def saved_for_another_world(rank: int, world: int, *, stage: int) -> None:
    folder, data = Path(place(f"universal{stage}")), batches()
    engine = engine_of(Transformer(), stage)
    train(engine, data[:SAVED_AFTER], rank, world)
    engine.save_checkpoint(str(folder), tag="parted")
    expected = {"saved": trained(engine)}
    train(engine, data[SAVED_AFTER:], rank, world)
    if rank == 0:
        torch.save({**expected, "end": trained(engine)}, folder / "expected.pt")


for stage in (1, 2):
    name = f"saved for another world, stage {stage}"
    CASES.add(name, functools.partial(saved_for_another_world, stage=stage), long=stage == 2)


outcomes, test_on_two_ranks = CASES.tests(__file__)


@pytest.mark.parametrize("name", CASES.names[-2:])
def test_universal_checkpoint_goes_on_in_another_world(name: str, outcomes: Outcomes, tmp_path: Path) -> None:
    outcomes.check(name)
    stage = int(name[-1])
    folder = outcomes.folder / f"universal{stage}"
    convert: list[Any] = ["-W", "error", "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal"]
    convert += ["--inject_missing_state", "--num_extract_workers", 1, "--num_merge_workers", 1]
    convert += ["--input_folder", folder / "parted", "--output_folder", folder / "universal"]
    script = Path(__file__).with_name("zero_universal.py")
    for command in (convert, ["-W", "error", script, folder, stage]):
        with Ranks(command, 1, tmp_path, {"DS_ACCELERATOR": "cpu"}) as ranks:
            assert ranks.wait() == [0], ranks.said()


# --- a rank that is killed --------------------------------------------------------------------------------------------


def run(folder: Path, stage: int, *more: str) -> Ranks:
    folder.mkdir(exist_ok=True)
    script = Path(__file__).with_name("zero_run.py")
    return Ranks(["-W", "error", script, folder, stage, 9, *more], 2, folder)


def losses_of(folder: Path) -> list[dict[int, float]]:
    return [dict(map(json.loads, (folder / f"losses{rank}").read_text().splitlines())) for rank in range(2)]


@pytest.mark.parametrize("stage", [3])
def test_killed_in_the_middle_of_a_step(stage: int, tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with run(whole, stage) as undisturbed, run(killed, stage, "hang") as ranks:
        while not (killed / "hangs1").exists():
            assert all(process.poll() is None for process in ranks.processes), ranks.said()
            time.sleep(0.05)
        ranks.kill(1)
        ranks.kill()
        assert undisturbed.wait() == [0, 0], undisturbed.said()
    expected = losses_of(whole)
    assert [set(of) for of in losses_of(killed)] == [set(range(1, STEP))] * 2
    with run(killed, stage) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert losses_of(killed) == expected
    assert len(expected[0]) == 9


if __name__ == "__main__":
    CASES.run(init)
