"""Cases that run in several real processes: gloo on 127.0.0.1, one thread each, started once for a whole file of cases.

A test file is a script as well: it registers cases, and as a script it runs them, on every rank, one after the other::

    CASES = Cases(world=2)

    @CASES
    def averages(rank: int, world: int) -> None: ...

    outcomes, test_on_two_ranks = CASES.tests(__file__)

    if __name__ == "__main__":
        CASES.run()

Ranks are forked from a process that has imported what they need (``template.py``). A case must assert on every rank.
One that fails on some ranks alone, dies or hangs ends the processes; each rank's traceback is its own outcome, and the
cases after it run in new ones. One that leaves a global setting or a process group behind fails itself (``left.py``).
"""

from __future__ import annotations

import contextlib
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
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.distributed.left import global_state, left_behind
from tests.template import DUMP, Process, Start, connect, start_template

PATIENCE = 300.0  # seconds that a collective waits for the other ranks
LIMIT = 600.0  # seconds for one case, and for the start: one that hangs is to fail, not to stop everything
SKIPPED = "skipped: "  # what went wrong, where a case says that it cannot run here
ROOT = Path(__file__).resolve().parents[2]

# What a template imports for the ranks that it forks, where it is installed
TORCH = (
    "pytest",
    "rich.console",
    "typer",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torch._inductor.compile_fx",  # which torch.compile imports with any backend
    "revcore_torch",
    "transformers.trainer",
    "transformers.models.gpt2",
    "accelerate",
    "lightning",
    "peft",
    "deepspeed.ops",
    "deepspeed.pipe",
)
OF_DEEPSPEED = ("process groups",)  # which its engines make and keep for the process's life
JAX = ("pytest", "jax", "jax.export", "flax.nnx", "optax", "orbax.checkpoint", "revcore_jax.nnx")

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
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def shared_folder(rank: int) -> Path:
    """Return one new folder on all ranks; it goes with the folder of the run's outcomes, where there is one."""
    import torch.distributed as dist

    name: list[str] = [tempfile.mkdtemp(dir=os.environ.get("REVCORE_OUTCOMES")) if rank == 0 else ""]
    dist.broadcast_object_list(name)
    return Path(name[0])


def init_gloo() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=PATIENCE))


@functools.cache
def outcomes_folder() -> Path:
    """Return where this process writes what becomes of cases: a new folder, if nobody said."""
    return Path(os.environ.get("REVCORE_OUTCOMES") or tempfile.mkdtemp())


class AnyProcess(Protocol):
    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


_alive: list[socket.socket] = []  # templates end when nobody is connected to them


@functools.cache
def template_of(modules: tuple[str, ...]) -> Path:
    """Return the socket of a template that has imported these; pytest's workers share it, the first starts it."""
    shared = Path(os.environ.get("REVCORE_TEMPLATES") or tempfile.mkdtemp(prefix="revcore-"))
    path = shared / f"{zlib.crc32(' '.join(modules).encode())}.socket"
    try:
        path.with_suffix(".started").open("x").close()
    except FileExistsError:
        end = time.monotonic() + LIMIT
        while not path.exists():
            assert time.monotonic() < end, f"another worker did not start the template {path}"
            time.sleep(0.02)
    else:
        start_template(path, modules, {**environment(0, 1, 0), "DS_ACCELERATOR": "cpu"}, ROOT)
    _alive.append(connect(path))
    return path


