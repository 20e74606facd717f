"""Make each small wrong change that ``tests/mutants/*.toml`` lists, in a copy, and see whether the tests notice.

    make mutants                          # each against the tests named beside it
    make mutants ARGS="--only bdia"       # those whose name has "bdia" in it
    make mutants ARGS="--all"             # each against the whole fast suite (hours)

A mutant is *caught* if a test fails, *missed* if all pass. It is an error if one is missed, if its text no longer
stands there exactly once, if a test that it names is not there, or if that test fails without any change.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.template import Process, Start, connect, start_template

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
IMPORTS = ("pytest", "numpy", "torch", "jax", "flax.nnx", "flax.linen", "optax")  # never our own packages
LIMIT = 600.0  # seconds for the tests of one mutant: a fault may make them wait for ever, and is caught then
CAUGHT, MISSED, STALE = "caught", "MISSED", "STALE"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One wrong change: ``old``, which stands once in ``file``, becomes ``new``, and one of ``tests`` should fail."""

    name: str
    file: str
    old: str
    new: str
    fault: str
    tests: tuple[str, ...]
    area: str = ""

    def problem(self, root: Path) -> str:
        """Return why it cannot be made in this checkout; nothing, if it can.

        >>> Mutant("m", "README.md", "no such text", "", "", ("tests",)).problem(ROOT)
        'its text stands 0 times in README.md, not once'
        """
        path = root / self.file
        if not path.is_file():
            return f"there is no {self.file}"
        text = path.read_text()
        if (times := text.count(self.old)) != 1:
            return f"its text stands {times} times in {self.file}, not once"
        if self.old == self.new:
            return "it changes nothing"
        try:
            compile(text.replace(self.old, self.new), self.file, "exec")
        except SyntaxError as error:
            return f"it is no Python: {error}"
        if not self.tests:
            return "it names no test"
        if missing := [test for test in self.tests if not (root / test.split("::")[0]).exists()]:
            return f"there is no {missing[0]}"
        return ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a mutant: caught, missed or stale; why; and how long that took, in seconds."""

    mutant: Mutant
    outcome: str
    why: str
    seconds: float = 0.0


def read(folder: Path) -> list[Mutant]:
    """Return all mutants listed in a folder's ``*.toml``; two of one name are an error."""
    found = [
        Mutant(**{**entry, "tests": tuple(entry["tests"])}, area=path.stem)
        for path in sorted(folder.glob("*.toml"))
        for entry in tomllib.loads(path.read_text())["mutant"]
    ]
    twice = [name for name, times in Counter(mutant.name for mutant in found).items() if times > 1]
    if twice:
        raise SystemExit(f"two mutants are called {twice[0]!r}")
    return found


