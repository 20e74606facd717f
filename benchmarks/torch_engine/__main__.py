"""Time and memory of a training step: revcore against checkpointing and four other libraries, on one machine.

    python -m benchmarks.torch_engine                                  everything, some ten minutes on two cores
    python -m benchmarks.torch_engine --quick                          the same in seconds, on toy sizes: does it run?
    python -m benchmarks.torch_engine --workload transformer --rounds 25
    python -m benchmarks.torch_engine --device cuda --write            adds tokens/s and the largest batch that fits

Every way of getting activations back runs in one process on the very same blocks. Before anything is timed, each must
give the gradients of the plain network (float64, toy sizes, the depth at hand); one that does not is shown with its
error. Then, in each round, every way takes one turn, in a new order; a ratio is taken within the round, and the median
and quartiles over the rounds are shown. Memory is what a step takes beyond parameters, gradients and input, in units
of S, the bytes of one stream: held while the output lives, and at its peak.

The other libraries are not needed. Those that are installed take part:

    pip install --no-deps revlib==1.7.2 memcnn==1.5.2 revtorch==0.2.4 reformer-pytorch==1.4.4

(--no-deps, since what they ask for beside torch serves parts that are not used here, and memcnn's torchvision might
bring another torch along.) Close other programs first: a shared core shows in the quartiles. Where one must be shared,
set OMP_WAIT_POLICY=PASSIVE, or threads that wait for each other in busy loops take ten times as long.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.shared import interleaved
from benchmarks.torch_engine import measure, pictures, report
from benchmarks.torch_engine.measure import Device, Step
from benchmarks.torch_engine.report import Found, Row
from benchmarks.torch_engine.ways import PEERS, PLAIN, STORE_ALL, Way, ways
from benchmarks.torch_engine.workloads import Blocks, Workload, workloads

RESULTS = Path(__file__).parent.parent / "results"
FRONTIER = "transformer"  # where all policies are run


def check(way: Way, toy: Workload, depth: int, device: str = "cpu") -> str | None:
    """Return what is wrong with a way's gradients, if anything is."""
    blocks = toy.blocks(depth, device, torch.float64)
    plain = next(w for w in ways(depth) if w.name == PLAIN[way.streams])
    x = toy.input(way.streams, device, torch.float64)
    expected = measure.gradients(Step(plain.build(blocks, toy.dim), x), blocks)
    try:
        got = measure.gradients(Step(way.build(blocks, toy.dim), x), blocks)
    except Exception as error:  # whatever it is belongs in the table
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    wrong = float((got - expected).norm() / expected.norm())
    return None if wrong < 1e-10 else f"wrong gradients: relative error {wrong:.1e}"


def compare(
    workload: Workload, toy: Workload, depth: int, rounds: int, where: Device, tick: Callable[[], None], only: str = ""
) -> dict[str, Row]:
    """Check, count, weigh and time all ways of one workload at one depth."""
    blocks, inputs = workload.blocks(depth, where.name), {n: workload.input(n, where.name) for n in (1, 2)}
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for way in chosen(workload, depth, only):
        row = rows[way.name] = Row(way, check(way, toy, depth, where.name))
        if row.ok:
            step = steps[way.name] = Step(way.build(blocks, workload.dim), inputs[way.streams])
            step()  # a budget is planned on the first call of its kind
            with measure.counted(blocks) as calls:
                step()
            row.calls = sum(calls) / depth
            row.bytes = where.memory(step)
        tick()
    gc.collect()
    for name, seconds in interleaved(steps, where, rounds, tick=tick).items():
        rows[name].seconds = seconds
    if where.name == "cuda" and not workload.trivial:
        for name, step in steps.items():
            throughput(rows[name], step, workload, where)
    return rows


def throughput(row: Row, step: Step, workload: Workload, where: Device) -> None:
    """Fill in tokens a second, at the common batch and at the largest that fits."""
    batch = workload.shape[0]
    row.tokens = f"{batch * workload.tokens_per_row / statistics.median(row.seconds):,.0f}"

    def at(batch: int) -> Step:
        return Step(step.net, workload.input(row.way.streams, where.name, batch=batch))

    def fits(batch: int) -> bool:
        try:
            at(batch)()
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        return True

    most = measure.largest(fits, batch, 2**20)
    if most:
        seconds = where.seconds(at(most), 3)
        row.largest = f"{most}, {most * workload.tokens_per_row / seconds:,.0f}"


def chosen(workload: Workload, depth: int, only: str) -> list[Way]:
    """Return the ways to run: those named, and store-all, which all times are held against."""
    return [
        way
        for way in ways(depth)
        if (workload.name == FRONTIER or not way.frontier) and (only in way.name or way.name == STORE_ALL)
    ]


