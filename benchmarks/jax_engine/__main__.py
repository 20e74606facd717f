"""Memory, FLOPs, compile time and step time of a training step in JAX, by what the backward pass keeps.

    python -m benchmarks.jax_engine                                  everything, an hour on two cores
    python -m benchmarks.jax_engine --quick                          the same in seconds, on toy sizes: does it run?
    python -m benchmarks.jax_engine --workload mlp --rounds 25
    python -m benchmarks.jax_engine --device gpu --write             adds peak memory and tokens/s

Every way of getting activations back runs in one process on the very same weights. Before anything is timed, each must
give the gradients of the plain network (float64, toy sizes, the depth at hand); one that does not is shown with its
error. Then, in each round, every way takes one turn, in a new order; a ratio to checkpointing in a scan is taken within
the round, and the median and quartiles over the rounds are shown. Memory is in units of S, the bytes of one stream:
temp is what the compiled step takes beyond arguments and results, residuals what waits for the backward pass beyond
parameters. FLOPs are in units of F, the products of matrices in one forward pass: counted in the program, each round of
a scan; and as XLA's cost_analysis has them, which takes in the rest too, but a scan's body once. Depth is in pairs of
blocks; the deepest are for scans alone.

Close other programs first: a shared core shows in the quartiles.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read as JAX starts: the peak is another process's

import flax
import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.jax_engine import measure, report
from benchmarks.jax_engine.measure import Step, Wall
from benchmarks.jax_engine.report import Found, Row
from benchmarks.jax_engine.ways import SCAN_CHECKPOINT, Way, ways
from benchmarks.jax_engine.workloads import Workload, workloads
from benchmarks.shared import interleaved

RESULTS = Path(__file__).parent.parent / "results"


def chosen(options: argparse.Namespace) -> list[Way]:
    """Return the ways to run: those named, and the one that all times are held against."""
    every = ways(options.device, options.anchor_every)
    return [way for way in every if options.only in way.name or way.name == SCAN_CHECKPOINT]


def compare(workload: Workload, toy: Workload, options: argparse.Namespace, tick: Callable[[], None]) -> Found:
    """Check, compile, weigh and time all ways of one workload."""
    depth, rows, steps = options.time_depth, {}, {}
    for way in chosen(options):
        row = rows[way.name] = Row(way, measure.check(way, toy, depth))
        for each in sorted({depth, *options.depths, *(options.scan_depths if way.scanned else ())}):
            if row.error is None:
                row.costs[each] = measure.costs(way, workload, each, tries=1 if options.quick else 5)
            tick()
        if row.error is None:
            steps[way.name] = Step(row.costs[depth].step, measure.arguments(way, workload, depth))
            if options.device == "gpu":
                row.peak = peak_elsewhere(way, workload, options)
        gc.collect()
    for name, seconds in interleaved(steps, Wall(), options.rounds, tick=tick).items():
        rows[name].seconds = seconds
    return Found(workload, depth, rows, measure.forward_flops(workload, depth))


def peak_elsewhere(way: Way, workload: Workload, options: argparse.Namespace) -> int | None:
    """Return the peak of one step in a process of its own, for the counter is never set back."""
    words = ["--device", "gpu", "--workload", workload.name, "--time-depth", str(options.time_depth)]
    words += ["--anchor-every", str(options.anchor_every), "--peak-of", way.name, *(["--quick"] * options.quick)]
    command = [sys.executable, "-m", "benchmarks.jax_engine", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    last = done.stdout.split()[-1]
    return None if last == "None" else int(last)


def run(options: argparse.Namespace) -> dict[str, Found]:
    """Measure everything that was asked for."""
    found = {}
    full, toys = workloads(options.quick), workloads(quick=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name in options.workload:
            depths = {options.time_depth, *options.depths}
            total = sum(
                len({*depths, *options.scan_depths} if way.scanned else depths) + options.rounds
                for way in chosen(options)
            )
            task = progress.add_task(name, total=total)

            def tick(task: object = task) -> None:
                progress.advance(task)  # pyright: ignore[reportArgumentType]

            found[name] = compare(full[name], toys[name], options, tick)
            progress.update(task, completed=total)
    return found


def header(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Return what was run, where, and with which versions."""
    return (
        "# A training step in JAX: memory, FLOPs, compile and step time by what the backward pass keeps\n\n"
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.device} "
        f"({jax.devices(options.device)[0].device_kind}), Python {platform.python_version()}, jax {jax.__version__}, "
        f"flax {flax.__version__}; float32, medians of {options.rounds} interleaved rounds, ratios to "
        f"{SCAN_CHECKPOINT}.\n\n"
        f"    {' '.join(['python -m benchmarks.jax_engine', *arguments])}\n\n"
        "Memory in S, the bytes of one stream: temp is what the compiled step takes beyond arguments and results, "
        "residuals what waits for the backward pass beyond parameters. Products in F, those of one forward pass, "
        "counted in the program; cost_analysis, in the same unit, counts all operations, but the body of a scan once. "
        "Depth in pairs of blocks."
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jax_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(workloads())
    parser.add_argument("--workload", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--depths", nargs="+", type=int, help="pairs, for memory by depth (4 8 16 32 64)")
    parser.add_argument("--scan-depths", nargs="+", type=int, help="more of them, for scans alone (256)")
    parser.add_argument("--time-depth", type=int, help="pairs, for everything else (32)")
    parser.add_argument("--anchor-every", type=int, help="blocks between anchors, where there are any (16)")
    parser.add_argument("--rounds", type=int, help="turns of each way (11)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help=f"ways whose name has TEXT in it, and {SCAN_CHECKPOINT}"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="toy sizes, depths 2, 4 and 8, 2 rounds")
    parser.add_argument("--write", action="store_true", help="write a dated file and its picture")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where to (benchmarks/results)")
    parser.add_argument("--peak-of", metavar="NAME", help=argparse.SUPPRESS)  # what peak_elsewhere calls
    options = parser.parse_args(arguments)
    quick = options.quick
    options.depths = options.depths or ([2, 4] if quick else [4, 8, 16, 32, 64])
    options.scan_depths = options.scan_depths or ([8] if quick else [256])
    options.time_depth = options.time_depth or (4 if quick else 32)
    options.anchor_every = options.anchor_every or (4 if quick else 16)
    options.rounds = options.rounds or (2 if quick else 11)
    if min(*options.depths, *options.scan_depths, options.time_depth, options.anchor_every) < 1:
        parser.error("depths and --anchor-every must be at least 1")
    try:
        jax.devices(options.device)
    except RuntimeError as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    return options


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    options = parse(arguments)
    with jax.default_device(jax.devices(options.device)[0]):
        if options.peak_of:
            way = next(way for way in chosen(options) if way.name == options.peak_of)
            print(measure.peak(way, workloads(options.quick)[options.workload[0]], options.time_depth))
            return
        found = run(options)
    written = report.text(found, header(options, arguments), options.device == "gpu")
    print(written)
    if not options.write:
        return
    stem = f"{datetime.date.today()}-jax-engine" + ("-gpu" if options.device == "gpu" else "")
    options.out.mkdir(parents=True, exist_ok=True)
    report.picture(options.out / f"{stem}.png", found)
    path = options.out / f"{stem}.md"
    path.write_text(f"{written}\n![Memory against depth, and time]({stem}.png)\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
