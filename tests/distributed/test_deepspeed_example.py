"""The example of ZeRO, started in small by DeepSpeed's own launcher; stopped, and gone on with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT, environment, free_port

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

LIMIT = 300.0  # seconds for a start


def run(folder: Path, *arguments: str) -> str:
    """Return what the example says on two ranks, or fail; whatever becomes of it, no process of it is left."""
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module"]
    launcher = [sys.executable, str(Path(sys.executable).with_name(launch[0])), *launch[1:]]
    small = ["--depth", "2", "--rows", "2", "--every", "2", "--checkpoint", str(folder / "checkpoints")]
    # DeepSpeed's launcher sets these for its ranks by itself
    more = {name: value for name, value in environment(0, 1, 0).items() if name not in _OF_A_RANK}
    extensions = str(folder / "extensions")  # where no earlier run can have left a lock
    process = subprocess.Popen(
        [*launcher, "examples.distributed.deepspeed_zero", *small, *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**more, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": extensions, "NO_COLOR": "1", "COLUMNS": "100"},
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, said
    return said


_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def last_loss(said: str) -> str:
    return re.findall(r"Last loss: (\d+\.\d+)", said)[0]


def test_trains_and_goes_on(tmp_path: Path) -> None:
    at_first = run(tmp_path, "--steps", "2")
    said = run(tmp_path, "--steps", "4", "--policy", "checkpoint")
    assert "Going on after step 2." in said
    assert 0 < float(last_loss(said)) < float(last_loss(at_first))
    rows = re.findall(r"^ *(\d) +([\d.]+) MiB +([\d.]+) MiB +([\d.]+) MiB", at_first, re.MULTILINE)
    assert [rank for rank, *_ in rows] == ["0", "1"], at_first
    for _, weights, held, stored in rows:
        assert 0 < float(held) < float(stored) / 2
        assert float(weights) > 0
