"""Cases that run in several real processes: gloo on 127.0.0.1, one thread each, started once for a whole file of cases.

A test file is a script as well: it registers cases, and as a script it runs them, on every rank, one after the other::

    CASES = Cases(world=2)

    @CASES
    def averages(rank: int, world: int) -> None: ...

    outcomes = CASES.fixture(__file__)

    @pytest.mark.parametrize("name", CASES)
    def test_on_two_ranks(name: str, outcomes: Outcomes) -> None:
        outcomes.check(name)

    if __name__ == "__main__":
        CASES.run()

A case must assert on every rank; a rank that fails while another waits for it brings the run to its end within
``PATIENCE`` seconds, and the cases after it are said not to have run.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 120.0  # seconds that a collective waits for the other ranks
SKIPPED = "skipped: "  # what went wrong, where a case says that it cannot run here
LIMIT = 600.0  # seconds for a whole file: a test that hangs is to fail, not to stop everything
ROOT = Path(__file__).resolve().parents[2]

Case = Callable[[int, int], None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set, and what keeps processes on one machine out of each other's way."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }


def shared_folder(rank: int) -> Path:
    """Return one new folder on all ranks; it goes with the folder of the run's outcomes, where there is one."""
    import torch.distributed as dist

    name: list[str] = [tempfile.mkdtemp(dir=os.environ.get("REVCORE_OUTCOMES")) if rank == 0 else ""]
    dist.broadcast_object_list(name)
    return Path(name[0])


@functools.cache
def outcomes_folder() -> Path:
    """Return where this process writes what becomes of cases: a new folder, if nobody said."""
    return Path(os.environ.get("REVCORE_OUTCOMES") or tempfile.mkdtemp())


