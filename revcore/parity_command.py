"""``python -m revcore parity``: find the two sides, run them, print tables and a verdict."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from revcore import weights
from revcore.arrays import permute_axes
from revcore.errors import SpecError
from revcore.named import load_function
from revcore.parity import Record, Report, coarsest, compare

_EXPECTED = (
    "a safetensors file of revcore.weights that is there, or a function that returns a model, as "
    "package.module:function or path/to/file.py:function"
)


@dataclass
class _Side:
    """One of the two: a model with, perhaps, its inputs, or the tensors of a file."""

    name: str
    tensors: Mapping[str, Any] | None = None
    model: Any = None
    inputs: Sequence[Any] | None = None
    framework: str = ""

    @property
    def half(self) -> Any:
        """The framework's half of this tool, imported by its name only now."""
        return importlib.import_module(f"revcore_{self.framework}.parity")


def run(
    a: str,
    b: str,
    *,
    shape: str | None = None,
    tokens: int | None = None,
    images: bool = False,
    own_weights: bool = False,
    dtype: str | None = None,
    depth: int | None = None,
    limit: float = 16.0,
    seed: int = 0,
    rows: int = 12,
) -> bool:
    """Compare, print what was found, and return whether the two agree. The arguments are the command's."""
    if depth is not None and depth < 1:
        raise SpecError(f"--depth came as {depth}, expected the number of coupled steps, at least 1")
    if tokens is not None and (tokens < 1 or shape is None):
        raise SpecError(f"--tokens came as {tokens}, expected how many tokens there are, and their --shape")
    if rows < 1 or seed < 0:
        raise SpecError(f"--rows came as {rows} and --seed as {seed}, expected at least 1 and 0")
    drawn = None if shape is None else [_draw(_shape(shape), tokens, seed)]
    # two frameworks share a GPU's memory only if neither takes it all
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(f"making {a}")
        left = _side("A", a)
        bars.update(bar, description=f"making {b}")
        right = _side("B", b)
        short = [name if side.model is None else name.rpartition(":")[2] for side, name in ((left, a), (right, b))]
        names = (short[0], short[1]) if short[0] != short[1] else (f"{short[0]} (A)", f"{short[1]} (B)")
        options = {"limit": limit, "names": names}
        inputs = _inputs(left, right, drawn, images)
        if left.tensors is not None or right.tensors is not None:
            bars.update(bar, description="comparing the weights")
            reports = [_of_weights(*_in_one_form(left, right, inputs or ()), depth=depth or 1, **options)]
            notes = []
        else:
            if inputs is None:
                raise SpecError(
                    "no inputs came: give their --shape, such as --shape 2,64, or let a function return model, inputs"
                )
            reports, carried = [], left.half.parameters(left.model, inputs)
            if own_weights:
                theirs = right.half.parameters(right.model, inputs)
                reports.append(_of_weights(carried, theirs, depth=1, **options))
                carried = None
            how = {"dtype": dtype, "seed": seed, "images": images}
            bars.update(bar, description=f"running {a}")
            one = left.half.record(left.model, inputs, **how)
            bars.update(bar, description=f"running {b}")
            other = right.half.record(right.model, inputs, carried, **how)
            bars.update(bar, description="comparing")
            reports.append(compare(one, other, depth=depth or max(one.depth, other.depth), **options))
            notes = _notes(one, other, names, depth)
    for report in reports:
        print(report.table(rows))
        if report.steps:
            print(f"\n{report.trail()}")
        print()
    if not reports[-1].ok and dtype != "float64" and left.model is not None and right.model is not None:
        notes.append("Is it rounding, or a mistake? --dtype float64 tells.")
    for line in (*notes, *(report.verdict for report in reports)):
        print(line)
    return all(report.ok for report in reports)


def _side(owner: str, name: str) -> _Side:
    if Path(name).is_file():
        return _Side(name, weights.load(name)[0])
    make = load_function(name, owner, _EXPECTED)
    if not callable(make) or any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(make).parameters.values()
    ):
        raise SpecError(f"{owner} came as {name!r}, expected a function that can be called without arguments")
    made = make()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    libraries = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    framework = next((ours for theirs, ours in (("torch", "torch"), ("flax", "jax")) if theirs in libraries), None)
    if framework is None:
        raise SpecError(
            f"{owner} came as {name!r}, which returned {type(model).__name__}, expected a torch.nn.Module, a "
            "flax.nnx.Module or a flax.linen.Module, or `model, inputs`"
        )
    if inputs is not None:
        inputs = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    return _Side(name, None, model, inputs, framework)


def _inputs(left: _Side, right: _Side, drawn: list[Any] | None, images: bool) -> list[Any] | None:
    """Return the inputs of both, in torch's layout; what both bring must be the same."""
    brought = [
        [_channels_second(x) if images and side.framework == "jax" else x for x in side.inputs]
        for side in (left, right)
        if side.inputs is not None
    ]
    if drawn is not None and brought:
        raise SpecError("--shape came, but a function brings inputs of its own: leave one of them out")
    if len(brought) == 2:
        one, other = (Record(values={f"input {i}": x for i, x in enumerate(xs)}) for xs in brought)
        same = compare(one, other, dtype=coarsest(x.dtype for xs in brought for x in xs), names=(left.name, right.name))
        if not same.ok:
            raise SpecError(f"both functions bring inputs, which differ: {same.verdict} Let one of them bring them")
    return brought[0] if brought else drawn


def _channels_second(array: Any) -> Any:
    return permute_axes(array, (0, array.ndim - 1, *range(1, array.ndim - 1))) if array.ndim > 2 else array


def _in_one_form(left: _Side, right: _Side, inputs: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Return the weights of both, the blocks of a ``Repeat`` apart where one is a model that knows about it."""
    programs = [p for side in (left, right) if side.model is not None for p in side.half.programs(side.model, inputs)]
    result = []
    for side in (left, right):
        tensors = side.half.parameters(side.model, inputs) if side.tensors is None else side.tensors
        for prefix, program in programs if side.tensors is not None else ():
            numbers = [int(m[1]) for n in tensors if (m := re.match(re.escape(prefix) + r"(\d+)\.", n))]
            if max(numbers, default=0) < program.num_slots:
                tensors = weights.unstack(tensors, program, prefix)
        result.append(tensors)
    return result


def _of_weights(left: Mapping[str, Any], right: Mapping[str, Any], depth: int, **options: Any) -> Report:
    dtype = coarsest(array.dtype for array in (*left.values(), *right.values()))
    return compare(Record(left), Record(right), depth=depth, dtype=dtype, **options)


def _notes(one: Record, other: Record, names: tuple[str, str], depth: int | None) -> list[str]:
    without = [name for name, found in zip(names, (one, other), strict=True) if found.steps is None]
    if not without:
        return []
    counted = (
        "" if depth or len(without) == 1 else "; errors are counted in 1·eps: --depth tells how many layers there are"
    )
    return [f"No ReversibleSequential in {' and '.join(without)}, so no steps were compared{counted}."]


def _draw(shape: tuple[int, ...], tokens: int | None, seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, 0])
    return rng.standard_normal(shape) if tokens is None else rng.integers(0, tokens, shape)


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise SpecError(f"--shape came as {text!r}, expected the shape of the input, batch first, such as --shape 2,64")
    return tuple(map(int, text.split(",")))
