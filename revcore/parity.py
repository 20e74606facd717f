"""Parity: hold what two runs of one network gave against each other, and say in one sentence whether they agree.

The measure is the relative L2 error over a whole tree, ``‖a − b‖ / ‖b‖``, in units of ``depth·eps``: the rounding that
a network of that depth may collect. A large tree hides a small tensor, so each tensor is judged by itself, too: by its
own norm, and by the noise that rounding leaves even of a gradient that is zero (the bias of an attention key, or before
a batch norm), which goes with the largest gradients around.

>>> exact = Record({"loss": 1.0}, {"0.weight": [3.0, 4.0]}, depth=4, dtype="float32")
>>> print(compare(Record({"loss": 1.0}, {"0.weight": [3.0, 4.000001]}, depth=4, dtype="float32"), exact).verdict)
a and b agree: values differ by 0 and gradients by 0.42 depth·eps, 16 are allowed (depth 4, float32).
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from revcore import drift
from revcore.dlpack import on_one_device
from revcore.errors import SpecError

EPS: dict[str, float] = {**drift.EPS, "tensorfloat32": 2.0**-10}
"""The spacing of numbers above 1 by dtype."""

# A looser tolerance than this passes networks that are plainly different.
_LOOSEST = 1e-2
# What a single tensor is allowed, as shares of the limit: of its own norm (in float32, an attention block's bias is off
# by 7 depth·eps where the tree is by 2); and of the noise: of a tree whose numbers are all off by as much, and of the
# largest numbers in it (gradients that are zero come to half a depth·eps of those).
_OF_ITSELF, _OF_MEAN, _OF_LARGEST = 4.0, 1.0, 0.25

__all__ = ["EPS", "Parting", "Record", "Report", "Row", "Stage", "StepRow", "compare", "loss_weights"]


class Stage(NamedTuple):
    """The streams at one place of a reversible network: before its first step, or after one.

    Attributes:
        name: what the two sides have in common, such as ``"step 3 (Couple)"``.
        streams: the arrays.
        gradients: of the loss, in these streams; ``None`` if none were recorded.
        block: the class of the step's block, which the two sides may call by other names.

    >>> Stage("step 0 (Couple)", [np.ones(2), np.zeros(2)]).gradients is None
    True
    """

    name: str
    streams: Sequence[Any]
    gradients: Sequence[Any] | None = None
    block: str = ""


@dataclass(frozen=True)
class Record:
    """What one run of a network gave: the arrays to compare, and what rounding to expect in them.

    Args:
        values: arrays by name, such as ``{"output": y, "loss": loss}``; ``None`` if none were recorded.
        gradients: arrays by name, such as ``to_neutral(module, gradients=True)``; ``None`` if none were recorded.
        depth: how many coupled steps the network has; at least 1.
        dtype: the coarsest dtype that was computed in, a key of :data:`EPS`.
        steps: a :class:`Stage` before the first step and one after each, in running order; ``None`` if none were
            recorded. :func:`compare` finds the first that differs.

    Arrays may be NumPy's, torch's or JAX's; neither framework is imported for them. ``revcore_torch.parity.record`` and
    ``revcore_jax.parity.record`` run a model and make a record.

    Raises:
        SpecError: a field of the wrong kind.

    >>> Record({"output": np.ones(3)}, depth=8).dtype
    'float32'
    """

    values: Mapping[str, Any] | None = None
    gradients: Mapping[str, Any] | None = None
    depth: int = 1
    dtype: str = "float32"
    steps: Sequence[Stage] | None = None

    def __post_init__(self) -> None:
        for field in ("values", "gradients"):
            tree = getattr(self, field)
            if tree is not None and not isinstance(tree, Mapping):
                raise SpecError(
                    f"Record: {field} came as {type(tree).__name__}, expected a mapping from names to arrays: "
                    "to_neutral(module) makes one"
                )
        if self.steps is not None and not all(isinstance(stage, Stage) for stage in self.steps):
            raise SpecError("Record: steps holds something else, expected Stage(name, streams) before and after each")
        if self.values is None and self.gradients is None and not self.steps:
            raise SpecError("Record: neither values nor gradients nor steps came, so there is nothing to compare")
        _check(self.depth, self.dtype)


@dataclass(frozen=True)
class Row:
    """One tensor of a comparison.

    Attributes:
        kind: ``"value"`` or ``"gradient"``.
        name: its name.
        error: ``‖a − b‖``.
        norm: ``‖b‖``.
        problem: why the two cannot be compared, or ``""``.
        fault: in what the two differ by more than rounding explains in this tensor, or ``""``.

    >>> one, other = (Record({"loss": x}, dtype="float64") for x in (3.0, 4.0))
    >>> compare(one, other).rows
    (Row(kind='value', name='loss', error=1.0, norm=4.0, problem='', fault='differs by 2.5e-01 of itself'),)
    """

    kind: str
    name: str
    error: float = math.nan
    norm: float = math.nan
    problem: str = ""
    fault: str = ""


@dataclass(frozen=True)
class StepRow:
    """One place of a network in a comparison.

    Attributes:
        name: its name.
        forward: ``‖a − b‖ / ‖b‖`` over the streams; infinite if they cannot be compared.
        backward: the same over the gradients in them; ``None`` if none were recorded.

    >>> one, other = (Record(steps=[Stage("input", [x])], dtype="float64") for x in (3.0, 4.0))
    >>> compare(one, other).steps
    (StepRow(name='input', forward=0.25, backward=None),)
    """

    name: str
    forward: float
    backward: float | None = None


class Parting(NamedTuple):
    """Where two networks part.

    Attributes:
        name: the step that turns equal streams (or gradients) into unlike ones.
        direction: ``"forward"``, or ``"backward"`` where all streams agree and gradients do not.
        error: ``‖a − b‖ / ‖b‖`` behind it.

    >>> one, other = (Record(steps=[Stage("input", [1.0]), Stage("step 0", [x])], dtype="float64") for x in (3.0, 4.0))
    >>> compare(one, other).first_apart
    Parting(name='step 0', direction='forward', error=0.25)
    """

    name: str
    direction: Literal["forward", "backward"]
    error: float


@dataclass(frozen=True)
class Report:
    """What :func:`compare` found.

    Attributes:
        rows: the tensors, in the order in which they came.
        value_error: ``‖a − b‖ / ‖b‖`` over all values; ``None`` if none were recorded.
        gradient_error: the same over all gradients.
        problems: why the two cannot agree, whatever the errors over all: missing names, other shapes, NaN, zero
            gradients, and single tensors that differ by more than rounding explains, where the whole hides them.
        depth: how many steps the errors are counted in.
        dtype: the dtype whose eps they are counted in.
        limit: how many ``depth·eps`` are allowed.
        names: what the two sides are called.
        steps: the places of the network in running order; empty unless both records have them.

    >>> one, other = (Record({"loss": x}, dtype="float64") for x in (3.0, 4.0))
    >>> report = compare(one, other)
    >>> report.ok, report.value_error
    (False, 0.25)
    """

    rows: tuple[Row, ...]
    value_error: float | None
    gradient_error: float | None
    problems: tuple[str, ...]
    depth: int
    dtype: str
    limit: float
    names: tuple[str, str] = ("a", "b")
    steps: tuple[StepRow, ...] = ()

    @property
    def unit(self) -> float:
        """``depth·eps``, what the errors are counted in."""
        return self.depth * EPS[self.dtype]

    @property
    def ok(self) -> bool:
        """Whether the two agree."""
        return not self.problems and self._within(self.value_error, self.gradient_error) and self.first_apart is None

    def _within(self, *errors: float | None) -> bool:
        return all(error is None or error <= self.limit * self.unit for error in errors)

    @property
    def first_apart(self) -> Parting | None:
        """Where the two part, the first step whose streams differ or, where none do, the last whose gradients do.

        They part if an error passes ``limit·depth·eps`` anywhere. The step that began it is sought with the rounding of
        the steps so far, ``limit·(steps so far)·eps``: a difference may grow on its way to the limit.
        """
        errors = [error for row in self.steps for error in (row.forward, row.backward)]
        if self._within(self.value_error, self.gradient_error, *errors):
            return None
        for i, row in enumerate(self.steps):
            if row.forward > self.limit * EPS[self.dtype] * max(1, min(i, self.depth)):
                return Parting(row.name, "forward", row.forward)
        for i, row in reversed(list(enumerate(self.steps))):
            if not self._within(row.backward):
                assert row.backward is not None
                after = i + 1 < len(self.steps)
                name = self.steps[i + 1].name if after else f"what comes after {row.name}"
                return Parting(name, "backward", row.backward)
        return None

    @property
    def verdict(self) -> str:
        """One sentence that says whether the two agree, by how much they differ, and what is wrong."""
        agree = "agree" if self.ok else "do NOT agree"
        errors = [("values", self.value_error), ("gradients", self.gradient_error)]
        figures = " and ".join(
            f"{name}{' differ' if i == 0 else ''} by {error / self.unit:.2g}"
            for i, (name, error) in enumerate((name, error) for name, error in errors if error is not None)
        )
        reasons = [f"{figures or 'they'} depth·eps, {self.limit:g} are allowed (depth {self.depth}, {self.dtype})"]
        if parting := self.first_apart:
            reasons.append(
                f"they part going {parting.direction} at {parting.name}, by {parting.error / self.unit:.2g} depth·eps"
            )
        elif self.steps and not self.ok and not self.problems:
            reasons.append("the streams agree after every step, and so do their gradients: look outside of the steps")
        reasons += self.problems[:3]
        if len(self.problems) > 3:
            reasons.append(f"and {len(self.problems) - 3} problems more")
        return f"{self.names[0]} and {self.names[1]} {agree}: {'; '.join(reasons)}."

    def table(self, limit: int = 12) -> str:
        """Return a table of the ``limit`` worst tensors as plain text: first those at fault, then by their error.

        Columns: the error's share in the whole tree's in units of ``depth·eps`` (judged as their root sum of squares),
        the error relative to the tensor itself, the tensor's norm.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table

        norms = {kind: math.hypot(*(row.norm for row in self.rows if row.kind == kind and not row.problem))
                 for kind in ("value", "gradient")}  # fmt: skip
        shares = {id(row): _ratio(row.error, norms[row.kind]) / self.unit for row in self.rows}
        worst = sorted(self.rows, key=lambda row: (not row.problem, not row.fault, -_or_inf(shares[id(row)])))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("tensor", no_wrap=True)
        for header in ("depth·eps of all", "relative to itself", f"norm in {self.names[1]}"):
            table.add_column(header, justify="right", no_wrap=True)
        for row in worst[:limit]:
            figures = (f"{shares[id(row)]:.3g}", f"{_ratio(row.error, row.norm):.1e}", f"{row.norm:.3g}")
            table.add_row(f"{row.kind} {row.name}", *((row.problem, "", "") if row.problem else figures))
        for kind, error in (("value", self.value_error), ("gradient", self.gradient_error)):
            if error is not None:
                table.add_row(f"all {kind}s", f"{error / self.unit:.3g}", f"{error:.1e}", f"{norms[kind]:.3g}")
        if len(worst) > limit:
            table.caption = f"the worst {limit} of {len(worst)} tensors"
        with io.StringIO() as file:
            Console(file=file, width=250, color_system=None, highlight=False, markup=False, emoji=False).print(table)
            lines = textwrap.dedent(file.getvalue()).splitlines()
            return "\n".join(line.rstrip() for line in lines).strip("\n")

    def trail(self) -> str:
        """Return the errors by step in units of ``depth·eps``, eight in a line: of the streams, and of their gradients.

        What comes first in a line is how many steps lie before it.

        >>> steps = [Stage("input", [1.0]), Stage("step 0 (Couple)", [2.0])]
        >>> print(compare(Record(steps=steps), Record(steps=steps)).trail())
        error of the streams by step, in depth·eps:
          0:  0     0
        """
        lines = []
        for title, errors in (
            ("streams", [row.forward for row in self.steps]),
            ("gradients in them", [row.backward for row in self.steps]),
        ):
            if any(error is not None for error in errors):
                lines.append(f"error of the {title} by step, in depth·eps:")
                shown = ["-" if error is None else f"{error / self.unit:.2g}" for error in errors]
                wide = max(map(len, shown))
                for start in range(0, len(shown), 8):
                    row = "  ".join(text.ljust(max(4, wide)) for text in shown[start : start + 8])
                    lines.append(f"  {f'{start}:':<{len(str(len(shown))) + 3}}{row}".rstrip())
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(part for part in (self.table() if self.rows else "", self.trail(), self.verdict) if part)