class Ranks:
    """Processes that were started together; whatever becomes of the test, none of them outlives it.

    ``-W error SCRIPT …`` and ``-W error -m MODULE …`` are forked from the template that has ``imports``; anything else
    is a Python of its own. Standard output and error of each go into one file, so that no full pipe stops a rank.
    """

    def __init__(
        self,
        command: Sequence[str | Path | int],
        world: int,
        folder: Path,
        more: Mapping[str, str] = {},
        imports: tuple[str, ...] = TORCH,
    ) -> None:
        port = free_port()
        folder.mkdir(exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self.processes: list[AnyProcess] = []
        words = [*map(str, command)]
        for rank, log in enumerate(self.logs):
            variables = {**environment(rank, world, port), **more}
            if words[:2] == ["-W", "error"]:
                start = Start((*words,), variables, str(ROOT), str(log))
                self.processes.append(Process(template_of(imports), start))
            else:
                with log.open("wb") as out:
                    self.processes.append(
                        subprocess.Popen(
                            [sys.executable, *words], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=variables,
                            start_new_session=True,
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

    def dump(self) -> None:
        """Let each rank that still runs write into its log where it is."""
        both = zip(self.processes, self.logs, strict=True)
        running = [(process, log, log.stat().st_size) for process, log in both if process.poll() is None]
        for process, _, _ in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, DUMP)
        end = time.monotonic() + 10
        for process, log, size in running:
            while process.poll() is None and log.stat().st_size == size and time.monotonic() < end:
                time.sleep(0.02)

    def wait(
        self, limit: Callable[[], float] = lambda: LIMIT, progress: Callable[[], object] = lambda: None
    ) -> list[int]:
        """Wait for all, but a few seconds only once one has failed; return their exit codes.

        ``limit`` begins anew whenever ``progress`` returns something else. Ranks that do not end in time say where they
        are before they are killed.
        """
        seen, end = progress(), time.monotonic() + limit()
        failed = False
        while any(p.poll() is None for p in self.processes):
            if not failed and any(p.poll() not in (None, 0) for p in self.processes):
                failed, end = True, min(end, time.monotonic() + 5)
            if not failed and (now := progress()) != seen:
                seen, end = now, time.monotonic() + limit()
            if time.monotonic() > end:
                self.dump()
                self.kill()
            time.sleep(0.02)
        return [p.wait() for p in self.processes]

    def said(self) -> str:
        """Return what the ranks printed."""
        return "\n".join(f"--- rank {i} ---\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))


class Outcomes:
    """What became of each case of a file: nothing, or what went wrong on which rank; and where cases left files."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.world = folder, world
        self.problems = read_outcomes(folder, world)
        self.lost: dict[str, str] = json.loads((folder / "lost.json").read_text())
        """What the ranks said while a case ran that did not end on all of them, by its name."""

    def check(self, name: str) -> None:
        """Fail with what went wrong, if anything did, or if the case did not run on every rank."""
        problems = self.problems.get(name, {})
        if reason := next((p.removeprefix(SKIPPED) for p in problems.values() if p.startswith(SKIPPED)), ""):
            pytest.skip(reason)
        wrong = [f"on rank {rank}:\n{problem}" for rank, problem in sorted(problems.items()) if problem]
        if len(problems) != self.world:
            missing = sorted({*range(self.world)} - {*problems})
            said = self.lost.get(name, "no rank began it")
            wrong.append(f"{name!r} ended on {len(problems)} of {self.world} ranks, and not on {missing}:\n{said}")
        if wrong:
            pytest.fail("\n".join(wrong))


def read_lines(path: Path) -> list[Any]:
    """Return what one rank wrote, line by line, so far."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else ()
    return [json.loads(line) for line in lines if line.endswith("\n")]  # else it is being written


def read_outcomes(folder: Path, world: int) -> dict[str, dict[int, str]]:
    """Return what each case came to on each rank on which it ended."""
    problems: dict[str, dict[int, str]] = {}
    for rank in range(world):
        for name, problem, _ in read_lines(folder / f"{rank}.jsonl"):
            problems.setdefault(name, {})[rank] = problem
    return problems


def read_begun(folder: Path, world: int) -> list[str]:
    """Return the cases that ranks have begun."""
    return [name for rank in range(world) for name in read_lines(folder / f"{rank}.begun.jsonl")]


class Cases(dict[str, Case]):
    """The cases of one file, by name, and the processes they run in.

    ``imports`` says which template forks the ranks. ``leaves`` names what cases here may leave behind (of
    :func:`left.global_state`), since the engine under test does.
    """

    def __init__(
        self,
        world: int = 2,
        environment: Mapping[str, str] = {},
        imports: tuple[str, ...] = TORCH,
        leaves: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.world, self.environment, self.imports = world, dict(environment), imports
        self.leaves = tuple(leaves)
        self.limits: dict[str, float] = {}
        self.names: list[Any] = []
        """What ``parametrize`` takes."""

    def __call__(self, case: Case) -> Case:
        return self.add(case.__name__.replace("_", " "), case)

    def add(self, name: str, case: Case, long: bool = False, limit: float = LIMIT) -> Case:
        """Register a case, which may take ``limit`` seconds on the last rank; a ``long`` one runs in the long tier."""
        self.limits[name] = limit
        assert name not in self, f"two cases are called {name!r}"
        self[name] = case
        self.names.append(pytest.param(name, marks=pytest.mark.long if long else ()))
        return case

    def tests(self, file: str) -> tuple[Any, Any]:
        """Return the fixture ``outcomes``, and the test of each case."""

        @pytest.mark.parametrize("name", self.names)
        def test(name: str, outcomes: Outcomes) -> None:
            outcomes.check(name)

        return self.fixture(file), test

    def fixture(self, file: str) -> Any:
        """Return the fixture that starts ``file`` as a script on every rank and reads what became of its cases."""

        @pytest.fixture(scope="module", name="outcomes")
        def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outcomes:
            from tests.helpers import once

            asked: set[str] = set()
            for item in request.session.items:
                if item.path == Path(file) and "outcomes" in item.fixturenames:  # type: ignore[attr-defined]
                    name = item.callspec.params.get("name") if hasattr(item, "callspec") else None  # type: ignore[attr-defined]
                    asked.update([name] if name is not None and name in self else self)  # it may look at any
            wanted = [name for name in self if name in asked]
            start = functools.partial(self.run_in_processes, file, wanted)
            return Outcomes(once(tmp_path_factory, Path(file).stem, start, 10 * LIMIT), self.world)

        return outcomes

    def limit_of(self, names: Sequence[str], folder: Path) -> float:
        """Return the seconds that the last of these cases which all ranks have begun may take."""
        begun = read_begun(folder, self.world)
        return next((self.limits[name] for name in reversed(names) if begun.count(name) >= self.world), LIMIT)

    def run_in_processes(self, file: str, wanted: Sequence[str], folder: Path) -> None:
        """Run the cases with these names; new processes take over behind one that did not end on every rank."""
        lost: dict[str, str] = {}
        left = [*wanted]
        while left:
            more = {**self.environment, "REVCORE_CASES": json.dumps(left), "REVCORE_OUTCOMES": str(folder)}
            here = folder / f"processes{len(left)}"
            with Ranks(["-W", "error", file], self.world, here, more, self.imports) as ranks:
                ranks.wait(
                    functools.partial(self.limit_of, left, folder), progress=lambda: read_begun(folder, self.world)
                )
            ended, begun = read_outcomes(folder, self.world), read_begun(folder, self.world)
            name = next((name for name in left if len(ended.get(name, ())) < self.world), None)
            if name is None:
                break
            codes = ", ".join(f"rank {rank}: {process.wait()}" for rank, process in enumerate(ranks.processes))
            said = f"exit codes: {codes}\n{ranks.said()}"
            if name in begun:
                lost[name] = said
                left = left[left.index(name) + 1 :]
            elif left[0] in begun:  # the ranks parted after the case before it
                left = left[left.index(name) :]
            else:  # they never came to it, and will not the next time
                lost |= dict.fromkeys(left, said)
                break
        (folder / "lost.json").write_text(json.dumps(lost))

    def run(self, init: Callable[[], object] = init_gloo) -> None:
        """Run the cases on this rank, in the process group that ``init`` makes, and whatever else they share."""
        import torch
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import _get_default_store

        torch.set_num_threads(1)
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
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                problems = read_outcomes(folder, world).get(name, {})
                if len(problems) == world or (problem and not any(problems.values())):
                    return len({bool(each) for each in problems.values()}) == 1
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
            with (folder / f"{rank}.begun.jsonl").open("a") as out:
                out.write(json.dumps(name) + "\n")
            before()
            state = global_state()
            begun = time.process_time()
            try:
                self[name](rank, world)
                problem = "\n".join(left_behind(state, self.leaves))
            except pytest.skip.Exception as why:
                problem = f"{SKIPPED}{why}"
            except Exception:
                problem = traceback.format_exc()
                print(problem, flush=True)
            with (folder / f"{rank}.jsonl").open("a") as out:
                out.write(json.dumps([name, problem, time.process_time() - begun]) + "\n")
            if not agree(name, problem):  # the ranks have lost each other
                time.sleep(1)  # the first of them holds the store that the others read
                os._exit(1)
