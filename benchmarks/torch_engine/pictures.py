"""Two pictures: time against memory, and memory against depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared import apart
from benchmarks.torch_engine.report import Found
from benchmarks.torch_engine.ways import PLAIN, REVERSE, STORE_ALL, Family
from revcore.pictures import load_pyplot

COLORS: dict[Family, str] = {"stored": "#555555", "checkpoint": "#d95f02", "peer": "#7570b3", "revcore": "#1b9e77"}
LABELS: dict[Family, str] = {
    "stored": "everything stored",
    "checkpoint": "torch.utils.checkpoint",
    "peer": "other libraries",
    "revcore": "revcore",
}


def frontier(path: Path, one: Found) -> None:
    """Draw time against peak memory, all ways of one workload, and what is the least time within each budget."""
    pyplot = load_pyplot()
    figure, axis = pyplot.subplots(figsize=(10, 6.5))
    labels: list[tuple[str, float, float, str]] = []
    for family, color in COLORS.items():
        points: list[tuple[float, float]] = []
        for name, row in one.rows.items():
            ratio = one.ratio(name)
            if row.way.family != family or ratio is None:
                continue
            x, y = one.peak(name), ratio.median
            points.append((x, y))
            axis.vlines(x, ratio.low, ratio.high, color=color, lw=1, alpha=0.5)
            axis.scatter(x, y, s=34, color=color if row.way.streams == 2 else "white", edgecolor=color, zorder=3)
            labels.append((name.removeprefix("checkpoint, "), x, y, color))
        if family in ("checkpoint", "revcore"):
            _least(axis, sorted([*points, (one.peak(STORE_ALL), 1.0)]), color)
        axis.scatter([], [], color=color, s=34, label=LABELS[family])
    axis.axvline(one.floor, color="#aaaaaa", lw=1, ls=":")
    axis.annotate(" floor", (one.floor, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color="#888888")
    axis.set_xscale("log")
    axis.set_xlabel("peak memory above parameters and gradients, in S, the bytes of one stream (log scale)")
    axis.set_ylabel("time of a training step, over store-all")
    axis.set_title(f"Time against memory: {one.workload.name}, depth {one.depth}", loc="left", fontweight="bold")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "2357" else "")
    axis.legend(
        loc="lower left",
        frameon=False,
        title="dot: median, bar: quartiles; hollow: a net of one stream",
        title_fontsize=8,
    )
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _label(figure, axis, labels)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _least(axis: Any, points: list[tuple[float, float]], color: str) -> None:
    """The least time within each budget, as steps."""
    steps: list[tuple[float, float]] = []
    for x, y in points:
        if not steps or y < steps[-1][1]:
            steps.append((x, y))
    if steps:
        axis.step(*zip(*steps, strict=True), where="post", color=color, lw=1.5, alpha=0.6, zorder=2)


def _label(figure: Any, axis: Any, labels: list[tuple[str, float, float, str]]) -> None:
    from matplotlib.text import Text

    """Put each label at the nearest of some places where it covers no other, with a line to its dot."""
    figure.canvas.draw()
    boxes: list[Any] = []
    for x, y in ((x, y) for _, x, y, _ in labels):
        a, b = axis.transData.transform((x, y))
        boxes.append(_box(a - 5, b - 5, a + 5, b + 5))
    places = sorted(
        ((dx, dy) for dx in (8, -8, 40, -40) for dy in range(-120, 121, 6)), key=lambda d: abs(d[0]) + 1.2 * abs(d[1])
    )
    for name, x, y, color in labels:
        text = None
        for dx, dy in places:
            if text is not None:
                text.remove()
            arrow = {"arrowstyle": "-", "color": color, "lw": 0.5, "alpha": 0.6}
            text = axis.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", fontsize=7.5, color=color, va="center",
                ha="left" if dx > 0 else "right", arrowprops=arrow if abs(dx) + abs(dy) > 15 else None,
            )  # fmt: skip
            text.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # the words alone, without the line
            if (
                axis.bbox.contains(box.x0, box.y0)
                and box.x1 < axis.bbox.x1
                and not any(box.overlaps(other) for other in boxes)
            ):
                boxes.append(box)
                break


def _box(*corners: float) -> Any:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(*corners)


def memory(
    path: Path,
    found: Mapping[str, Found],
    title: str = "Memory against depth (dashed: nets of one stream)",
    bold: str = REVERSE,
    dashed: Callable[[Found, str], bool] = lambda one, name: one.rows[name].way.streams == 1,
) -> None:
    """Draw peak memory against depth, a panel a workload."""
    pyplot = load_pyplot()
    shown = [one for one in found.values() if one.by_depth and not one.workload.trivial]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4.6 * len(shown) + 1, 4.8), squeeze=False)
    for axis, one in zip(axes[0], shown, strict=True):
        S, ends = one.workload.stream_bytes, {}
        for name, by_depth in one.by_depth.items():
            if name == PLAIN[2]:  # lies under store-all
                continue
            way, depths = one.rows[name].way, sorted(by_depth)
            peaks = [by_depth[depth].peak / S for depth in depths]
            ends[name] = math.log2(peaks[-1])
            line = "--" if dashed(one, name) else "-"
            axis.plot(depths, peaks, line, color=COLORS[way.family], lw=2.6 if name == bold else 1.3, marker="o", ms=3)
        ends["floor"] = math.log2(one.floor)
        axis.axhline(one.floor, color="#aaaaaa", lw=1, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        low, high = (math.log2(limit) for limit in axis.get_ylim())
        for name, height in zip(ends, apart(list(ends.values()), 0.047 * (high - low)), strict=True):
            color = "#888888" if name == "floor" else COLORS[one.rows[name].way.family]
            axis.annotate(
                name, (1.02, (height - low) / (high - low)), xycoords="axes fraction", fontsize=8, color=color,
                va="center", fontweight="bold" if name == bold else "normal",
            )  # fmt: skip
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("blocks")
        axis.set_title(one.workload.name, loc="left", fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("peak above parameters and gradients, in S")
    figure.text(0.01, 0.98, title, va="top", fontweight="bold", fontsize=13)
    figure.tight_layout(w_pad=2, rect=(0, 0, 1, 0.94))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
