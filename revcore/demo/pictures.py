"""The demo's two pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from revcore.demo.checkpoint import History
from revcore.demo.measure import Agreement
from revcore.pictures import GREY, STYLE, load_pyplot

MIB = 2**20
# Okabe and Ito's colours, which colour-blind readers tell apart; markers and dashes say the same once more.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_POLICIES = {"store-all": (_RED, "o"), "checkpointing": (_BLUE, "s"), "reversible": (_GREEN, "D")}
# The second curve is thin and dashed, so that the first shows through where they coincide.
_LINES = ({"color": _ORANGE, "lw": 4.5, "solid_capstyle": "round"}, {"color": "black", "lw": 1.2, "ls": (0, (4, 3))})
_POINTS = (
    {"mfc": _ORANGE, "mec": "white", "marker": "o", "ms": 11},
    {"mec": "black", "marker": "x", "ms": 7, "mew": 1.8},
)


def curves(
    path: str | os.PathLike[str],
    histories: Mapping[str, History],
    what: str,
    found: Agreement | None,
    resumed_at: int = 0,
) -> None:
    """Draw loss against training steps, one curve a framework, and below it how far two of them lie apart."""
    pyplot = load_pyplot()
    with pyplot.rc_context(STYLE):
        rows = 2 if found else 1
        figure, axes = pyplot.subplots(
            rows, 1, figsize=(9, 7 if found else 4.6), sharex=True, squeeze=False, height_ratios=[2.4, 1][:rows]
        )
        top = axes[0, 0]
        for (label, history), line, point in zip(histories.items(), _LINES, _POINTS, strict=False):
            top.plot(range(1, len(history.loss) + 1), history.loss, label=f"{label}, training batch", **line)
            if history.held_out:
                top.plot(
                    *zip(*history.held_out, strict=True), ls="", label=f"{label}, held-out text", zorder=3, **point
                )
        top.set_ylabel("cross-entropy (nats a byte)")
        top.legend(ncols=len(histories))
        names = " and ".join(histories)
        if found:
            end = "lie on each other" if found.ok else "part"
            _titles(top, f"{names}, one specification: the loss curves {end}", what)
        else:
            _titles(top, f"{names}: the loss of a reversible language model", what)
        if resumed_at:
            top.axvline(resumed_at + 0.5, color=GREY, lw=1, ls=":")
            where = {"xy": (resumed_at + 0.5, 0.02), "xycoords": ("data", "axes fraction")}
            top.annotate(" resumed", color=GREY, **where)
        if found:
            _difference(axes[1, 0], [np.array(history.loss) for history in histories.values()], found)
        axes[-1, 0].set_xlabel("training step")
        axes[-1, 0].set_xlim(left=0)
        figure.align_ylabels()
        figure.savefig(path)
        pyplot.close(figure)


def memory(
    path: str | os.PathLike[str],
    figures: Mapping[str, Mapping[str, list[int]]],
    methods: Mapping[str, str],
    depths: tuple[int, ...],
    what: str,
) -> None:
    """Draw activation memory against depth, a panel a framework, a curve a policy."""
    pyplot = load_pyplot()
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(figures), figsize=(6.2 * len(figures), 4.8), squeeze=False)
        for axis, (label, by_policy) in zip(axes[0], figures.items(), strict=True):
            top = max(max(values) for values in by_policy.values()) / MIB
            heights = _apart([values[-1] / MIB for values in by_policy.values()], top * 0.12)
            for (policy, values), height in zip(by_policy.items(), heights, strict=True):
                color, marker = _POLICIES[policy]
                axis.plot(depths, [v / MIB for v in values], color=color, marker=marker, lw=2.2, ms=7, clip_on=False)
                text = f"{policy}\n{values[-1] / MIB:.3g} MiB"
                axis.text(depths[-1] * 1.05, height, text, color=color, va="center", fontweight="bold", fontsize=10)
            _titles(axis, label, methods[label])
            axis.set_xticks(depths)
            axis.set_xlim(0, depths[-1])
            axis.set_ylim(0, top * 1.05)
            axis.set_xlabel("depth (coupled steps)")
        axes[0, 0].set_ylabel("activation memory of one gradient (MiB)")
        figure.tight_layout(w_pad=3, rect=(0, 0, 1, 0.9))
        figure.text(0.01, 0.98, "Reversible: activation memory does not grow with depth", va="top", fontsize=14)
        figure.text(0.01, 0.92, what, va="top", color=GREY)
        figure.savefig(path)
        pyplot.close(figure)


def _titles(axis: Any, title: str, what: str) -> None:
    axis.set_title(title, pad=26, fontweight="bold")
    axis.annotate(what, (0, 1), (0, 9), "axes fraction", textcoords="offset points", color=GREY, fontsize=10)


def _difference(axis: Any, pair: list[np.ndarray], found: Agreement) -> None:
    difference = np.abs(pair[0] - pair[1])
    # A log axis has no place for 0: what is below the spacing of float32 at the loss is drawn there.
    spacing = 2.0**-23 * float(np.max(pair[1]))
    axis.semilogy(np.arange(1, len(difference) + 1), np.maximum(difference, spacing), color=_BLUE, lw=1.4)
    for height, text, color, offset in (
        (found.tolerance, f"tolerance: {found.tolerance:g}", _RED, 3),
        (spacing, "spacing of float32", GREY, -13),
    ):
        axis.axhline(height, color=color, lw=1.2, ls="--")
        where = {"xy": (1, height), "xytext": (0, offset), "xycoords": ("axes fraction", "data")}
        axis.annotate(text, textcoords="offset points", color=color, ha="right", **where)
    axis.set_ylim(spacing / 10, max(found.tolerance, float(np.max(difference))) * 10)
    axis.set_ylabel("difference\n(nats a byte)")


def _apart(heights: list[float], gap: float) -> list[float]:
    """Move labels up, the lowest first, until none covers another.

    >>> _apart([9.0, 1.0, 1.5], gap=1.0)
    [9.0, 1.0, 2.0]
    """
    result, least = list(heights), -np.inf
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        result[i] = max(heights[i], least)
        least = result[i] + gap
    return result
