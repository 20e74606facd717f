"""The example of DeepSpeed's pipeline, in small, by DeepSpeed's own launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT, free_port

pytest.importorskip("deepspeed")


def test_by_deepspeeds_launcher(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["--module", "examples.distributed.deepspeed_pipeline", "--steps", "1", "--depth", "3", "--micro", "2"]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "COLUMNS": "120",
    }
    process = subprocess.Popen(
        [*command, "--folder", str(tmp_path / "run")], env=environment, cwd=tmp_path, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, said
    assert "Held-out nats a byte" in said
    stages = re.findall(r"^ (\d) +(\d)–(\d) +([\d,]+) +(\d) +([\d.]+) MiB +(\d) *$", said, re.MULTILINE)
    assert [(stage, begin, end) for stage, begin, end, *_ in stages] == [("0", "0", "1"), ("1", "2", "5")], said
    assert [(waiting, calls) for *_, waiting, _, calls in stages] == [("2", "2"), ("1", "2")], said
    assert sorted(path.name[:8] for path in (tmp_path / "run").rglob("layer_*")) == [f"layer_0{i}" for i in range(6)]
