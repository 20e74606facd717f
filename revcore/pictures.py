"""What all pictures share: their style, and a pyplot that needs no display."""

from __future__ import annotations

from typing import Any

from revcore.errors import SpecError

GREY = "#666666"
STYLE = {
    "font.size": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.dpi": 130,
    "savefig.bbox": "tight",
}


def load_pyplot() -> Any:
    """Return matplotlib's pyplot, imported only now, or say what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise SpecError("matplotlib is not installed, which a picture needs: pip install 'revcore-nn[demo]'") from error
    matplotlib.use("Agg")  # writes files, needs no display
    from matplotlib import pyplot

    return pyplot
