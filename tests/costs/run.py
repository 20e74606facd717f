"""Count what the tests take, by folder: tests, CPU seconds, processes, compilations; and the lines that they reach.

    make costs                                  # the fast tests, and how much of the three packages they reach
    make costs ARGS="--write costs.md"          # the tables as Markdown, too
    make costs ARGS="--no-coverage -- -k zero"  # quicker, and of some tests; what follows -- goes to pytest

Seconds are of all processes of a test, its ranks too; coverage slows them down. Lines that only a process killed on
purpose reached are not seen. coverage.py measures branches in pytest's workers, in ranks and in whatever they start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGES = ("revcore", "revcore_torch", "revcore_jax")
COUNTS = ("jax_compilations", "jax_traces", "dynamo_frames")


@dataclass
class Cost:
    """What the tests of a folder took."""

    tests: int = 0
    seconds: float = 0.0
    processes: int = 0
    jax_compilations: int = 0
    jax_traces: int = 0
    dynamo_frames: int = 0


def folder_of(nodeid: str) -> str:
    """Return the folder of a test; doctests stand under their package.

    >>> [folder_of(test) for test in ("tests/jax/test_costs.py::test_a[b/c]", "revcore/step.py::revcore.step", "")]
    ['tests/jax', 'revcore', 'start and collection']
    """
    path = nodeid.partition("::")[0]
    return (
        "/".join(path.split("/")[:2]) if path.startswith("tests/") else path.partition("/")[0] or "start and collection"
    )


def read(folder: Path) -> dict[str, Cost]:
    """Sum up what the processes of a run wrote (``everywhere/sitecustomize.py``, ``plugin.py``)."""
    costs: defaultdict[str, Cost] = defaultdict(Cost)
    for path in folder.glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        started = next((line["test"] for line in reversed(lines) if line["kind"] in ("start", "exit")), "")
        for line in lines:
            if line["kind"] == "test":
                cost = costs[folder_of(line["test"])]
                cost.tests += 1
                cost.seconds += line["cpu"] + line["children"]
                for name in COUNTS:
                    setattr(cost, name, getattr(cost, name) + line[name])
            elif line["kind"] == "forked":
                costs[folder_of(line["test"])].seconds += line["cpu"]
        if started:  # by a test: its seconds are in that test's, if the test waited for it
            cost = costs[folder_of(started)]
            cost.processes += 1
            for name in COUNTS:
                setattr(
                    cost, name, getattr(cost, name) + next((e[name] for e in reversed(lines) if e["kind"] == "exit"), 0)
                )
    return dict(sorted(costs.items()))


def table(costs: dict[str, Cost]) -> str:
    total = Cost(*(sum(getattr(cost, name) for cost in costs.values()) for name in vars(Cost())))
    rows: list[tuple[str, ...]] = [
        ("folder", "tests", "CPU seconds", "processes", "JAX compilations", "JAX traces", "dynamo frames")
    ]
    for name, c in [*costs.items(), ("all", total)]:
        numbers = (c.tests, round(c.seconds), c.processes, c.jax_compilations, c.jax_traces, c.dynamo_frames)
        rows.append((name, *(f"{n:,}" for n in numbers)))
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table that lines up as text, too: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]]) + "\n"


def coverage_settings(folder: Path) -> str:
    return f"""[run]
branch = true
parallel = true
patch = subprocess,fork,_exit
sigterm = true
source_pkgs = {",".join(PACKAGES)}
data_file = {folder}/.coverage
disable_warnings = module-not-imported,no-data-collected
"""


def coverage_table(folder: Path) -> tuple[str, dict[str, list[int]]]:
    """Return lines and branches reached in each package, and the lines of each file that were not."""
    run = [sys.executable, "-m", "coverage"]
    settings = f"--rcfile={folder / 'coveragerc'}"
    subprocess.run([*run, "combine", "-q", settings], cwd=folder, check=True)
    report = folder / "coverage.json"
    subprocess.run([*run, "json", "-q", settings, "-o", str(report)], cwd=folder, check=True)
    files = json.loads(report.read_text())["files"]
    by_package: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    missing: dict[str, list[int]] = {}
    for name, file in files.items():
        package = next((p for p in PACKAGES if f"/{p}/" in f"/{name}"), "")
        summary = file["summary"]
        for key in (package, "all"):
            of = by_package[key]
            of[0] += summary["covered_lines"]
            of[1] += summary["num_statements"]
            of[2] += summary["covered_branches"]
            of[3] += summary["num_branches"]
        missing[name[name.index(f"{package}/") :]] = file["missing_lines"]
    rows = [("package", "lines", "reached", "branches", "reached")]
    for package, (lines, of_lines, branches, of_branches) in sorted(by_package.items()):
        rows.append(
            (package, f"{of_lines:,}", f"{lines / of_lines:.2%}", f"{of_branches:,}", f"{branches / of_branches:.2%}")
        )
    return markdown(rows), {name: lines for name, lines in sorted(missing.items()) if lines}


def main(arguments: Iterable[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    for_pytest = given[given.index("--") + 1 :] if "--" in given else []
    parser = argparse.ArgumentParser(
        prog="make costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-coverage", action="store_true", help="do not measure which lines are reached")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables as Markdown, too")
    parser.add_argument("--missing", type=Path, metavar="FILE", help="write the lines that no test reached, as JSON")
    options = parser.parse_args(given[: given.index("--")] if "--" in given else given)

    with tempfile.TemporaryDirectory(prefix="costs-") as name:
        folder = Path(name)
        (folder / "coveragerc").write_text(coverage_settings(folder))
        measured = ["-m", "pytest", "-p", "tests.costs.plugin", "-n", "2", "--dist", "loadfile", "-q", *for_pytest]
        if not options.no_coverage:
            measured = ["-m", "coverage", "run", f"--rcfile={folder / 'coveragerc'}", *measured]
        paths = [str(HERE / "everywhere"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "REVCORE_COSTS": str(folder),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        code = subprocess.run([sys.executable, *measured], cwd=ROOT, env=environment, check=False).returncode
        text = table(read(folder))
        if not options.no_coverage:
            reached, missing = coverage_table(folder)
            text += f"\n{reached}"
            if options.missing:
                options.missing.write_text(json.dumps(missing, indent=1) + "\n")
    print(text)
    if options.write:
        options.write.write_text(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
