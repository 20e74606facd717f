"""The examples train, go on exactly where they were killed, and say what is wrong with a checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

import jax.numpy as jnp  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from typer.testing import CliRunner, Result  # noqa: E402

from examples import flax_linen, flax_nnx, training  # noqa: E402
from examples.tasks import make_task  # noqa: E402
from revcore import SpecError  # noqa: E402
from revcore.parity import EPS  # noqa: E402
from tests.tiers import product  # noqa: E402

pytestmark = pytest.mark.usefixtures("quickly_compiled_module")
LEARNERS: dict[str, Any] = {"nnx": flax_nnx.Learner, "linen": flax_linen.Learner}


class Countdown:
    """A learner that compiles nothing: its loss falls by one with every step."""

    label: ClassVar[str] = "Countdown"
    compiled = None

    def __init__(self, task: Any, depth: int, steps: int, seed: int, policy: Any) -> None:
        self.left = jnp.array([float(steps)])

    def train_step(self, inputs: Any, targets: Any) -> Any:
        self.left = self.left - 1
        return self.left[0] + 1

    def logits(self, inputs: Any) -> Any:
        return np.zeros((len(inputs), 10))

    def state(self) -> Any:
        return {"left": self.left}

    def load(self, state: Any) -> None:
        self.left = state["left"]


def run(learner: type[training.Learner], *arguments: Any) -> Result:
    return CliRunner().invoke(training.app(learner), ["--no-compare", *map(str, arguments)])


def ran(learner: type[training.Learner], *arguments: Any) -> str:
    result = run(learner, *arguments)
    assert result.exit_code == 0, result.output or result.exception
    return result.output


def refused(*arguments: Any) -> str:
    result = run(Countdown, *arguments)
    assert isinstance(result.exception, SpecError), result.output
    return str(result.exception)


# --- training ---------------------------------------------------------------------------------------------------------


# Each example once, and each task; NNX with digits in the next test
@pytest.mark.parametrize(
    ("name", "task"), product(LEARNERS, ["text", "digits"], fast=lambda *case: case == ("linen", "text"))
)
def test_policies_give_the_same_losses(name: str, task: Any) -> None:
    data, depth = make_task(task, seed=0), {"text": 4, "digits": 2}[task]
    made = []

    def make(policy: Any) -> training.Learner:
        made.append(LEARNERS[name](data, depth, 4, 0, policy))
        return made[-1]

    found = training.measure(make, data, rounds=1)
    for policy, figures in found.items():
        for loss, expected in zip(figures.losses, found["store-all"].losses, strict=True):
            assert loss == pytest.approx(expected, rel=16 * depth * EPS["float32"]), policy
    assert found["reverse"].losses[1] != found["reverse"].losses[0]
    before = training.evaluate(made[0], data)
    made[0].train_step(*data.batch(2))  # evaluated in between, as in a run
    after = training.evaluate(made[0], data)
    if task == "text":  # a loss, which any step moves; two steps need not move an accuracy
        assert after != before
        # in a list XLA may move what it likes from step to step; a scan holds it
        assert found["reverse"].bytes < found["checkpoint"].bytes < found["store-all"].bytes


_KILLED = """
import os, signal, sys
from examples import flax_linen, flax_nnx, tasks, training

digits = tasks.digits

