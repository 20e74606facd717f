"""Drift: what revcore.amplification predicts against what is measured, on CPU in torch.

    python -m benchmarks.drift                     all couplings, dtypes and depths, some ten minutes on one core
    python -m benchmarks.drift --depths 8 32       some of it
    python -m benchmarks.drift --write             adds a dated table and picture to benchmarks/results

Blocks are pre-LN MLPs, with outputs of root mean square 1 as the predictor assumes ("unit"), and as torch initialises
them ("fresh", some 0.2). A cell is one coupling, dtype and depth. Measured are the relative errors of the rebuilt
streams, and of each block's gradient against that of the same network with everything stored. A cell is judged by its
worst block, and all blocks of all cells are judged as well. An error of 1 or more, or none at all (an overflow), counts
as 1 on both sides: nothing is left, however large the number. Live figures are the streams' root mean square before
each step, and each block's gain by one random vector through its vjp.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from benchmarks.shared import markdown, table
from revcore import BDIA, Affine, DriftWarning, Momentum, Program, Reverse, StoreAll, amplification, leapfrog, revnet
from revcore.pictures import GREY, STYLE, load_pyplot
from revcore_torch import reversible
from revcore_torch.functional import inverse_report
from revcore_torch.steps import Arguments, make_calls

RESULTS = Path(__file__).parent / "results"
WIDTH, BATCH = 32, 32
DEPTHS = (8, 32, 128, 512)
COUPLINGS: dict[str, Callable[[int], Program]] = {
    "additive": revnet,
    "momentum 0.5": lambda depth: revnet(depth, Momentum(0.5)),
    "momentum 0.9": lambda depth: revnet(depth, Momentum(0.9)),
    "momentum 0.99": lambda depth: revnet(depth, Momentum(0.99)),
    "affine": lambda depth: revnet(depth, Affine()),
    "leapfrog": lambda depth: leapfrog(depth, h=0.25),
    "BDIA": lambda depth: revnet(depth, BDIA(0.5)),
}
MIXED = "float32, bf16 blocks"
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    MIXED: (torch.float32, torch.bfloat16),
}


class Block(nn.Module):
    """A pre-LN MLP; for an affine coupling it also returns a log scale within ±0.1."""

    def __init__(self, affine: bool, fresh: bool) -> None:
        super().__init__()
        self.affine = affine
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH * (1 + affine))
        if not fresh:
            nn.init.normal_(self.up.weight, std=WIDTH**-0.5)
            nn.init.normal_(self.down.weight, std=(0.425 * 2 * WIDTH) ** -0.5)  # 0.425: the mean of gelu(normal)²
            nn.init.zeros_(self.up.bias)
            nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Any:
        out = self.down(nn.functional.gelu(self.up(self.norm(x).to(self.up.weight.dtype))))
        if not self.affine:
            return out
        scale, shift = out.chunk(2, -1)
        return 0.1 * torch.tanh(scale), shift


@dataclass(frozen=True)
class Cell:
    """One network: measured and predicted errors, all at most 1. The largest of rebuilt streams, and by block."""

    coupling: str
    dtype: str
    depth: int
    rebuilt: float
    gradient: tuple[float, ...]
    predicted: dict[str, tuple[float, tuple[float, ...]]]  # "alone" and "live"

    def ratio(self, kind: str) -> float:
        """Return predicted by measured of the worst block; infinite where nothing was lost."""
        return _ratio(max(self.predicted[kind][1]), max(self.gradient))

    def ratios(self, kind: str) -> list[float]:
        """Return the same for each block in which something was lost."""
        pairs = zip(self.predicted[kind][1], self.gradient, strict=True)
        return [_ratio(predicted, measured) for predicted, measured in pairs if measured]


def _ratio(predicted: float, measured: float) -> float:
    return predicted / measured if measured else math.inf


def _capped(error: float) -> float:
    return error if error < 1 else 1.0  # NaN too


def measure(coupling: str, dtype: str, depth: int, fresh: bool = False, seed: int = 0) -> Cell:
    """Build one network and measure it; predict it as well."""
    streams_dtype, blocks_dtype = DTYPES[dtype]
    torch.manual_seed(seed)
    program = COUPLINGS[coupling](depth)
    blocks = [Block(coupling == "affine", fresh).to(blocks_dtype) for _ in range(program.num_blocks)]
    streams, weights = ([torch.randn(BATCH, WIDTH).to(streams_dtype) for _ in range(2)] for _ in range(2))

    def gradients(policy: Any) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)  # what is measured here
            out = reversible(program, blocks, streams, policy=policy)
        torch.stack([(o * w).sum() for o, w in zip(out, weights, strict=True)]).sum().backward()
        found = [torch.cat([p.grad.double().flatten() for p in b.parameters() if p.grad is not None]) for b in blocks]
        for block in blocks:
            block.zero_grad()
        return found

    errors = [
        _capped(float((a - b).norm() / b.norm()))
        for a, b in zip(gradients(Reverse()), gradients(StoreAll()), strict=True)
    ]
    rebuilt = max(map(_capped, inverse_report(program, blocks, streams).drift))
    rms, gain = live(program, blocks, streams)
    predicted = {}
    for kind, figures in (("alone", {}), ("live", {"rms": rms, "gain": gain})):
        report = amplification(program, streams_dtype, block_dtype=blocks_dtype, **figures)
        predicted[kind] = max(map(_capped, report.reconstruction)), tuple(map(_capped, report.gradient))
    return Cell(coupling, dtype, depth, rebuilt, tuple(errors), predicted)


def live(program: Program, blocks: Sequence[Any], streams: Sequence[Tensor]) -> tuple[list[list[float]], list[float]]:
    """Return every stream's root mean square before each step and at the end, and each block's gain."""
    current, arguments = tuple(streams), Arguments((), {}, None)
    rms, gain = [[_rms(s) for s in current]], []
    generator = torch.Generator().manual_seed(0)
    for call in make_calls(program, blocks):
        step: Any = call.step
        seen = [s.detach().requires_grad_(i in step.sources) for i, s in enumerate(current)]
        f, _ = call.evaluate(seen, arguments)
        after = call.merge(seen, f)
        out = f[0] if step.coupling.uses_source else f
        out = after[step.target] if isinstance(out, tuple) else out
        g = torch.randn(out.shape, generator=generator).to(out.dtype)
        pulled = torch.autograd.grad(out, [seen[s] for s in step.sources], g)
        gain.append(math.hypot(*(_rms(p) for p in pulled)) / _rms(g))
        current = tuple(s.detach() for s in after)
        rms.append([_rms(s) for s in current])
    return rms, gain


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def share(ratios: Iterable[float], factor: float) -> float:
    """Return which part of ``ratios`` lies within a factor of 1.

    >>> share([1.0, 0.2, 5.0, 2.0], 3)
    0.5
    """
    ratios = list(ratios)
    return sum(1 / factor <= r <= factor for r in ratios) / len(ratios)


@dataclass(frozen=True)
class Summary:
    """How well predictions hold: shares of cells, and of blocks, within a factor; and how low the lowest is."""

    within_3: float
    within_10: float
    blocks_within_3: float
    blocks_within_10: float
    lowest: float

    @classmethod
    def of(cls, cells: Sequence[Cell], kind: str) -> Summary:
        """Summarise the cells of one dtype throughout."""
        worst = [cell.ratio(kind) for cell in cells]
        blocks = [ratio for cell in cells for ratio in cell.ratios(kind)]
        return cls(share(worst, 3), share(worst, 10), share(blocks, 3), share(blocks, 10), min(worst))


def upper(cells: Sequence[Cell], kind: str) -> float:
    """Return the share of cells of which no block is worse than the worst that was predicted."""
    return sum(cell.ratio(kind) >= 1 for cell in cells) / len(cells)


def claims(cells: Sequence[Cell]) -> list[tuple[str, float, float]]:
    """Return what is promised of "unit" blocks: words, the share or ratio, and the least that it may be."""
    if not cells:
        return []
    uniform, mixed = ([c for c in cells if (c.dtype == MIXED) == is_mixed] for is_mixed in (False, True))
    alone, live = (Summary.of(uniform, kind) for kind in ("alone", "live"))
    return [
        ("program alone: cells within 3 ×", alone.within_3, 0.86),
        ("program alone: cells within 10 ×", alone.within_10, 0.97),
        ("live figures: cells within 3 ×", live.within_3, 0.91),
        ("live figures: cells within 10 ×", live.within_10, 1.0),
        ("lowest predicted by measured", min(alone.lowest, live.lowest), 0.1),
        (f"{MIXED}: cells at or below what is predicted", upper(mixed, "alone"), 0.9),
    ]


def report(found: dict[str, list[Cell]]) -> str:
    """Return shares and cells as Markdown."""
    shares = table("blocks, figures", "cells within 3 ×", "10 ×", "blocks within 3 ×", "10 ×", "lowest cell", MIXED)
    for blocks, cells in found.items():
        uniform, mixed = ([c for c in cells if (c.dtype == MIXED) == is_mixed] for is_mixed in (False, True))
        for kind in ("alone", "live"):
            row = ["", "", "", "", ""]
            if uniform:
                s = Summary.of(uniform, kind)
                figures = s.within_3, s.within_10, s.blocks_within_3, s.blocks_within_10
                row = [*(f"{100 * f:.0f} %" for f in figures), f"{s.lowest:.2f} ×"]
            above = f"above in {100 * upper(mixed, kind):.0f} %" if mixed else ""
            shares.add_row(f"{blocks}, {'program alone' if kind == 'alone' else 'live'}", *row, above)
    promised = table("promised, unit blocks", "found", "at least")
    for words, value, least in claims(found.get("unit", [])):
        promised.add_row(words, f"{value:.2f}", f"{least:.2f}{'' if value >= least else ' **no**'}")
    parts = [markdown(promised), markdown(shares)]
    for blocks, cells in found.items():
        depths = sorted({cell.depth for cell in cells})
        made = table(f"{blocks} blocks", "dtype", *(f"depth {d}" for d in depths))
        for coupling, dtype in product(COUPLINGS, DTYPES):
            row = {c.depth: c for c in cells if (c.coupling, c.dtype) == (coupling, dtype)}
            made.add_row(coupling, dtype, *(_shown(row[d]) if d in row else "" for d in depths))
        parts += [
            f"Largest gradient error of a block: measured (predicted from the program alone), {blocks} blocks.",
            markdown(made),
        ]
    return "\n\n".join(parts)


def _shown(cell: Cell) -> str:
    measured, predicted = (
        f"{e:.1e}" if e < 1 else "≥ 1" for e in (max(cell.gradient), max(cell.predicted["alone"][1]))
    )
    return f"{measured} ({predicted})"


def picture(path: Path, cells: Sequence[Cell]) -> None:
    """Draw predicted against measured, one point a cell."""
    pyplot = load_pyplot()
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
        for axis, kind, title in zip(
            axes, ("alone", "live"), ("from the program alone", "with live figures"), strict=True
        ):
            for coupling in COUPLINGS:
                points = [c for c in cells if c.coupling == coupling and max(c.gradient) > 0]
                axis.scatter(
                    [max(c.gradient) for c in points],
                    [max(c.predicted[kind][1]) for c in points],
                    s=[14 + 7 * math.log2(c.depth) for c in points],
                    label=coupling,
                    alpha=0.7,
                )
            line = [1e-17, 2.0]
            axis.plot(line, line, color=GREY, lw=1)
            for factor in (1 / 3, 3):
                axis.plot(line, [factor * v for v in line], color=GREY, lw=0.7, ls=":")
            axis.set(xscale="log", yscale="log", title=title, xlabel="measured gradient error, worst block")
        axes[0].set_ylabel("predicted")
        axes[0].legend(fontsize=9)
        figure.savefig(path)
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print what came out; 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--blocks", choices=("unit", "fresh", "both"), default="both")
    parser.add_argument("--write", action="store_true", help="write a dated file and picture to benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kinds = ("unit", "fresh") if options.blocks == "both" else (options.blocks,)
    found: dict[str, list[Cell]] = {kind: [] for kind in kinds}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        grid = [(*cell, depth) for depth in options.depths for cell in product(kinds, COUPLINGS, DTYPES)]
        task = progress.add_task("", total=sum(depth for *_, depth in grid))
        for kind, coupling, dtype, depth in grid:
            progress.update(task, description=f"{coupling}, {dtype}, {depth}")
            found[kind].append(measure(coupling, dtype, depth, kind == "fresh"))
            progress.advance(task, depth)
    text = (
        f"Drift: {BATCH} × {WIDTH} a stream, torch {torch.__version__} on {platform.machine()}, one thread.\n"
        f"python -m benchmarks.drift\n\n{report(found)}\n"
    )
    Console(width=200).print(text, markup=False, highlight=False)
    if options.write:
        path = RESULTS / f"{datetime.date.today()}-drift.md"
        path.write_text(text)
        picture(path.with_suffix(".png"), found[kinds[0]])
        print(f"written: {path}, {path.with_suffix('.png')}")
    return int(any(value < least for _, value, least in claims(found.get("unit", []))))


if __name__ == "__main__":
    raise SystemExit(main())