class Ranks:
    """Processes that were started together; whatever becomes of the test, none of them outlives it.

    Standard output and error of each go into one file, so that no full pipe stops a rank.
    """

    def __init__(self, command: Sequence[str | Path], world: int, folder: Path, more: Mapping[str, str] = {}) -> None:
        port = free_port()
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank, log in enumerate(self.logs):
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
                        env={**environment(rank, world, port), **more}, start_new_session=True,
                    )
                )  # fmt: skip

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self, *ranks: int) -> None:
        """End these ranks and all they started, at once (SIGKILL); all of them, where none is named."""
        for rank in ranks or range(len(self.processes)):
            process = self.processes[rank]
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Wait for all, but a few seconds only once one has failed; return their exit codes."""
        end = time.monotonic() + limit
        while any(p.poll() is None for p in self.processes):
            if any(p.poll() not in (None, 0) for p in self.processes):
                end = min(end, time.monotonic() + 5)
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.05)
        return [p.returncode for p in self.processes]

    def said(self) -> str:
        """Return what the ranks printed."""
        return "\n".join(f"--- rank {i} ---\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))


class Outcomes:
    """What became of each case of a file: nothing, or what went wrong on which rank; and where cases left files."""

    def __init__(self, folder: Path, problems: Mapping[str, list[str]], said: str, world: int) -> None:
        self.folder, self.problems, self.said, self.world = folder, problems, said, world

    def check(self, name: str) -> None:
        """Fail with what went wrong, if anything did, or if the case did not run on every rank."""
        problems = self.problems.get(name, [])
        if len(problems) != self.world:
            pytest.fail(f"{name!r} ended on {len(problems)} of {self.world} ranks:\n{self.said}")
        for rank, problem in enumerate(problems):
            if problem.startswith(SKIPPED):
                pytest.skip(problem.removeprefix(SKIPPED))
            if problem:
                pytest.fail(f"on rank {rank}:\n{problem}")


class Cases(dict[str, Case]):
    """The cases of one file, by name, and the processes they run in."""

    def __init__(self, world: int = 2, limit: float = LIMIT, environment: Mapping[str, str] = {}) -> None:
        super().__init__()
        self.world, self.limit, self.environment = world, limit, dict(environment)

    def __call__(self, case: Case) -> Case:
        return self.add(case.__name__.replace("_", " "), case)

    def add(self, name: str, case: Case) -> Case:
        assert name not in self, f"two cases are called {name!r}"
        self[name] = case
        return case

    def fixture(self, file: str) -> Any:
        """Return the fixture that starts ``file`` as a script on every rank and reads what became of its cases."""

        @pytest.fixture(scope="module", name="outcomes")
        def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outcomes:
            from helpers import once

            items: list[Any] = [item for item in request.session.items if item.path == Path(file)]
            wanted = [item.callspec.params.get("name") for item in items if "outcomes" in item.fixturenames]
            wanted = [name for name in wanted if name in self]  # other tests may look at outcomes, too

            def start(folder: Path) -> None:
                more = {**self.environment, "REVCORE_CASES": json.dumps(wanted), "REVCORE_OUTCOMES": str(folder)}
                with Ranks(["-W", "error", file], self.world, folder, more) as ranks:
                    ranks.wait(self.limit)
                (folder / "said").write_text(ranks.said())

            folder = once(tmp_path_factory, Path(file).stem, start, self.limit + 60)
            return Outcomes(folder, self._read(folder), (folder / "said").read_text(), self.world)

        return outcomes

    def _read(self, folder: Path) -> dict[str, list[str]]:
        problems: dict[str, list[str]] = {}
        for rank in range(self.world):
            path = folder / f"{rank}.jsonl"
            for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
                if not line.endswith("\n"):  # it is being written
                    continue
                name, problem = json.loads(line)
                problems.setdefault(name, []).append(problem)
        return problems

    def run(self, init: Callable[[], None] | None = None) -> None:
        """Run the cases on this rank, in one process group; ``init`` makes it, where it is not to be gloo's default."""
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        torch.set_num_threads(1)
        if init is None:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))
        else:
            init()
        rank, world = dist.get_rank(), dist.get_world_size()
        store = _get_default_store()

        def agree(name: str, problem: str) -> bool:
            store.set(f"outcome of {name} {rank}", "failed" if problem else "passed")
            return len({store.get(f"outcome of {name} {other}") for other in range(world)}) == 1

        self.run_each(rank, world, agree, before=lambda: torch.manual_seed(0))
        dist.destroy_process_group()

    def agree_by_files(self, world: int) -> Callable[[str, str], bool]:
        """Return an ``agree`` for :meth:`run_each` that needs nothing but the folder in which outcomes are kept."""
        folder = outcomes_folder()

        def agree(name: str, problem: str) -> bool:
            end = time.monotonic() + (10 if problem else PATIENCE)  # others may wait for the one that failed
            while time.monotonic() < end:
                problems = self._read(folder).get(name, [])
                if len(problems) == world:
                    return len({bool(each) for each in problems}) == 1
                time.sleep(0.02)
            return False

        return agree if world > 1 else lambda name, problem: True

    def run_each(
        self,
        rank: int,
        world: int,
        agree: Callable[[str, str], bool] = lambda name, problem: True,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Run the cases on this rank, whatever it is that ties the ranks together.

        ``agree`` gets a case's name and what went wrong here, and tells whether it ended alike on all ranks.
        """
        folder = outcomes_folder()
        for name in json.loads(os.environ.get("REVCORE_CASES") or json.dumps(list(self))):
            before()
            try:
                self[name](rank, world)
                problem = ""
            except pytest.skip.Exception as why:
                problem = f"{SKIPPED}{why}"
            except Exception:
                problem = traceback.format_exc()
                print(problem, flush=True)
            with (folder / f"{rank}.jsonl").open("a") as out:
                out.write(json.dumps([name, problem]) + "\n")
            if not agree(name, problem):  # the ranks have lost each other
                time.sleep(1)  # the first of them holds the store that the others read
                os._exit(1)