def compare(
    a: Record,
    b: Record,
    *,
    depth: int | None = None,
    dtype: str | None = None,
    limit: float = 16.0,
    names: tuple[str, str] = ("a", "b"),
) -> Report:
    """Hold two records against each other: ``‖a − b‖ ≤ limit·depth·eps(dtype)·‖b‖`` over all values, and all gradients.

    And in each tensor ``t`` of ``n`` numbers ``‖a_t − b_t‖ ≤ limit·depth·eps·(4·‖b_t‖ + √n·(r + R/4))``, where ``r`` is
    the root mean square of all of ``b``, and ``R`` the largest of any tensor: what is wrong in a small one is named,
    though the whole hides it, and one that is zero but for rounding is not accused.

    Whatever the limit, these never agree: a name missing on one side, other shapes, NaN or infinity, all gradients
    (or values) zero, nothing recorded, and a tolerance above 1e-2, which would prove nothing.

    Args:
        a: one record.
        b: the other, relative to which errors are given.
        depth: counts in this depth instead of the records' own.
        dtype: counts in this dtype's eps instead of the coarser of the records' own.
        limit: how many ``depth·eps`` are allowed.
        names: what to call the two, such as ``("torch", "jax")``.

    Raises:
        SpecError: an argument of the wrong kind, or records of unlike depth with no ``depth`` given.

    >>> one, none = ({"0.weight": np.ones(2) * x} for x in (1.0, np.nan))
    >>> compare(Record(gradients=one, dtype="float64"), Record(gradients=one, dtype="float64")).ok
    True
    >>> compare(Record(gradients=none, dtype="float64"), Record(gradients=one, dtype="float64")).problems
    ('gradient 0.weight is not finite in a',)

    A small gradient that is missing:

    >>> some = {"weight": np.ones(1000), "bias": np.full(2, 1e-5)}
    >>> compare(Record(gradients={**some, "bias": np.zeros(2)}), Record(gradients=some)).problems
    ('gradient bias is zero in a, and of norm 1.41e-05 in b',)
    """
    for record in (a, b):
        if not isinstance(record, Record):
            raise SpecError(
                f"compare: came a {type(record).__name__}, expected a Record(values, gradients, depth, dtype)"
            )
    if depth is None and a.depth != b.depth:
        raise SpecError(f"compare: the records have depth {a.depth} and {b.depth}: say which counts, depth={b.depth}")
    depth = a.depth if depth is None else depth
    dtype = max(a.dtype, b.dtype, key=EPS.__getitem__) if dtype is None else dtype
    _check(depth, dtype)
    steps, problems = _measure_steps(a.steps, b.steps, names)
    tolerance = limit * depth * EPS[dtype]
    value_rows, value_error, more = _measure("value", a.values, b.values, names, tolerance)
    problems += more
    gradient_rows, gradient_error, more = _measure("gradient", a.gradients, b.gradients, names, tolerance)
    problems += more
    if not tolerance <= _LOOSEST:
        problems.append(
            f"the tolerance {tolerance:.1e} is above {_LOOSEST:g} and proves nothing (lower the limit, or compare the "
            "error of each against float64)"
        )
    rows = (*value_rows, *gradient_rows)
    return Report(rows, value_error, gradient_error, tuple(problems), depth, dtype, limit, names, steps)


