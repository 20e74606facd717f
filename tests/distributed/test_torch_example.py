"""The example for PyTorch's engines runs by torchrun, and its checkpoints go on only where they came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from examples.distributed import torch_engines
from examples.distributed.checkpoints import Checkpoints
from revcore import Momentum, SpecError
from revcore_torch import ReversibleSequential
from tests.distributed.ranks import Ranks, free_port

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port"]


@pytest.mark.parametrize("launcher", [None, pytest.param(TORCHRUN, marks=pytest.mark.long, id="torchrun")])
def test_by_torchrun(launcher: list[Any] | None, tmp_path: Path) -> None:
    """By torchrun, and by what sets torchrun's variables for two ranks that are forked."""
    options = ["--engine", "fsdp2", "--steps", 3, "--depth", 1, "--every", 2, "--checkpoint", tmp_path / "run"]
    example = ["-m", "examples.distributed.torch_engines", *options]
    command, world = ([*launcher, free_port(), *example], 1) if launcher else (["-W", "error", *example], 2)
    with Ranks(command, world, tmp_path) as ranks:
        assert ranks.wait() == [0] * world, ranks.said()
        said = ranks.said()
    sizes = re.findall(r"^ +(\d) +(\S+) MiB +(\S+) MiB +(\S+) MiB +$", said, re.MULTILINE)
    assert [rank for rank, *_ in sizes] == ["0", "1"], said
    parameters, optimizer = (sum(float(row[i]) for row in sizes) for i in (1, 2))
    model = torch_engines.Transformer(1)
    assert parameters == pytest.approx(sum(p.nbytes for p in model.parameters()) / 2**20, abs=0.02)  # a shard each
    assert optimizer == pytest.approx(2 * parameters, abs=0.04)
    assert len(re.findall(r"^step \d", said, re.MULTILINE)) == 2, "only rank 0 prints"
    assert re.search(r"^Losses: \S+ at first, \S+ at last; held out \S+$", said, re.MULTILINE)
    assert (tmp_path / "run" / "latest").read_text() == "step-000003"
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["step-000003"]


def test_help_and_a_start_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    shown = CliRunner().invoke(torch_engines.app, ["--help"]).output
    assert "torchrun --nnodes 4" in " ".join(shown.split())
    error = CliRunner().invoke(torch_engines.app, []).exception
    assert isinstance(error, SpecError)
    assert "start it by torchrun --nproc-per-node 2" in str(error)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(folder: Path, seed: int = 0, **settings: Any) -> tuple[ReversibleSequential, Checkpoints]:
    torch.manual_seed(seed)
    model = ReversibleSequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), **settings)
    optimizer = torch.optim.AdamW(model.parameters())
    return model, Checkpoints(folder, model, optimizer, {"seed": seed})


def step(model: ReversibleSequential, checkpoints: Checkpoints) -> None:
    model(torch.randn(3, 4)).square().sum().backward()
    checkpoints.optimizer.step()
    checkpoints.optimizer.zero_grad()


def test_a_checkpoint_is_of_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model, checkpoints = made(folder)
    assert checkpoints.load() == []
    step(model, checkpoints)
    checkpoints.save([0.5])
    step(model, checkpoints)
    expected = [p.clone() for p in model.parameters()]
    again, theirs = made(folder)
    torch.manual_seed(9)
    assert theirs.load() == [0.5]
    step(again, theirs)  # with the numbers that were drawn then
    assert all(map(torch.equal, again.parameters(), expected))
    others: list[tuple[dict[str, Any], str]] = [
        ({"coupling": Momentum(0.9)}, r"in step 0 the coupling is Additive\(scale=1.0\) there and Momentum"),
        ({"seed": 1}, r"step-000001 is of a run with {'seed': 0}, and this one has {'seed': 1}: give what it had"),
    ]
    for settings, words in others:
        other, refused = made(folder, **settings)
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(SpecError, match=words):
            refused.load()
        assert all(map(torch.equal, other.parameters(), before))


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    _, checkpoints = made(folder)
    checkpoints.save([0.5])
    monkeypatch.setattr(dist, "barrier", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save([0.5, 0.4])
    assert (folder / "step-000002").exists()
    assert made(folder)[1].load() == [0.5]
