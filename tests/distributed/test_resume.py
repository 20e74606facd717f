"""A rank is killed in the middle of a step; what goes on has the losses of a run that was not, bit for bit."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.ranks import PATIENCE, Ranks

SCRIPT = Path(__file__).with_name("resume.py")
STEPS, STOP = 9, 7  # resume.py's
ENGINES = ("ddp", "fsdp2", "pipeline")


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_in_the_middle_of_a_step(engine: str, tmp_path: Path) -> None:
    script, latest, more = SCRIPT, "step-000006", {}
    if engine == "pipeline":
        pytest.importorskip("deepspeed")
        script, latest, more = SCRIPT.with_name("resume_pipeline.py"), "global_step6", {"DS_ACCELERATOR": "cpu"}
    with Ranks(["-W", "error", script, engine, tmp_path, "first"], 2, tmp_path, more) as ranks:
        while not (tmp_path / "inside").exists():
            assert all(process.poll() is None for process in ranks.processes), ranks.said()
            time.sleep(0.05)
        ranks.kill(1)
        assert ranks.processes[1].wait() == -signal.SIGKILL
        survivor = ranks.processes[0].wait(PATIENCE / 2)  # far less than a collective waits for a rank that is alive
        assert survivor not in (0, -signal.SIGKILL), ranks.said()
    assert (tmp_path / "latest").read_text() == latest
    with Ranks(["-W", "error", script, engine, tmp_path, "second"], 2, tmp_path, more) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
        assert "Going on after step 6." in ranks.said()
    whole, resumed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "resumed"))
    assert len(whole) == STEPS
    assert len({*whole}) == STEPS
    assert resumed == whole