def to_numpy(array: Any) -> np.ndarray:
    """Return an array of NumPy, torch or JAX, or a number, as a NumPy array; bfloat16 of torch comes as float32.

    Raises:
        SpecError: it is none of these.

    >>> to_numpy(2.0)
    array(2.)
    """
    original = array
    if hasattr(array, "detach") and hasattr(array, "cpu"):  # torch: off the graph, off the device
        array = array.detach().cpu()
        if array.is_floating_point() and str(array.dtype) not in ("torch.float64", "torch.float16"):
            array = array.float()
        array = array.resolve_conj().resolve_neg()
    elif not hasattr(array, "__array__") and hasattr(array, "__dlpack__"):
        array = np.from_dlpack(array)
    try:
        result = np.asarray(array)
        result.astype(np.complex128 if result.dtype.kind == "c" else np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise SpecError(f"expected an array of numbers, got {type(original).__name__}: {error}") from error
    return result


def loss_weights(seed: int, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Return the ``w`` of the loss ``Σ w·y`` over all outputs ``y`` of a network: normal numbers over ``√size``.

    A sum of squares would not do: its gradient vanishes behind a normalisation.

    >>> [w.shape for w in loss_weights(0, [(2, 3), ()])]
    [(2, 3), ()]
    """
    rng = np.random.default_rng([seed, 1])  # not the numbers of the inputs
    return [np.asarray(rng.standard_normal(tuple(shape))) / max(1, math.prod(shape)) ** 0.5 for shape in shapes]


def coarsest(dtypes: Iterable[Any]) -> str:
    """Return the coarsest of the dtypes that errors can be counted in, ``"float32"`` if there is none.

    >>> coarsest([np.dtype("float64"), "torch.bfloat16", np.dtype("int32")])
    'bfloat16'
    """
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes} & set(EPS)
    return max(names, key=EPS.__getitem__, default="float32")


def in_order(networks: Sequence[Sequence[Stage]]) -> tuple[Stage, ...]:
    """Return the stages of all the reversible networks of a model; several are told apart by number."""
    several = len(networks) > 1
    return tuple(
        stage._replace(name=f"network {k}, {stage.name}") if several else stage
        for k, stages in enumerate(networks)
        for stage in stages
    )


def _measure(
    kind: Literal["value", "gradient"],
    a: Mapping[str, Any] | None,
    b: Mapping[str, Any] | None,
    names: tuple[str, str],
    tolerance: float,
) -> tuple[list[Row], float | None, list[str]]:
    if a is None and b is None:
        return [], None, []
    a, b = a or {}, b or {}
    rows: list[Row] = []
    figures: dict[str, _Figures] = {}
    for name in dict.fromkeys((*b, *a)):
        if name not in a or name not in b:
            rows.append(Row(kind, name, problem=f"is missing in {names[0] if name not in a else names[1]}"))
            continue
        left, right = _shaped(a[name]), _shaped(b[name])
        shapes = tuple(left.shape), tuple(right.shape)
        if shapes[0] != shapes[1]:
            problem = f"has shape {shapes[0]} in {names[0]}, but {shapes[1]} in {names[1]}"
            rows.append(Row(kind, name, problem=problem))
            continue
        found = _figures(left, right)
        blame = [side for side, finite in zip(names, found.finite, strict=True) if not finite]
        if blame:
            rows.append(Row(kind, name, problem=f"is not finite in {' and '.join(blame)}"))
            continue
        figures[name] = found
        rows.append(Row(kind, name, found.error, found.norm_b))
    problems = [f"{kind} {row.name} {row.problem}" for row in rows if row.problem]
    if not rows:
        problems.append(f"no {kind}s were recorded")
    norms = [math.hypot(*(getattr(found, side) for found in figures.values())) for side in ("norm_a", "norm_b")]
    for side, size in zip(names, norms, strict=True):
        if figures and size == 0:
            problems.append(f"all {kind}s are zero in {side}")
    error = _ratio(math.hypot(*(row.error for row in rows if not row.problem)), norms[1]) if figures else math.inf
    largest = max((found.norm_b / found.size**0.5 for found in figures.values() if found.size), default=0.0)
    mean = norms[1] / max(1, sum(found.size for found in figures.values())) ** 0.5
    noise = tolerance * (_OF_MEAN * mean + _OF_LARGEST * largest)
    faults = {
        name: _fault(found, tolerance * _OF_ITSELF * found.norm_b + noise * found.size**0.5, names)
        for name, found in figures.items()
    }
    rows = [replace(row, fault=faults.get(row.name, "")) for row in rows]
    if error <= tolerance:  # else all is wrong, and not what is small
        problems += [f"{kind} {name} {fault}" for name, fault in faults.items() if fault]
    return rows, error, problems


def _fault(found: _Figures, allowed: float, names: tuple[str, str]) -> str:
    """Say in what a tensor differs by more than is allowed."""
    error, a, b = found.error, found.norm_a, found.norm_b
    if error <= allowed:
        return ""
    for norm, other, (here, there) in ((a, b, names), (b, a, names[::-1])):
        if norm == 0:
            return f"is zero in {here}, and of norm {other:.3g} in {there}"
    # ‖a + b‖² = 2‖a‖² + 2‖b‖² − ‖a − b‖²
    if 2 * a * a + 2 * b * b - error * error <= 0.01 * b * b:
        return f"has another sign in {names[0]} than in {names[1]}"
    return f"differs by {error / b:.1e} of itself"


def _measure_steps(
    a: Sequence[Stage] | None, b: Sequence[Stage] | None, names: tuple[str, str]
) -> tuple[tuple[StepRow, ...], list[str]]:
    if a is None or b is None:
        return (), []
    unlike = [(x.name, y.name) for x, y in zip(a, b, strict=False) if x.name != y.name]
    if unlike:
        return (), [f"{names[0]} has {unlike[0][0]} where {names[1]} has {unlike[0][1]}: not the same program"]
    if len(a) != len(b):
        return (), [f"{names[0]} has {len(a)} stages and {names[1]} has {len(b)}: not the same program"]
    rows = []
    for x, y in zip(a, b, strict=True):
        block = " / ".join(dict.fromkeys(name for name in (x.block, y.block) if name))
        backward = None if x.gradients is None or y.gradients is None else _error(x.gradients, y.gradients)
        rows.append(StepRow(f"{x.name} of {block}" if block else x.name, _error(x.streams, y.streams), backward))
    return tuple(rows), []


def _error(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Return ``‖a − b‖ / ‖b‖`` over streams, infinite if they cannot be compared."""
    a, b = ([_shaped(array) for array in side] for side in (a, b))
    if [tuple(x.shape) for x in a] != [tuple(y.shape) for y in b]:
        return math.inf
    figures = [_figures(x, y) for x, y in zip(a, b, strict=True)]
    if not all(all(f.finite) for f in figures):
        return math.inf
    return _ratio(math.hypot(*(f.error for f in figures)), math.hypot(*(f.norm_b for f in figures)))


def _shaped(array: Any) -> Any:
    return array if hasattr(array, "shape") else to_numpy(array)


class _Figures(NamedTuple):
    error: float
    norm_a: float
    norm_b: float
    finite: tuple[bool, bool]
    size: int


def _figures(a: Any, b: Any) -> _Figures:
    """Measure two arrays of one shape where they lie: on one device by DLPack, so that only these figures travel."""
    size = math.prod(a.shape)
    together = on_one_device(a, b)
    namespace, a, b = together or (np, to_numpy(a), to_numpy(b))
    # JAX without x64 would halve them; NumPy and torch need no such leave
    leave = sys.modules["jax"].enable_x64(True) if namespace.__name__ == "jax.numpy" else contextlib.nullcontext()
    with leave:
        # float64 holds the sum of squares of any narrower dtype, and the difference of any two
        wide = namespace.complex128 if any("complex" in str(x.dtype) for x in (a, b)) else namespace.float64
        a, b = (x.to(wide) if hasattr(x, "to") else x.astype(wide, copy=False) for x in (a, b))
        finite = bool(namespace.isfinite(a).all()), bool(namespace.isfinite(b).all())
        if not all(finite):
            return _Figures(math.nan, math.nan, math.nan, finite, size)
        error, *norms = (float((abs(x) ** 2).sum()) ** 0.5 for x in (a - b, a, b))
        return _Figures(error, norms[0], norms[1], finite, size)


def _check(depth: Any, dtype: Any) -> None:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise SpecError(f"depth came as {depth!r}, but must be a whole number of at least 1")
    if not isinstance(dtype, str) or dtype not in EPS:
        raise SpecError(f"dtype came as {dtype!r}, expected one of {', '.join(map(repr, EPS))}")


def _ratio(error: float, norm: float) -> float:
    """``error / norm``, where 0/0 is 0 and not NaN: an error of exactly nothing."""
    return 0.0 if error == 0 else error / norm if norm else math.inf


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value