def killed(seed):
    task = digits(seed)
    batch = task.batch
    def until_5(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(step)
    object.__setattr__(task, "batch", until_5)
    return task

tasks.digits = killed
training.main({"nnx": flax_nnx, "linen": flax_linen}[sys.argv.pop()].app)
"""


@pytest.mark.parametrize(
    ("name", "how"), product(LEARNERS, ["stopped", "killed"], fast=lambda *case: case == ("nnx", "stopped"))
)
def test_a_killed_run_goes_on_bit_for_bit(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[training.Learner] = []

    class Kept(LEARNERS[name]):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    options = ["--task", "digits", "--depth", 2, "--steps", 8, "--save-every", 3, "--checkpoint-dir"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    ran(Kept, *options, whole)
    if how == "killed":  # a process of its own
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": paths}
        command = [sys.executable, "-c", _KILLED, *map(str, options), str(parted), name]
        assert subprocess.run(command, env=environment, cwd=tmp_path).returncode == -signal.SIGKILL
    else:
        steps, step = iter(range(5)), Kept.train_step
        with monkeypatch.context() as patch:
            patch.setattr(Kept, "train_step", lambda self, *batch: (next(steps), step(self, *batch))[1])
            assert isinstance(run(Kept, *options, parted).exception, StopIteration)
    assert "after step 3" in ran(Kept, "--save-every", 3, "--checkpoint-dir", parted, "--resume")

    ends = [training.Checkpoints(folder, resume=True).run() for folder in (whole, parted)]
    assert ends[0] == ends[1]
    assert len(set(ends[0].losses)) == 8
    whole_state, parted_state = (jax.tree.leaves(learner.state()) for learner in (made[0], made[-1]))
    assert any(is_key(leaf) for leaf in whole_state)
    for a, b in zip(whole_state, parted_state, strict=True):
        np.testing.assert_array_equal(*(jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in (a, b)))


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def test_the_command_line_prints_what_came_of_it() -> None:
    output = ran(Countdown, "--steps", 3)
    ((_, labels),) = make_task("digits", 0).held_out
    assert f"Held-out accuracy: {np.mean(labels == 0):.4f} (by frequency alone" in output  # where logits are all equal
    assert "Last loss: 1.000000" in output


def test_a_table_of_memory_and_time_by_policy() -> None:
    figures = {name: training.Figures(2**20, 0.5, (2.25,)) for name in training.POLICIES}
    cells = [list(column.cells) for column in training.table(figures).columns]
    assert cells == [list(training.POLICIES), ["1.0 MiB"] * 3, ["500.0 ms"] * 3, ["2.250000"] * 3]


def test_ctrl_c_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Countdown.train_step

    def interrupted(self: Any, *batch: Any) -> Any:
        if float(self.left[0]) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(self, *batch)

    options = ["--steps", 10, "--checkpoint-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(Countdown, "train_step", interrupted)
        result = run(Countdown, *options)
    assert result.exit_code == training.INTERRUPTED
    assert "Stopped after step 5 of 10" in result.output
    assert "--resume" in result.output
    ran(Countdown, "--checkpoint-dir", tmp_path, "--resume", "--policy", "store-all")
    assert training.Checkpoints(tmp_path, resume=True).run().losses == [float(left) for left in range(10, 0, -1)]


def test_a_loss_that_is_no_number_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Countdown, "train_step", lambda *_: float("nan"))
    assert isinstance(run(Countdown).exception, FloatingPointError)


@pytest.mark.parametrize("task", ["digits", "text"])
def test_what_is_held_out_is_never_trained_on(task: Any) -> None:
    data = make_task(task, seed=0)
    inputs, targets = data.batch(3)
    again, _ = make_task(task, seed=0).batch(3)
    np.testing.assert_array_equal(inputs, again)
    assert (inputs != data.batch(4)[0]).any()
    held_out = {row.tobytes() for batch, _ in data.held_out for row in batch}
    trained = {row.tobytes() for step in range(30) for row in data.batch(step)[0]}
    assert len(trained) > len(held_out) / 2
    assert not trained & held_out
    assert inputs.shape[: targets.ndim] == targets.shape


# --- what is refused --------------------------------------------------------------------------------------------------


def stopped(folder: Path) -> Path:
    """Return a folder with the checkpoints of steps 2 and 3 of 4."""
    learner, settings = Countdown(None, 0, 4, 0, None), training.Settings("Countdown", "digits", 8, 4, 0)
    done = training.Run(settings)
    checkpoints = training.Checkpoints(folder, resume=False)
    for _ in range(3):
        done.losses.append(float(learner.train_step(None, None)))
        checkpoints.save(done, learner)
    return folder


def test_a_stopped_run_that_is_whole_goes_on(tmp_path: Path) -> None:
    """Else the refusals below would say little."""
    folder = stopped(tmp_path)
    (folder / "4.orbax-checkpoint-tmp-1").mkdir()  # what a run that was killed as it saved leaves
    assert "after step 3" in ran(Countdown, "--checkpoint-dir", folder, "--resume")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(**values: Any) -> Callable[[Path], None]:
    def change(last: Path) -> None:
        path = next(path for path in (last / "run").iterdir() if "losses" in path.read_text())
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def each(part: str, damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return a damage to every file beneath a part of a checkpoint."""

    def damage_all(last: Path) -> None:
        for path in (last / part).rglob("*"):
            if path.is_file():
                damage(path)

    return damage_all


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "state gone": (lambda last: shutil.rmtree(last / "state"), "cannot be read: it is damaged, or of another program"),
    "files gone": (each("state", Path.unlink), "cannot be read"),
    "files cut": (each("state", cut), "cannot be read"),
    "arrays cut": (each("state/d", cut), "cannot be read"),
    "arrays gone": (each("state/d", Path.unlink), "cannot be read"),
    "run gone": (lambda last: shutil.rmtree(last / "run"), "cannot be read"),
    "run cut": (each("run", cut), "cannot be read"),
    "other settings": (changed(settings={"lr": 1}), "is not of one of these examples"),
    "no losses": (changed(losses=None), "is not of one of these examples"),
    "a loss too few": (changed(losses=[1.0]), "contradicts itself: it has 1 losses"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_told(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    folder = stopped(tmp_path)
    damage(folder / "3")
    told = refused("--checkpoint-dir", folder, "--resume")
    assert re.search(message, told)
    if "not of one" not in told:
        assert told.endswith("Delete it to go on from step 2")
        shutil.rmtree(folder / "3")
        assert "after step 2" in ran(Countdown, "--checkpoint-dir", folder, "--resume")


def test_a_checkpoint_of_another_program_is_told(tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
    told = refused("--checkpoint-dir", tmp_path, "--resume")
    assert "it is damaged, or of another program" in told
    assert "It is the only one: start anew in another folder" in told


def test_options_that_contradict_the_checkpoint_are_told(tmp_path: Path) -> None:
    folder = stopped(tmp_path)
    where = ["--checkpoint-dir", folder]
    assert "made with --depth 8, but --depth 4 came: leave it out" in refused(*where, "--resume", "--depth", 4)
    assert "made with --task digits, but --task text came" in refused(*where, "--resume", "--task", "text")
    assert "holds the checkpoint of an earlier run: write --resume" in refused(*where)
    other = run(flax_nnx.Learner, *where, "--resume").exception
    assert "made with Countdown, but Flax NNX came: run that example" in str(other)
    ran(Countdown, *where, "--resume")
    assert "all 4 steps are done" in refused(*where, "--resume")


def test_folders_that_hold_nothing_are_told(tmp_path: Path) -> None:
    missing, empty, file = tmp_path / "missing", tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    assert "there is no folder" in refused("--checkpoint-dir", missing, "--resume")
    assert not missing.exists()
    assert "holds no checkpoint" in refused("--checkpoint-dir", empty, "--resume")
    assert "which is a file: give a folder" in refused("--checkpoint-dir", file)
    assert "say where it is with --checkpoint-dir" in refused("--resume")


def test_an_odd_depth_is_told() -> None:
    told = refused("--task", "text", "--depth", 3)
    assert "must be even for text (attention and MLP in turn): write --depth 4" in told
