"""Reversible networks in JAX over two processes, each of two fake devices, gloo between them; one of them is killed.

One device and the network written out by hand, which keeps everything, is what all is held against.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")

import jax
import numpy as np

from revcore import Reverse
from tests.distributed.jax_networks import Layout, Training, Transformer, alone, assert_equal, batches, train
from tests.distributed.ranks import JAX, LIMIT, Cases, Ranks

WORLD, LOCAL = 2, 2
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={LOCAL}",
}
CASES = Cases(WORLD, environment=ENVIRONMENT, imports=JAX)
LAST, EVERY, FATAL = 9, 3, 7  # of the run that is killed: its steps, those from checkpoint to checkpoint, and the last


def held_against_one_device(rank: int, world: int, layout: Any) -> None:
    where = [[device.process_index for device in row] for row in layout.mesh.devices]
    assert {i for row in where for i in row} == {0, 1}
    assert (len(set(where[0])) == 2) == layout.across
    assert_equal(train(layout), alone())


for name, layout in {
    "data": Layout(4),
    "parameters cut over processes": Layout(4, cut=frozenset({"data"})),
    "tensors cut over processes": Layout(2, 2, frozenset({"data", "tensor"}), across=True),
}.items():
    case = functools.partial(held_against_one_device, layout=layout)
    CASES.add(name, case, long=name != "tensors cut over processes")


outcomes, test_on_two_processes = CASES.tests(__file__)


# --- a process is killed ----------------------------------------------------------------------------------------------


def start(folder: Path, part: str) -> Ranks:
    """Start one part of the run on both processes, which keeps its checkpoints in ``folder``."""
    return Ranks(["-W", "error", __file__, folder, part], WORLD, folder / part, ENVIRONMENT, JAX)


def losses(folder: Path) -> dict[int, str]:
    """Return what process 0 wrote down: the losses by step, bit for bit."""
    return dict(map(json.loads, (folder / "losses.jsonl").read_text().splitlines()))


def test_a_run_of_which_a_process_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    with start(tmp_path, "killed") as ranks:
        while not (tmp_path / "run/paused").exists():
            assert all(process.poll() is None for process in ranks.processes), ranks.said()
            time.sleep(0.05)
        ranks.kill(1)  # process 0 has begun the step, and waits for it
        assert ranks.processes[0].wait(LIMIT) != 0, ranks.said()  # ended by itself, and not well
        assert ranks.processes[1].wait() == -signal.SIGKILL
    whole = losses(tmp_path / "whole")
    assert len(set(whole.values())) == LAST
    assert {step: whole[step] for step in range(1, FATAL)} == losses(tmp_path / "run")

    with start(tmp_path, "resumed") as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
        assert f"from step {FATAL - 1}" in ranks.said()
    assert losses(tmp_path / "run") == whole


def train_and_save(folder: Path, pause: bool) -> None:
    """Train with dropout, parameters cut over the processes; go on from the last checkpoint, where there is one."""
    import orbax.checkpoint as ocp

    folder.mkdir(exist_ok=True)
    first = jax.process_index() == 0
    training = Training(Layout(4, cut=frozenset({"data"})), lambda: Transformer(2, Reverse(), p=0.3))
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            training.state = manager.restore(done, args=ocp.args.StandardRestore(training.state))
            print(f"from step {done}")
        for step, tokens in enumerate(batches(LAST), 1):
            if step <= done:
                continue
            if pause and step == FATAL and not first:
                (folder / "paused").touch()
                time.sleep(LIMIT)
            training.state, loss, _ = training.step(training.state, training.batch(tokens))
            value = np.asarray(loss.addressable_data(0)).item()
            if first:
                with (folder / "losses.jsonl").open("a") as out:
                    out.write(json.dumps([step, value.hex()]) + "\n")
            if step % EVERY == 0:
                manager.save(step, args=ocp.args.StandardSave(training.state))


def main() -> None:
    rank, port = int(os.environ["RANK"]), os.environ["MASTER_PORT"]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", WORLD, rank, initialization_timeout=300, heartbeat_timeout_seconds=30
    )
    if sys.argv[1:]:
        folder, part = Path(sys.argv[1]), sys.argv[2]
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # three runs of one program
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        if part == "killed":
            train_and_save(folder / "whole", pause=False)
        train_and_save(folder / "run", pause=part == "killed")
    else:
        CASES.run_each(rank, WORLD, CASES.agree_by_files(WORLD))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
