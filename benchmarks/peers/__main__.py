"""Other libraries for reversible networks and this one, at the same work: gradients, state, memory and time.

    pip install --no-deps --target build/peers/revlib-1.0.1 revlib==1.0.1    and so on: what is missing is printed
    python -m benchmarks.peers --peers build/peers/* [--write]               a few minutes on two cores
    python -m benchmarks.peers --quick --peers build/peers/*                 in seconds, on toy sizes: does it run?

Every row is a network of two streams over the very same blocks, held against the plain network of its coupling, which
stores everything:

- output, gradients, input's gradient: relative error against the plain network, in float64. Gradients: those of all
  parameters, in one vector.
- autograd.grad: whether it gives the gradients that ``backward()`` should.
- BatchNorm: how often a layer has counted a batch after one training step.
- dropout: whether a block that runs again draws the mask that it drew first.
- peak: the bytes of all tensors that one step makes beyond parameters, gradients and input, in S, the bytes of one
  stream; slope: what one more block adds to it. Counted, not sampled.
- time: of a step, over the plain network's, within each round; every row takes one turn a round, in a new order.

A release that is not found, in the folders of ``--peers`` or where Python looks, is left out, and the command to
install it is printed. Settings are the defaults; where an option promises to replay random numbers, it has a row of
its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor, nn

from benchmarks.libraries import ADDITIVE, AFFINE, BETA, LIBRARIES, MOMENTUM, Kind, Library
from benchmarks.peers.checks import RIGHT, Checks, check
from benchmarks.shared import interleaved, markdown, table
from benchmarks.torch_engine import measure, pictures
from benchmarks.torch_engine.measure import Cpu, Step
from benchmarks.torch_engine.report import Found, Row
from benchmarks.torch_engine.ways import Way, by_hand, run_checkpoint, run_plain
from benchmarks.torch_engine.workloads import Blocks, Workload
from revcore import Affine, Coupling, Momentum
from revcore_torch import ReversibleSequential

RESULTS = Path(__file__).parent.parent / "results"
PLAIN, OURS = "plain", "revcore"
KINDS = (ADDITIVE, MOMENTUM, AFFINE)
COUPLINGS: dict[str, Coupling | None] = {ADDITIVE.name: None, MOMENTUM.name: Momentum(BETA), AFFINE.name: Affine()}


# --- who takes part -------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A block whose output is both scale (its logarithm) and shift, as memcnn's AffineAdapterNaive has it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.block(x)
        return f, f


def ours(kind: Kind) -> Callable[[Blocks, int], nn.Module]:
    """Return what makes our network."""

    def build(blocks: Blocks, dim: int) -> nn.Module:
        made = map(Twice, blocks) if kind is AFFINE else blocks
        return ReversibleSequential(*made, split_dim=dim, coupling=COUPLINGS[kind.name])

    return build


def ways(kind: Kind, there: dict[Library, Path]) -> list[Way]:
    """Return all ways for one coupling, the plain network first and ours last."""
    peers: list[Way] = []
    for library, folder in there.items():
        if kind in library.kinds:
            peers.append(Way(str(library), "peer", library.build(kind, folder)))
            if library.replays and kind is ADDITIVE:
                replaying = library.build(kind, folder, replay=True)
                peers.append(Way(f"{library} {library.replays}", "peer", replaying, frontier=True))
    return [
        Way(PLAIN, "stored", by_hand(run_plain, kind=kind)),
        Way("torch.utils.checkpoint", "checkpoint", by_hand(run_checkpoint, kind=kind)),
        *peers,
        Way(OURS, "revcore", ours(kind)),
    ]


def found_among(folders: Iterable[Path]) -> tuple[dict[Library, Path], list[str]]:
    """Return the folder of each release that is there, and the commands that install the others."""
    folders = list(folders)
    there = {library: folder for library in LIBRARIES if (folder := library.find(folders))}
    missing = [
        f"pip install --no-deps --target build/peers/{each.name}-{each.version} {each.name}=={each.version}"
        for each in LIBRARIES
        if each not in there
    ]
    return there, missing


# --- what is measured -----------------------------------------------------------------------------------------------


def work(quick: bool = False) -> Workload:
    """Return blocks that go with every coupling: behind a LayerNorm, ``exp(f)`` stays small however deep the network.

    ``quick`` ones have the same parts and next to no size.
    """
    n = 16 if quick else 512

    def block(_: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n), nn.GELU(), nn.Linear(n, n))

    return Workload("mlp", block, (n, n), 1)


@dataclass
class Compared(Found):
    """All about one coupling, whose name is the workload's."""

    checks: dict[str, Checks]


