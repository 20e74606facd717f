"""``python -m revcore check``: find a coupling, prove its laws, print a table."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.laws import CouplingReport, check_coupling
from revcore.named import load_function

_EXPECTED = "a revcore.Coupling or its class, as package.module:name or path/to/file.py:name"
_ARRAYS = {"torch": ("torch", "from_numpy"), "jax": ("jax.numpy", "asarray")}


def run(name: str, *, shape: str | None = None, arrays: str = "numpy", seed: int = 0) -> bool:
    """Check, print what was found, and return whether the coupling keeps its laws. The arguments are the command's."""
    if shape is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", shape):
        raise SpecError(f"--shape came as {shape!r}, expected the shape of a stream, such as --shape 8,64")
    if seed < 0:
        raise SpecError(f"--seed came as {seed}, expected at least 0")
    sizes = None if shape is None else tuple(map(int, shape.split(",")))
    asarray = _asarray(arrays)
    coupling = _find(name)
    try:
        report = check_coupling(coupling, shape=sizes, asarray=asarray, seed=seed)
    except SpecError as error:
        print(f"{name} breaks a law of couplings: {error}")
        return False
    except Exception as error:  # whatever their own code raises
        raise SpecError(
            f"COUPLING came as {name!r}, which could not be tried on {arrays} arrays of shape {sizes or (64,)}: {error}"
            ". If it holds arrays, give their --shape; if it calls functions of a library, write --arrays torch or "
            "--arrays jax"
        ) from error
    Console(highlight=False).print(_table(report))
    print(f"{name} keeps the laws of couplings: y = forward(x, f) has the inverse that it says.")
    if report.amplification > 1:
        print(
            "Each step back multiplies an error in y by that much: revcore.amplification(program, dtype) tells how "
            "deep a network may be."
        )
    return True


def _find(name: str) -> Coupling:
    found: Any = load_function(name, "COUPLING", _EXPECTED)
    if isinstance(found, type) and issubclass(found, Coupling):
        try:
            found = found()
        except TypeError as error:
            raise SpecError(
                f"COUPLING came as {name!r}, a class that takes arguments ({error}): name an object, as `mine = "
                f"{found.__name__}(…)` makes one in a file of yours"
            ) from error
    if not isinstance(found, Coupling):
        raise SpecError(f"COUPLING came as {name!r}, which is {type(found).__name__}, expected {_EXPECTED}")
    return found


def _asarray(arrays: str) -> Callable[[Any], Any] | None:
    """Return what makes the library's array of a NumPy array."""
    if arrays == "numpy":
        return None
    from revcore.demo.backend import require

    module, function = _ARRAYS[arrays]
    require(arrays, arrays, f"--arrays {arrays}")
    return getattr(importlib.import_module(module), function)


def _table(report: CouplingReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(report.name)
    table.add_column("", justify="right")
    for dtype, error in report.round_trip.items():
        table.add_row(f"relative error of inverse(forward(x, f), f), {dtype}", f"{error:.1e}")
    found = "left to autodiff" if report.vjp_error is None else f"{report.vjp_error:.1e}"
    table.add_row("relative error of vjp", found)
    table.add_row("an error in y grows in inverse by", f"{report.amplification:.3g}")
    return table
