"""Make the table of torch-against-JAX differences from what the GPU suite left: gpu_table.py junit.xml > table.md."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

KINDS = ("torch, stored", "torch, rebuilt", "jax, stored", "jax, rebuilt", "torch against JAX")


def rows(path: Path) -> Iterator[dict[str, str]]:
    """Yield what each case noted, and whether it passed."""
    for case in ElementTree.parse(path).iter("testcase"):
        noted = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
        if "precision" in noted:
            failed = case.find("failure") is not None or case.find("error") is not None
            yield noted | {"outcome": "FAILED" if failed else "passed"}


def _badness(figure: float) -> float:
    """A case that gave no number is the worst of all."""
    return math.inf if math.isnan(figure) else figure


def table(path: Path, device: str) -> str:
    """Return the table in Markdown: the worst of each precision first, then every case.

    Figures are relative L2 errors over all gradients of a case: against NumPy in float64, and of torch against JAX.
    """
    found = sorted(rows(path), key=lambda row: row["precision"])
    if not found:
        raise SystemExit(f"{path} holds no case: was the suite skipped?")
    lines = [
        f"# Gradients on one card: {device}",
        "",
        "Relative L2 errors over all gradients of a case, against NumPy in float64. The last column: torch against JAX",
        "(both rebuilt) on the same card. The worst case of each precision:",
        "",
    ]
    header = f"| precision | {' | '.join(KINDS)} | cases | failed |"
    lines += [header, "| --- " * (len(KINDS) + 3) + "|"]
    for precision in dict.fromkeys(row["precision"] for row in found):
        here = [row for row in found if row["precision"] == precision]
        worst = [f"{max((float(row.get(kind, 'nan')) for row in here), key=_badness):.1e}" for kind in KINDS]
        failed = sum(row["outcome"] != "passed" for row in here)
        lines.append(f"| {precision} | {' | '.join(worst)} | {len(here)} | {failed} |")
    lines += ["", f"| precision | case | {' | '.join(KINDS)} | |", "| --- " * (len(KINDS) + 3) + "|"]
    for row in found:
        figures = " | ".join(f"{float(row.get(kind, 'nan')):.1e}" for kind in KINDS)
        lines.append(f"| {row['precision']} | {row['case']} | {figures} | {row['outcome']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(Path(sys.argv[1]), " ".join(sys.argv[2:])), end="")
