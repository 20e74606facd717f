"""What was found, as tables and as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.jax_engine.measure import Costs
from benchmarks.jax_engine.ways import CHAIN, CHAIN_MEMORY_FIRST, REPEAT, SCAN_CHECKPOINT, Family, Way
from benchmarks.jax_engine.workloads import Workload
from benchmarks.shared import Claim, Ratio, apart, markdown, table, verdict
from revcore.pictures import GREY, STYLE, load_pyplot

BOUNDS = {"mlp": {REPEAT: 8.0, CHAIN: 6.0, CHAIN_MEMORY_FIRST: 6.0}}  # of temp in S, set before it was measured
NOISE = 0.05  # of S: what small arrays add to whole streams
COLORS: dict[Family, str] = {"stored": "#555555", "checkpoint": "#d95f02", "revcore": "#1b9e77"}


@dataclass
class Row:
    """One way on one workload; with an error, nothing else is known."""

    way: Way
    error: str | None = None
    costs: dict[int, Costs] = field(default_factory=dict)  # by depth
    seconds: list[float] = field(default_factory=list)  # at the depth that is timed
    peak: int | None = None


@dataclass
class Found:
    """All about one workload; ``forward`` is F, the products of one forward pass, at ``depth``."""

    workload: Workload
    depth: int
    rows: dict[str, Row]
    forward: int

    def ratio(self, name: str) -> Ratio | None:
        """Time of one way over that of :data:`SCAN_CHECKPOINT`, if both were timed."""
        row, base = self.rows.get(name), self.rows.get(SCAN_CHECKPOINT)
        return Ratio.of(row.seconds, base.seconds) if row and base and row.seconds and base.seconds else None

    def temp(self, name: str, depth: int) -> float:
        """Temporary memory in S."""
        return self.rows[name].costs[depth].temp / self.workload.stream_bytes


def claims(found: Mapping[str, Found]) -> list[Claim]:
    """Return what ours are held to, as far as it was measured."""
    made: list[Claim] = []
    for name, one in found.items():
        for ours in (REPEAT, CHAIN, CHAIN_MEMORY_FIRST):
            row = one.rows.get(ours)
            if row is None or row.error or not row.costs:
                continue
            S, temps = one.workload.stream_bytes, [one.temp(ours, depth) for depth in row.costs]
            about = f"{name}, `{ours}`"
            made.append(Claim(f"{about}: how much temp differs between depths, in S", max(temps) - min(temps), NOISE))
            if ours in BOUNDS.get(name, {}):
                made.append(Claim(f"{about}: temp at its most, in S", max(temps), BOUNDS[name][ours] + NOISE))
            kept = max(each.residuals for each in row.costs.values())
            made.append(Claim(f"{about}: residuals, in S", kept / S, 2 + NOISE))
            made.append(Claim(f"{about}: products, in F", row.costs[one.depth].products / one.forward, 4.0))
            if ours == REPEAT:
                ratio, depths = one.ratio(ours), sorted(row.costs)
                if ratio:
                    made.append(Claim(f"{about}: time against `{SCAN_CHECKPOINT}`", ratio.median, 1.0))
                first = min((d for d in depths if d >= 8), default=depths[0])
                times = [row.costs[d].trace + row.costs[d].compile for d in (first, depths[-1])]
                text = f"{about}: seconds to compile depth {depths[-1]}, over depth {first}"
                made.append(Claim(text, times[1] / times[0], 1.2))
    return made


# --- as text ----------------------------------------------------------------------------------------------------------


def text(found: Mapping[str, Found], header: str, gpu: bool = False) -> str:
    """Return everything in Markdown."""
    parts = [header]
    for one in found.values():
        S = f"S = {one.workload.stream_bytes / 2**20:.3g} MiB, one stream of {one.workload.shape}."
        parts += [f"## {one.workload.name}, {one.depth} pairs", S, _rows(one, gpu)]
        failed = [f"- {name} failed: {row.error}" for name, row in one.rows.items() if row.error]
        parts += ["\n".join(failed)] if failed else []
        parts += ["Temp (residuals), in S, by pairs:", _by_depth(one, _both)]
        parts += [
            "Seconds to trace and to compile, by pairs:",
            _by_depth(one, _seconds),
        ]
    held = claims(found)
    if held:
        parts += ["## Verdict", verdict("what ours are held to", held)]
    return "\n\n".join(parts) + "\n"


def _both(costs: Costs, S: int) -> str:
    return f"{costs.temp / S:.1f} ({costs.residuals / S:.1f})"


def _seconds(costs: Costs, S: int) -> str:
    return f"{costs.trace:.1f} + {costs.compile:.1f}"


def _rows(one: Found, gpu: bool) -> str:
    S = one.workload.stream_bytes
    more = ["peak", "tokens/s"] if gpu else []
    made = table("way", "time", "quartiles", "ms", "temp", "residuals", "products", "cost_analysis", "compile", *more)
    for name, row in one.rows.items():
        ratio = one.ratio(name)
        if row.error or ratio is None:
            made.add_row(name, "failed" if row.error else "")
            continue
        costs, seconds = row.costs[one.depth], statistics.median(row.seconds)
        cells = [f"{ratio.median:.2f} ×", f"{ratio.low:.2f} to {ratio.high:.2f}", f"{1e3 * seconds:.3g}"]
        cells += [f"{costs.temp / S:.1f} S", f"{costs.residuals / S:.1f} S"]
        cells += [f"{costs.products / one.forward:.2f} F", f"{costs.reported / one.forward:.2f} F"]
        cells += [f"{costs.trace + costs.compile:.1f} s"]
        if gpu:
            cells += [f"{row.peak / S:.1f} S" if row.peak else "?", f"{one.workload.tokens / seconds:,.0f}"]
        made.add_row(name, *cells)
    return markdown(made)


def _by_depth(one: Found, cell: Callable[[Costs, int], str]) -> str:
    depths = sorted({depth for row in one.rows.values() for depth in row.costs})
    made = table("way", *map(str, depths))
    for name, row in one.rows.items():
        if row.costs:
            made.add_row(
                name, *(cell(row.costs[d], one.workload.stream_bytes) if d in row.costs else "" for d in depths)
            )
    return markdown(made)


# --- as a picture -----------------------------------------------------------------------------------------------------


def picture(path: Path, found: Mapping[str, Found]) -> None:
    """Draw temporary memory against depth, and time, a row of two panels a workload."""
    pyplot = load_pyplot()
    with pyplot.rc_context({**STYLE, "font.size": 9}):
        figure, axes = pyplot.subplots(len(found), 2, figsize=(13, 4.6 * len(found)), squeeze=False)
        for (left, right), one in zip(axes, found.values(), strict=True):
            rows = {name: row for name, row in one.rows.items() if not row.error}
            _memory(left, one, rows)
            _time(right, one, rows)
        figure.tight_layout(w_pad=3)
        figure.savefig(path)
        pyplot.close(figure)


def _memory(axis: Any, one: Found, rows: dict[str, Row]) -> None:
    ends = {}
    for name, row in rows.items():
        depths = sorted(row.costs)
        temps = [one.temp(name, depth) for depth in depths]
        ours = row.way.family == "revcore"
        axis.plot(
            depths, temps, "-" if row.way.scanned else "--", color=COLORS[row.way.family], lw=2 if ours else 1.2,
            marker="o", ms=3,
        )  # fmt: skip
        ends[name] = math.log2(temps[-1])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    low, high = (math.log2(limit) for limit in axis.get_ylim())
    for name, height in zip(ends, apart(list(ends.values()), 0.055 * (high - low)), strict=True):
        axis.annotate(
            name, (1.02, (height - low) / (high - low)), xycoords="axes fraction", fontsize=8, va="center",
            color=COLORS[rows[name].way.family],
        )  # fmt: skip
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("pairs of blocks (dashed: unrolled)")
    axis.set_title(f"{one.workload.name}: temporary memory in S, the bytes of one stream")


def _time(axis: Any, one: Found, rows: dict[str, Row]) -> None:
    timed = [(name, row, ratio) for name, row in rows.items() if (ratio := one.ratio(name))]
    for place, (_, row, ratio) in enumerate(reversed(timed)):
        color = COLORS[row.way.family]
        axis.barh(place, ratio.median, color=color, alpha=0.75, height=0.6)
        axis.hlines(place, ratio.low, ratio.high, color="black", lw=1)
        axis.annotate(f" {ratio}", (max(ratio.median, ratio.high), place), va="center", fontsize=8, color=GREY)
    axis.set_yticks(range(len(timed)), [name for name, *_ in reversed(timed)], fontsize=8)
    axis.axvline(1, color=GREY, lw=1, ls=":")
    axis.set_title(f"{one.workload.name}, {one.depth} pairs: time over {SCAN_CHECKPOINT}")
