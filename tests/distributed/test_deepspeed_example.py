"""The examples of DeepSpeed, in small: ZeRO, stopped and gone on with, and its pipeline; by its launcher as well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import Ranks, free_port

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

LAUNCHER = ("-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--master_port")
BY = pytest.mark.parametrize("launcher", [None, pytest.param(LAUNCHER, marks=pytest.mark.long, id="launcher")])


def run(folder: Path, name: str, launcher: Sequence[Any] | None, *options: Any) -> str:
    """Return what an example says on two ranks, forked or started by DeepSpeed's launcher."""
    example = [f"examples.distributed.{name}", *options]
    command = ["-W", "error", "-W", "ignore", "-m", *example]
    if launcher:
        command = [*launcher, free_port(), "--module", *example]
    more = {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "NO_COLOR": "1",
        "COLUMNS": "120",
    }
    world = 1 if launcher else 2
    with Ranks(command, world, folder / "logs", more) as ranks:
        assert ranks.wait() == [0] * world, ranks.said()
        return ranks.said()


def last_loss(said: str) -> str:
    return re.findall(r"Last loss: (\d+\.\d+)", said)[0]


@BY
def test_zero_trains_and_goes_on(launcher: Sequence[Any] | None, tmp_path: Path) -> None:
    small = ("--depth", 2, "--rows", 2, "--every", 2, "--checkpoint", tmp_path / "checkpoints")
    at_first = run(tmp_path, "deepspeed_zero", launcher, *small, "--steps", 2)
    said = run(tmp_path, "deepspeed_zero", launcher, *small, "--steps", 4, "--policy", "checkpoint")
    assert "Going on after step 2." in said
    assert 0 < float(last_loss(said)) < float(last_loss(at_first))
    rows = re.findall(r"^ *(\d) +([\d.]+) MiB +([\d.]+) MiB +([\d.]+) MiB", at_first, re.MULTILINE)
    assert [rank for rank, *_ in rows] == ["0", "1"], at_first
    for _, weights, held, stored in rows:
        assert 0 < float(held) < float(stored) / 2
        assert float(weights) > 0


@BY
def test_pipeline(launcher: Sequence[Any] | None, tmp_path: Path) -> None:
    small = ("--steps", 1, "--depth", 3, "--micro", 2, "--folder", tmp_path / "run")
    said = run(tmp_path, "deepspeed_pipeline", launcher, *small)
    assert "Held-out nats a byte" in said
    stages = re.findall(r"^ (\d) +(\d)–(\d) +([\d,]+) +(\d) +([\d.]+) MiB +(\d) *$", said, re.MULTILINE)
    assert [(stage, begin, end) for stage, begin, end, *_ in stages] == [("0", "0", "1"), ("1", "2", "5")], said
    assert [(waiting, calls) for *_, waiting, _, calls in stages] == [("2", "2"), ("1", "2")], said
    assert sorted(path.name[:8] for path in (tmp_path / "run").rglob("layer_*")) == [f"layer_0{i}" for i in range(6)]
