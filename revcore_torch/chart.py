"""The planner's pictures: memory by policy, and against depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from revcore.errors import SpecError
from revcore.pictures import GREY, STYLE, load_pyplot
from revcore_torch.planner import Plan, in_bytes, name_of

GIB = 2**30
# Okabe and Ito's colours, which colour-blind readers tell apart; markers say the same once more.
_COLORS = ("#D55E00", "#CC79A7", "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#000000")
_MARKERS = "os^vPDX"
_PARTS = {"parameters": "#bbbbbb", "gradients": "#d6d6d6", "optimizer": "#ebebeb"}


def bars(path: Any, plan: Plan) -> None:
    """Draw what each policy takes, one bar a policy: model, gradients and optimizer, then the passes' own."""
    pyplot = load_pyplot()
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(9, 1.4 + 0.5 * len(plan.rows)))
        names, start = [name_of(row.policy) for row in plan.rows], 0.0
        for part, color in _PARTS.items():
            size = getattr(plan, part) / GIB
            if size:
                axis.barh(names, [size] * len(names), left=start, color=color, label=part)
            start += size
        peaks = [row.peak / GIB for row in plan.rows]
        drawn = axis.barh(names, peaks, left=start, color=_COLORS[2], label="passes, at their peak")
        labels = [f"{in_bytes(plan.total(row))}, {row.work:.2f} F" for row in plan.rows]
        axis.bar_label(drawn, labels, padding=5, fontsize=10)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("GiB at the peak of a training step (F: work, in forward passes)")
        axis.set_title(f"Memory by policy, {plan.depth} steps", fontweight="bold", pad=28)
        axis.legend(ncols=4, loc="lower left", bbox_to_anchor=(-0.01, 1), fontsize=10)
        _save(pyplot, figure, path)


def curves(path: Any, plans: Sequence[Plan], what: str) -> None:
    """Draw the passes' peak against depth, a curve a policy; every plan has the same policies, in one order."""
    pyplot = load_pyplot()
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(9, 5))
        depths = [plan.depth for plan in plans]
        for i, rows in enumerate(zip(*(plan.rows for plan in plans), strict=True)):
            names = list(dict.fromkeys(name_of(row.policy) for row in rows))
            label = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            style = {"color": _COLORS[i % 7], "marker": _MARKERS[i % 7], "lw": 2.2, "ms": 7, "clip_on": False}
            axis.plot(depths, [row.peak / GIB for row in rows], label=label, **style)
        axis.set_xticks(depths)
        axis.set_xlim(0, depths[-1])
        axis.set_ylim(0)
        axis.set_xlabel("depth (steps)")
        axis.set_ylabel("GiB at the passes' peak, beyond the model")
        axis.set_title("Peak memory by policy and depth, planned on fake tensors", fontweight="bold", pad=26)
        axis.annotate(what, (0, 1), (0, 9), "axes fraction", textcoords="offset points", color=GREY, fontsize=10)
        axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1))  # beside the curves, which fill the axes
        _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Any) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"the picture cannot be written to {path}: {error}") from error
    finally:
        pyplot.close(figure)