def by_depth(
    workload: Workload, rows: dict[str, Row], done: int, depths: Sequence[int], where: Device, tick: Callable[[], None]
) -> dict[str, dict[int, measure.Bytes]]:
    """Weigh the ways that are no mere policies at all depths."""
    found = {name: {done: row.bytes} for name, row in rows.items() if row.ok and not row.way.frontier}
    for depth in depths:
        if depth != done:
            blocks: Blocks = workload.blocks(depth, where.name)
            for way in ways(depth):
                if way.name in found:
                    step = Step(way.build(blocks, workload.dim), workload.input(way.streams, where.name))
                    found[way.name][depth] = where.memory(step)
            tick()
    return found


def run(options: argparse.Namespace) -> dict[str, Found]:
    """Measure everything that was asked for."""
    where, found = measure.device(options.device), {}
    full, toys = workloads(options.quick), workloads(quick=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name in options.workload:
            workload, depth = full[name], options.time_depth
            count = len(chosen(workload, depth, options.only))
            depths = [] if workload.trivial else options.depths
            total = count * (1 + options.rounds) + len([d for d in depths if d != depth])
            task = progress.add_task(name, total=total)

            def tick(task: object = task) -> None:
                progress.advance(task)  # pyright: ignore[reportArgumentType]

            rows = compare(workload, toys[name], depth, options.rounds, where, tick, options.only)
            weighed = by_depth(workload, rows, depth, depths, where, tick)
            floor = measure.floor(workload.blocks(2), workload)
            found[name] = Found(workload, depth, rows, weighed, floor)
            progress.update(task, completed=total)
    return found


def header(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """Return what was run, where, and with which versions."""
    versions = [f"torch {torch.__version__}"]
    for peer in PEERS:
        try:
            versions.append(f"{peer.name} {importlib.metadata.version(peer.name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{peer.name} not installed")
    return (
        "# A training step in PyTorch: time and memory by what the backward pass keeps\n\n"
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.device} "
        f"({measure.device(options.device).describe()}), Python {platform.python_version()}, {', '.join(versions)}; "
        f"float32, medians of {options.rounds} interleaved rounds, ratios to {STORE_ALL}.\n\n"
        f"    {' '.join(['python -m benchmarks.torch_engine', *arguments])}\n\n"
        "Memory in S, the bytes of one stream, beyond parameters, gradients and input: held while the output lives, "
        "and at its peak. Block calls: of each block in one step. One stream: another network, `x + f(x)` of the same "
        "blocks."
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torch_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(workloads())
    parser.add_argument("--workload", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--depths", nargs="+", type=int, help="blocks, for memory against depth (4 8 16 32 64)")
    parser.add_argument("--time-depth", type=int, help="blocks, for everything else (32)")
    parser.add_argument("--rounds", type=int, help="turns of each way (11)")
    parser.add_argument("--only", default="", metavar="TEXT", help="ways whose name has TEXT in it, and store-all")
    parser.add_argument("--device", choices=("cpu", "cuda", "gpu"), default="cpu", help="gpu: the same as cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes, depth 4 and 8, 2 rounds")
    parser.add_argument("--write", action="store_true", help="write a dated file and its pictures")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where to (benchmarks/results)")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.depths = options.depths or ([4, 8] if quick else [4, 8, 16, 32, 64])
    options.time_depth = options.time_depth or (8 if quick else 32)
    options.rounds = options.rounds or (2 if quick else 11)
    if any(depth < 2 or depth % 2 for depth in (*options.depths, options.time_depth)):
        parser.error("the other libraries take blocks in pairs: depths must be even, and at least 2")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no GPU here")
    options.device = "cpu" if options.device == "cpu" else "cuda"
    return options


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    options = parse(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other libraries' deprecations
        found = run(options)
    written = report.text(found, header(options, arguments), options.device == "cuda")
    print(written)
    if not options.write:
        return
    stem = f"{datetime.date.today()}-torch-engine" + ("-cuda" if options.device == "cuda" else "")
    options.out.mkdir(parents=True, exist_ok=True)
    shown = []
    if FRONTIER in found:
        pictures.frontier(options.out / f"{stem}-frontier.png", found[FRONTIER])
        shown.append(f"![Time against memory]({stem}-frontier.png)")
    if any(one.by_depth and not one.workload.trivial for one in found.values()):
        pictures.memory(options.out / f"{stem}-memory.png", found)
        shown.append(f"![Memory against depth]({stem}-memory.png)")
    path = options.out / f"{stem}.md"
    path.write_text("\n\n".join([written, *shown]).replace("\n\n\n", "\n\n") + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