def compare(
    kind: Kind, some: Sequence[Way], workload: Workload, toy: Workload, depths: Sequence[int], at: int, rounds: int
) -> Compared:
    """Check, weigh and time ``some`` ways, the plain network first among them; all but memory at depth ``at``.

    Raises:
        ValueError: the plain network overflows, so nothing can be held against it.
    """
    where, plain, console = Cpu(), some[0], Console(stderr=True)
    checks: dict[str, Checks] = {}
    for way in track(some, f"{kind.name}: checks", transient=True, console=console):
        checks[way.name] = check(way, plain, toy, at)
        if way is plain and checks[way.name].wrong:
            raise ValueError(f"{kind.name}: the plain network of depth {at} gives {checks[way.name].output}")
    rows: dict[str, Row] = {way.name: Row(way) for way in some}
    weighed: dict[str, dict[int, measure.Bytes]] = {}
    steps: dict[str, Step] = {}
    for depth in track(sorted({*depths, at}), f"{kind.name}: memory", transient=True, console=console):
        blocks, x = workload.blocks(depth), workload.input(2)
        for name, row in rows.items():
            if not row.ok:
                continue
            try:
                step = Step(row.way.build(blocks, workload.dim), x)
                weighed.setdefault(name, {})[depth] = where.memory(step)
            except Exception as error:  # its words are among the checks' or go there
                row.error = f"a step at depth {depth}: {type(error).__name__}: {error}".splitlines()[0]
                checks[name].errors.append(row.error)
                weighed.pop(name, None)
                continue
            if depth == at:
                steps[name], row.bytes = step, weighed[name][depth]
    steps = {name: step for name, step in steps.items() if rows[name].ok}
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True, console=console) as progress:
        task = progress.add_task(f"{kind.name}: time", total=rounds * len(steps))
        timed = interleaved(steps, where, rounds, tick=lambda: progress.advance(task))
    for name, seconds in timed.items():
        rows[name].seconds = seconds
    floor = measure.floor(workload.blocks(2), workload)
    return Compared(dataclasses.replace(workload, name=kind.name), at, rows, weighed, floor, checks)


def slope(one: Found, name: str) -> float:
    """Return by how much the peak grows with a block, in S, between the two deepest networks."""
    by_depth = one.by_depth[name]
    a, b = sorted(by_depth)[-2:]
    return (by_depth[b].peak - by_depth[a].peak) / (b - a) / one.workload.stream_bytes


# --- as text --------------------------------------------------------------------------------------------------------


def rendered(results: Sequence[Compared]) -> str:
    """Return the table, and the words of errors below it."""
    made = table(
        "network", "output", "gradients", "input's gradient", "autograd.grad", "BatchNorm", "dropout", "peak", "slope",
        "time",
    )  # fmt: skip
    raised: dict[str, list[str]] = {}
    for one in results:
        for name, found in one.checks.items():
            label = f"{name}, {one.workload.name}"
            cells = [found.output, found.gradients, found.input, found.autograd_grad, found.norm, found.dropout]
            ratio = one.ratio(name, PLAIN)
            if name in one.by_depth:
                steep = slope(one, name)
                cells += [f"{one.peak(name):.1f} S", f"{steep:.2f} S" if steep else "0", f"{ratio} ×"]
            else:
                cells += ["–"] * 3
            made.add_row(label, *cells)
            for words in found.errors:
                raised.setdefault(words, []).append(label)
    notes = "\n".join(f"- {'; '.join(labels)}: {words}" for words, labels in raised.items())
    return "\n\n".join([markdown(made), *([f"What was raised:\n\n{notes}"] if notes else [])])


