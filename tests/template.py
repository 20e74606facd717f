"""A process that has imported what many others need, and forks them: they start in milliseconds, not seconds.

``python -m tests.template SOCKET MODULE…`` imports the modules, listens on the Unix socket and forks a process for each
:class:`Start` that it reads. That process acts as ``python COMMAND`` would: it leads a process group of its own, has
the environment and the folder of the request, and writes to its log. Its exit code is sent back over the connection;
when the connection ends first, the process ends with all that it started. The template itself goes when nobody is
connected to it any more, however that came about.

Nothing but imports may happen here: no thread, no process group and no JAX backend survives a fork.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

DUMP = signal.SIGUSR1  # a process that gets it writes where each of its threads is into its log
NO_CODE = 1000  # in place of an exit code, where there is none: the connection to the template broke


@dataclasses.dataclass(frozen=True)
class Start:
    """What to run, ``[-W FILTER]… SCRIPT|-m MODULE ARGUMENT…``, and where; what it prints goes to ``log``."""

    command: tuple[str, ...]
    environment: dict[str, str]
    folder: str
    log: str


# --- the side of those who ask ----------------------------------------------------------------------------------------


class Process:
    """A process that a template forked; what ``subprocess.Popen`` says of one that it started."""

    def __init__(self, template: Path, start: Start) -> None:
        self._connection = connect(template)
        self._answers = self._connection.makefile("r")
        self._connection.sendall(json.dumps(dataclasses.asdict(start)).encode() + b"\n")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._connection, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a forked process", timeout or 0)
            self.returncode = int(self._answers.readline() or NO_CODE)
            self._answers.close()
            self._connection.close()
        return self.returncode


def connect(template: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(template))
    return connection


def start_template(
    path: Path,
    modules: Sequence[str],
    environment: dict[str, str],
    folder: Path,
    options: Sequence[str] = ("-W", "error"),
) -> None:
    """Start a template that listens at ``path``, and wait until it does; its processes share Python's ``options``."""
    with path.with_suffix(".log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, *options, "-m", "tests.template", str(path), *modules],
            env=environment, cwd=folder, check=False,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the template of {modules} did not start:\n{path.with_suffix('.log').read_text()}")


# --- the process itself -----------------------------------------------------------------------------------------------


def import_all(modules: Sequence[str]) -> None:
    """Import what there is of them; their warnings are theirs, and the filters that they set stay."""
    warnings.simplefilter("ignore")
    ours = warnings.filters[0]
    for module in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    warnings.filters.remove(ours)  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()  # what is imported is never garbage, and a collection would copy all of it into each fork


def act_as(start: Start) -> int:
    """Do in this process what ``python COMMAND`` does, and return the exit code."""
    log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, number in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(file, number)
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    faulthandler.enable()
    faulthandler.register(DUMP, all_threads=True)
    command = [*start.command]
    while command[0] == "-W":
        action, message, category, *_ = [*command[1].split(":"), "", "Warning"]
        if action != "error":  # that one the template has from its own start, behind the filters that modules set
            warnings.filterwarnings(action, re.escape(message), getattr(builtins, category))  # type: ignore[arg-type]
        del command[:2]
    by_name = command[0] == "-m"
    sys.argv = command[by_name:]
    paths = start.environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[0:1] = [start.folder if by_name else str(Path(command[0]).parent), *filter(None, paths)]
    try:
        if by_name:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
        atexit._run_exitfuncs()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(start: Start, close: Sequence[socket.socket]) -> int:
    """Return the number of a new process, which acts as asked for and never comes back here."""
    pid = os.fork()
    with contextlib.suppress(PermissionError):  # both do it, as either may be the first to need it
        os.setpgid(pid, pid)
    if pid:
        return pid
    code = 1
    try:
        for each in close:
            each.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        code = act_as(start)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def write_down_cost(start: Start, cpu: float) -> None:
    """Note what a process took, for ``make costs``: whoever asked for it is not its parent, and cannot know."""
    if folder := start.environment.get("REVCORE_COSTS"):
        test = start.environment.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0]
        with (Path(folder) / f"template{os.getpid()}.jsonl").open("a") as out:
            out.write(json.dumps({"kind": "forked", "test": test, "cpu": cpu}) + "\n")


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def serve(listener: socket.socket) -> None:
    """Fork whatever is asked for, until all who were connected are gone."""
    woken, wakes = socket.socketpair()  # a child's end wakes the loop
    for each in (woken, wakes):
        each.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    running: dict[int, tuple[socket.socket, Start]] = {}  # by process
    connected: set[socket.socket] = set()
    served = False

    def forget(connection: socket.socket) -> None:
        selector.unregister(connection)
        connected.remove(connection)
        connection.close()

    while connected or not served:
        for key, _ in selector.select():
            found: socket.socket = key.fileobj  # type: ignore[assignment]
            if found is listener:
                connection, _ = listener.accept()
                connected.add(connection)
                selector.register(connection, selectors.EVENT_READ)
                served = True
            elif found is woken:
                woken.recv(4096)
                while running:
                    pid, status, usage = os.wait4(-1, os.WNOHANG)
                    if pid == 0:
                        break
                    connection, start = running.pop(pid)
                    write_down_cost(start, usage.ru_utime + usage.ru_stime)
                    with contextlib.suppress(OSError):
                        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            elif line := found.makefile("r").readline():
                open_now = [listener, woken, wakes, *connected]
                start = Start(**json.loads(line))
                pid = fork(start, open_now)
                running[pid] = found, start
                found.sendall(f"{pid}\n".encode())
            else:
                for pid in [pid for pid, (connection, _) in running.items() if connection is found]:
                    kill(pid)
                forget(found)
    for pid in running:
        kill(pid)


def main(path: Path, modules: Sequence[str]) -> None:
    import_all(modules)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)  # whoever sees it can connect
    if not os.fork():  # whoever started this process waits for its end alone
        serve(listener)
    os._exit(0)


if __name__ == "__main__":
    del sys.modules["tests"]  # a process may have tests of another checkout
    main(Path(sys.argv[1]), sys.argv[2:])