def copy_checkout(root: Path, to: Path) -> None:
    """Copy what git tracks, and what it would: not the environments, builds and caches."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, to / name)


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a test run in this copy: its packages are found first, its templates are its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("REVCORE_TEMPLATES", "PYTHONDONTWRITEBYTECODE")
    }
    return {**kept, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Copy:
    """A copy of the checkout that one mutant at a time is made in."""

    def __init__(self, folder: Path, template: Path) -> None:
        self.folder, self.template = folder, template
        self.written = 0

    def write(self, file: str, text: str) -> None:
        """Write so that no compiled code of before passes for this text: Python tells by seconds and sizes alone."""
        self.written += 1
        path = self.folder / file
        path.write_text(text)
        moment = time.time() + 10 * self.written
        os.utime(path, (moment, moment))

    def run(self, tests: Iterable[str], more: Sequence[str] = ()) -> tuple[int, str]:
        """Run tests in a process group of its own, so that nothing they start outlives them; return how that ended."""
        command = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *more, *tests)
        log = self.folder.with_suffix(".log")
        process = Process(self.template, Start(command, environment(self.folder), str(self.folder), str(log)))
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return code, log.read_text(errors="replace")

    def judge(self, mutant: Mutant, tests: Sequence[str], more: Sequence[str] = ()) -> Verdict:
        start = time.monotonic()
        if problem := mutant.problem(self.folder):
            return Verdict(mutant, STALE, problem)
        text = (self.folder / mutant.file).read_text()
        self.write(mutant.file, text.replace(mutant.old, mutant.new))
        try:
            code, said = self.run(tests, more)
        finally:
            self.write(mutant.file, text)
        return Verdict(mutant, *outcome(code, said), time.monotonic() - start)


def outcome(code: int, said: str) -> tuple[str, str]:
    r"""Tell a failed test from tests that passed and from tests that never ran, by pytest's exit code.

    >>> outcome(1, "FAILED tests/a.py::b - AssertionError: 1 != 2\n1 failed in 2 s")
    ('caught', 'tests/a.py::b - AssertionError: 1 != 2')
    >>> outcome(1, "SyntaxError: in the configuration")
    ('STALE', 'no test ran: SyntaxError: in the configuration')
    >>> outcome(0, "1 passed")
    ('MISSED', '1 passed')
    >>> outcome(4, "ERROR: not found: tests/a.py::c")
    ('STALE', 'not found: tests/a.py::c')
    """
    last = said.strip().splitlines()[-1:] or [""]
    if code == -1:
        return CAUGHT, f"did not end within {LIMIT:.0f} s"
    if code < 0:
        return CAUGHT, f"died of signal {-code}"
    if re.search(r"\b\d+ (failed|errors?)\b", last[0]):
        failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", said, re.MULTILINE)
        return CAUGHT, failures[0] if failures else last[0]
    if code == 0 and "passed" in last[0]:
        return MISSED, last[0]
    missing = re.findall(r"^ERROR: (.*)$", said, re.MULTILINE)
    return STALE, missing[0] if missing else f"no test ran: {last[0]}"


def unchanged_tests_pass(copies: Sequence[Copy], mutants: Sequence[Mutant]) -> list[Verdict]:
    """Run every named test once without any change: what fails then would catch nothing."""
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    more = ["-n", str(len(copies)), "--maxfail=20"] if len(copies) > 1 else ["--maxfail=20"]
    code, said = copies[0].run(tests, more)
    if code == 0:
        return []
    nobody = Mutant("(no change at all)", "", "", "", "", tuple(tests))
    failures = re.findall(r"^(?:FAILED|ERROR:?) (.*)$", said, re.MULTILINE) or said.strip().splitlines()[-3:]
    return [Verdict(nobody, STALE, f"fails without any change: {failure}") for failure in failures]


def judge_all(mutants: Sequence[Mutant], copies: Sequence[Copy], whole_suite: bool) -> list[Verdict]:
    todo: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        todo.put(mutant)
    verdicts: list[Verdict] = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("mutants", total=len(mutants))

        def work(copy: Copy) -> None:
            while True:
                try:
                    mutant = todo.get_nowait()
                except queue.Empty:
                    return
                verdict = copy.judge(mutant, () if whole_suite else mutant.tests)
                verdicts.append(verdict)
                progress.advance(bar)
                if verdict.outcome != CAUGHT or not console.is_terminal:
                    print(f"{verdict.outcome:7} {verdict.seconds:5.1f} s  {mutant.name}", flush=True)

        threads = [threading.Thread(target=work, args=(copy,)) for copy in copies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    order = {mutant.name: i for i, mutant in enumerate(mutants)}
    return sorted(verdicts, key=lambda verdict: order[verdict.mutant.name])


def write_table(verdicts: Sequence[Verdict], path: Path) -> None:
    """Write what became of each mutant, as the Markdown that ``benchmarks/results`` keeps."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    lines = [
        f"{len(verdicts)} mutants: " + ", ".join(f"{n} {outcome.lower()}" for outcome, n in counts.items()) + ".",
        "",
        "| area | mutant | file | outcome | by, or why not | seconds |",
        "| --- | --- | --- | --- | --- | ---: |",
    ]
    for v in verdicts:
        why = v.why.split(" - ")[0].replace("|", "\\|")[:140]
        row = (v.mutant.area, v.mutant.name, v.mutant.file, v.outcome.lower(), why, f"{v.seconds:.0f}")
        lines.append(f"| {' | '.join(row)} |")
    path.write_text("\n".join(lines) + "\n")


def show(verdicts: Sequence[Verdict], console: Console) -> None:
    table = Table("area", "caught", "missed", "stale", "slowest", title="Mutants")
    for area in dict.fromkeys(v.mutant.area for v in verdicts):
        own = [v for v in verdicts if v.mutant.area == area]
        counts = Counter(v.outcome for v in own)
        slowest = max(own, key=lambda v: v.seconds)
        row = [str(counts[outcome]) for outcome in (CAUGHT, MISSED, STALE)]
        table.add_row(area, *row, f"{slowest.seconds:.0f} s  {slowest.mutant.name}")
    console.print(table)
    for v in verdicts:
        if v.outcome != CAUGHT:
            console.print(
                f"[bold]{v.outcome}[/bold] {v.mutant.name}: {v.why}\n  {v.mutant.file}: {v.mutant.fault}",
                highlight=False,
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only mutants whose name or file has this in it")
    parser.add_argument("--area", default="", help="only those of one list, say torch for tests/mutants/torch.toml")
    parser.add_argument(
        "--all", action="store_true", help="against the whole fast suite, not the tests named beside each"
    )
    parser.add_argument("--check", action="store_true", help="run no test: only see whether each still applies")
    parser.add_argument("--no-control", action="store_true", help="do not run the named tests without any change first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many side by side (default: cores)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to change copies of (default: this one)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown, too")
    options = parser.parse_args(arguments)

    mutants = [
        m for m in read(HERE)
        if (options.only in m.name or options.only in m.file) and options.area in ("", m.area)
    ]  # fmt: skip
    if not mutants:
        raise SystemExit(f"no mutant has {options.only or options.area!r} in its name")
    stale = [Verdict(m, STALE, why) for m in mutants if (why := m.problem(options.root))]
    if stale or options.check:
        show(stale, Console())
        print(f"{len(mutants) - len(stale)} of {len(mutants)} mutants apply")
        if options.check:
            return bool(stale)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        template = Path(folder) / "template.socket"
        start_template(template, IMPORTS, environment(ROOT), Path(folder), options=())
        connection = connect(template)  # it ends when nobody is connected to it
        copies = [Copy(Path(folder) / str(i), template) for i in range(max(1, options.jobs))]
        for copy in copies:
            copy_checkout(options.root, copy.folder)
        applicable = [m for m in mutants if m not in {v.mutant for v in stale}]
        verdicts = [*stale] if options.no_control else stale + unchanged_tests_pass(copies, applicable)
        verdicts += judge_all(applicable, copies, options.all)
        connection.close()
    if options.write:
        write_table(verdicts, options.write)
    show(verdicts, Console())
    return any(verdict.outcome != CAUGHT for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