def picture(path: Path, results: Sequence[Compared]) -> None:
    """Draw peak memory against depth, a panel a coupling; an option of a library has no line, as it changes nothing."""
    wrong = {(one.workload.name, name): checks.wrong for one in results for name, checks in one.checks.items()}
    found = {
        one.workload.name: dataclasses.replace(
            one, by_depth={name: each for name, each in one.by_depth.items() if not one.rows[name].way.frontier}
        )
        for one in results
    }
    title = "Peak memory of a training step against depth (dashed: wrong gradients)"
    pictures.memory(path, found, title, OURS, lambda one, name: wrong[one.workload.name, name])


def header(
    options: argparse.Namespace,
    arguments: Sequence[str],
    workload: Workload,
    there: Iterable[Library],
    missing: list[str],
) -> str:
    """Return what was run, where, what was done to make it run, and what is left out."""
    depths, at = options.depths, options.depth
    left_out = "\n".join(["Left out, since they were not found:\n", *(f"    {each}" for each in missing)])
    return "\n\n".join(
        [
            "# Libraries for reversible networks, at the same work",
            f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}.",
            f"    {' '.join(['python -m benchmarks.peers', *arguments])}",
            "Blocks: LayerNorm → Linear → GELU → Linear. Output, gradients, autograd.grad: float64, toy sizes, depth "
            f"{at}, right below {RIGHT:.0e}. BatchNorm, dropout: one step at depth 4. Peak, slope, time: float32, "
            f"streams of {tuple(workload.shape)}, S = {workload.stream_bytes / 2**20:.3g} MiB; peak and time at depth "
            f"{at}, slope from depth {depths[-2]} to {depths[-1]}; time: median of {options.rounds} interleaved "
            "rounds, over the plain network of the same coupling.",
            *(f"{each}: {each.note}." for each in there if each.note),
            *([left_out] if missing else []),
        ]
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="+", type=Path, default=[], metavar="DIR", help="pip's --target folders")
    parser.add_argument("--depths", nargs="+", type=int, help="blocks, for memory (4 8 16 32)")
    parser.add_argument("--depth", type=int, help="blocks, for everything else (16)")
    parser.add_argument("--rounds", type=int, help="turns of each way (9)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, depths 4 and 8, 2 rounds")
    parser.add_argument("--write", action="store_true", help="write a dated file and its picture")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where to (benchmarks/results)")
    options = parser.parse_args(arguments)
    options.depths = sorted({*(options.depths or ([4, 8] if options.quick else [4, 8, 16, 32]))})
    options.depth = options.depth or (8 if options.quick else 16)
    options.rounds = options.rounds or (2 if options.quick else 9)
    if any(depth < 2 or depth % 2 for depth in (*options.depths, options.depth)) or len(options.depths) < 2:
        parser.error("blocks come in pairs in some libraries, and a slope takes two depths: write --depths 4 8 …, even")
    for folder in options.peers:
        if not folder.is_dir():
            parser.error(f"--peers {folder}: there is no such folder")
    return options


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    options = parse(arguments)
    there, missing = found_among(options.peers)
    workload, toy = work(options.quick), work(quick=True)
    results: list[Compared] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other libraries' deprecations
        for kind in KINDS:
            some = ways(kind, there)
            results.append(compare(kind, some, workload, toy, options.depths, options.depth, options.rounds))
    written = "\n\n".join([header(options, arguments, workload, there, missing), rendered(results)]) + "\n"
    print(written)
    if options.write:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{datetime.date.today()}-peers.md"
        picture(path.with_suffix(".png"), results)
        path.write_text(f"{written}\n![Peak memory against depth, by library]({path.with_suffix('.png').name})\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
