"""Drift: how far what a backward pass rebuilds is from what was there, predicted from the program and its dtype alone.

Each inverse ``x = (y − c·f(z) − m·z)/a`` hands on the errors of ``y`` and ``z``, divided by ``a``, and adds its own
rounding. :func:`amplification` follows their covariance from the last step to the first; no array is needed.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from revcore.coupling import Affine, Coupling, LinearCoupling
from revcore.errors import SpecError
from revcore.exact import Exact
from revcore.policy import MemoryBudget, Policy, Reverse, check_policy, segments
from revcore.program import Program
from revcore.step import Anchor, Bijection, Couple, Permute, Primitive, SpaceToDepth

EPS = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "complex128": 2.0**-52,
    "complex64": 2.0**-23,
}
"""The distance from 1 to the next number, by dtype."""

NOTE, WARN, ERROR = 1e-4, 1e-2, 1e-1
"""From which gradient error on a report's level is ``"note"``, ``"warn"``, ``"error"``."""

# Rounding to nearest errs by 0.21·eps·|v| in the root mean square, over all mantissas.
_ROUNDING = 0.21
# Measured (benchmarks/drift.py). A block that runs again on another input rounds otherwise inside, by so many eps of
# its output; and its gradient is off by so much of its input's error, and by so many eps.
_INSIDE = 0.7
_GRADIENT, _LAST_DIGITS = 1.2, 0.6
# A block that returns 1 changes by so much of its input's relative change: a pre-LN MLP with GELU.
_GAIN = 1.1
# A block narrower than its stream: the mean square of what turns over, in units of eps·(error of the input).
_FLIPS = 0.5
# Affine's log scale from the program alone, root mean square.
_LOG_SCALE = 0.05

Level = Literal["fine", "note", "warn", "error"]


class DriftWarning(UserWarning):
    """Gradients are predicted to be off by more than 1 %, because rebuilt activations are.

    >>> issubclass(DriftWarning, UserWarning)
    True
    """

    __module__ = "revcore"


@dataclass(frozen=True)
class DriftReport:
    """Relative errors (L2) of what a backward pass rebuilds, and of the gradients made of it.

    Attributes:
        steps: the kind of each primitive step, in running order.
        reconstruction: by step, of the streams before it, all together; 0 where they are kept.
        blocks: by block, the step that calls it.
        gradient: by block, of its parameters' gradient, beside the rounding that an ordinary network has as well. An
            error of 1 or more says that nothing is left of the gradient, not how large it is.
        dtype: of the streams.
        block_dtype: in which the blocks compute.
        measured: whether ``reconstruction`` was measured; ``gradient`` is made of it by the predictor's rule.
        remedy: what to write instead, where :attr:`level` is ``"warn"`` or ``"error"``; else empty.

    >>> import revcore
    >>> report = revcore.amplification(revcore.revnet(16, revcore.Additive()), "bfloat16")
    >>> report.level, report.blocks == tuple(range(16)), report.worst == report.gradient[0]
    ('warn', True, True)
    """

    steps: tuple[str, ...]
    reconstruction: tuple[float, ...]
    blocks: tuple[int, ...]
    gradient: tuple[float, ...]
    dtype: str
    block_dtype: str
    measured: bool = False
    remedy: str = ""

    @property
    def A(self) -> float:
        """The largest reconstruction error in units of the streams' ``eps``."""
        return max(self.reconstruction, default=0.0) / EPS[self.dtype]

    @property
    def worst(self) -> float:
        """The largest gradient error of any block. The error over all blocks together would hide broken early ones."""
        return max(self.gradient, default=0.0)

    @property
    def level(self) -> Level:
        """``"fine"``; ``"note"`` above 1e-4, ``"warn"`` above 1e-2, ``"error"`` above 1e-1, or not finite."""
        if not self.worst <= ERROR:
            return "error"
        return "warn" if self.worst > WARN else "note" if self.worst > NOTE else "fine"

    def __str__(self) -> str:
        gradient = dict(zip(self.blocks, self.gradient, strict=True))
        every = -(-len(self.steps) // 16) or 1  # a deep network's errors change little from step to step
        lines = [f"{'step':>5}  {'':9}  {'rebuilt':>9} {'gradient':>9}"]
        for i in range(0, len(self.steps), every):
            off = f"{gradient[i]:9.1e}" if i in gradient else ""
            lines.append(f"{i:5}  {self.steps[i]:9}  {self.reconstruction[i]:9.1e} {off:>9}".rstrip())
        how = "measured" if self.measured else "predicted"
        lines.append(f"{how}, {self.dtype}, blocks in {self.block_dtype}: {self.level}")
        return "\n".join([*lines, *([self.remedy] if self.remedy else [])])


def amplification(
    program: Program,
    dtype: Any = "float32",
    *,
    block_dtype: Any = None,
    policy: Policy = Reverse(),  # noqa: B008 - frozen
    rms: Sequence[Sequence[float]] | None = None,
    gain: Sequence[float] | None = None,
    asarray: Callable[[Any], Any] | None = None,
) -> DriftReport:
    """Predict the error of rebuilt activations, and of the gradients made of them, from program, depth and dtype.

    For ``y = a·x + c·f(z) + m·z`` the covariance ``P`` of the streams' errors goes back step by step, from 0 where
    streams are kept::

        P_xx = (P_yy − 2m·P_yz + m²·P_zz + c²·κ²·(P_zz + flips) + ρ²·(r_y² + a²·r_x² + [a ≠ 1]·r_y²)) / a²

    with ``ρ = 0.21·eps``, streams of root mean square ``r``, and ``κ = 1/r_z``, the gain of a block that normalises
    its input and keeps its size. Blocks narrower than their streams (``block_dtype``) round what they are given, and an
    error too small for that dtype sometimes turns one such rounding over: ``flips``, an upper estimate.

    Args:
        program: what is run.
        dtype: of the streams: a name, or a dtype of NumPy, torch or JAX.
        block_dtype: in which the blocks compute; ``dtype`` by default.
        policy: what is kept: rebuilding begins anew at an anchor; nothing is rebuilt in what is stored or checkpointed.
        rms: measured: one row for each step and one for the end, each with every stream's root mean square there.
            By default followed through the program, from 1 and blocks that return 1.
        gain: measured: for each block ``κ``, how much larger (root mean square) a small change of its sources comes out
            of it; for a coupling that is not linear, out of the coupling.
        asarray: makes the library's array of a NumPy array, for couplings whose functions take no other (as for
            :func:`revcore.check_coupling`).

    Returns:
        Relative errors by step and by block.

    Raises:
        SpecError: an unknown dtype, figures of the wrong number, a coupling that cannot be tried on random values.

    >>> import revcore
    >>> [f"{revcore.amplification(revcore.revnet(64, c)).worst:.0e}" for c in (None, revcore.Momentum(0.5))]
    ['6e-06', '2e+06']
    >>> revcore.amplification(revcore.revnet(64), "bfloat16").level
    'error'
    """
    name, inner = dtype_name(dtype), dtype_name(block_dtype if block_dtype is not None else dtype)
    steps, policy = program.unrolled, check_policy(policy)
    if isinstance(policy, MemoryBudget):
        raise SpecError("amplification: a MemoryBudget chooses for a model at hand: give the policy of each step")
    blocks = tuple(i for i, step in enumerate(steps) if step.block)
    for what, figures, count in (("rms", rms, len(steps) + 1), ("gain", gain, len(blocks))):
        if figures is not None and len(figures) != count:
            raise SpecError(f"amplification: {what} came with {len(figures)} entries, expected {count}")
    names = tuple(type(step).__name__ for step in steps)
    if program.lattice is not None:
        return DriftReport(names, (0.0,) * len(steps), blocks, (0.0,) * len(blocks), name, inner)
    algebra = [_algebra(step.coupling, asarray) if isinstance(step, Couple) else None for step in steps]
    sizes = _sizes(program, algebra) if rms is None else [[float(r) ** 2 for r in row] for row in rms]
    gains = dict(zip(blocks, gain, strict=True)) if gain is not None else {}
    walk = _Walk(EPS[name], EPS[inner], program.num_streams)
    reconstruction, seen = [0.0] * len(steps), [0.0] * len(steps)
    for segment in segments([not isinstance(step, Anchor) for step in steps], policy):
        walk.start()
        for i in reversed(range(segment.start, segment.stop if segment.kind == "reverse" else segment.start)):
            seen[i] = walk.back(steps[i], algebra[i], sizes[i], sizes[i + 1], gains.get(i))
            reconstruction[i] = _ratio(sum(walk.errors()), sum(sizes[i]))
    gradient = tuple(_gradient(seen[i], inner) for i in blocks)
    return DriftReport(names, tuple(reconstruction), blocks, gradient, name, inner)


def remedy(program: Program, dtype: str, policy: Policy, asarray: Callable[[Any], Any] | None = None) -> str:
    """Return what to write instead of a program that drifts under this policy, each with its predicted error.

    >>> import revcore
    >>> print(remedy(revcore.revnet(64), "bfloat16", Reverse()))
    float32 streams (blocks may stay in bfloat16; predicted 6e-06); policy=Reverse(anchor_every=2) (predicted 6e-03); \
float32 streams and program.exact() (no error)
    """

    def foreseen(dtype: str, policy: Policy) -> float:
        return amplification(program, dtype, policy=policy, asarray=asarray).worst

    found = []
    narrow = EPS[dtype] > EPS["float32"]
    if narrow and (error := foreseen("float32", policy)) <= WARN:
        found.append(f"float32 streams (blocks may stay in {dtype}; predicted {error:.0e})")
    base = policy if isinstance(policy, Reverse) else Reverse()
    every = base.anchor_every or len(program.unrolled)
    for k in (2**p for p in reversed(range(every.bit_length()))):
        if k < every and (error := foreseen(dtype, replace(base, anchor_every=k))) <= WARN:
            found.append(f"policy=Reverse(anchor_every={k}) (predicted {error:.0e})")
            break
    with contextlib.suppress(SpecError):  # a coupling that cannot be exact
        program.exact()
        found.append(f"{'float32 streams and ' if narrow else ''}program.exact() (no error)")
    return "; ".join(found) or "policy=StoreAll() or Checkpoint()"


def foresee(
    program: Program, dtypes: Sequence[Any], policy: Policy, asarray: Callable[[Any], Any] | None = None
) -> str | None:
    """Return the words of a :class:`DriftWarning`, or ``None``: for engines, which ask at every call.

    An answer is noted at the program. A coupling that nobody can predict gets no warning.
    """
    noted = program.__dict__.setdefault("_foreseen", {})
    key = (tuple(dtypes), policy)
    if key not in noted:
        noted[key] = _words(program, dtypes, policy, asarray)
    return noted[key]


def _words(program: Program, dtypes: Sequence[Any], policy: Policy, asarray: Callable[[Any], Any] | None) -> str | None:
    try:
        dtype = max(map(dtype_name, dtypes), key=EPS.__getitem__)
        report = amplification(program, dtype, policy=policy, asarray=asarray)
    except SpecError:
        return None
    if report.worst <= WARN:
        return None
    block = max(range(len(report.gradient)), key=report.gradient.__getitem__)
    return (
        f"this program of {len(report.steps)} steps, run back in {dtype}, is predicted to rebuild its streams with a "
        f"relative error of {_size(max(report.reconstruction))}, and to give block {block} a gradient with one of "
        f"{_size(report.worst)}. Instead: {remedy(program, dtype, policy, asarray)}. By step: "
        f"revcore.amplification(program, {dtype!r}); docs/numerics.md says more"
    )


def _size(error: float) -> str:
    return f"{error:.0e}" if error < 1 else "1 or more"


_warned: set[Any] = set()


def warn_of_drift(program: Program, dtypes: Sequence[Any], policy: Policy, words: str) -> None:
    """Warn at the line that called the library, once for equal programs, dtypes and policies."""
    key = (program, tuple(dtypes), policy)
    if key in _warned:
        return
    _warned.add(key)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(words, DriftWarning, stacklevel=level)


_LIBRARIES = {"revcore", "revcore_torch", "revcore_jax", "torch", "jax", "flax", "contextlib"}


def _gradient(seen: float, dtype: str) -> float:
    """Return a block's gradient error, given the relative error of its input."""
    return math.hypot(_GRADIENT * seen, _LAST_DIGITS * EPS[dtype]) if seen else 0.0


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of any library.

    >>> import numpy
    >>> dtype_name(numpy.float32), dtype_name(numpy.dtype("float16"))
    ('float32', 'float16')
    """
    name = str(getattr(dtype, "__name__", dtype)).removeprefix("torch.")
    if name not in EPS:
        raise SpecError(f"dtype came as {dtype!r}, expected one of {', '.join(EPS)}")
    return name


@dataclass(frozen=True)
class _Algebra:
    """A coupling ``y = keep·x + push·f + direct·z`` and its inverse ``x = back·(y − direct·z) + pull·f``, for errors.

    ``scaled`` is the part of ``f``'s error in ``x`` that grows with ``x`` itself; ``linear`` tells whether ``f`` is the
    block's output alone.
    """

    keep: float
    back: float
    direct: float
    push: float
    pull: float
    scaled: float = 0.0
    linear: bool = True


@lru_cache(maxsize=256)
def _algebra(coupling: Coupling, asarray: Callable[[Any], Any] | None) -> _Algebra:
    if isinstance(coupling, Exact):
        coupling = coupling.coupling
    if isinstance(coupling, Affine):
        grown = math.exp(_LOG_SCALE**2)
        return _Algebra(grown, grown, 0.0, 1.0, grown, _LOG_SCALE, linear=False)
    if isinstance(coupling, LinearCoupling):
        a = coupling.rate
        try:
            if coupling.uses_source:
                c, m = coupling.push((1.0, 0.0)), coupling.push((0.0, 1.0))
            else:
                c, m = coupling.push(1.0), 0.0
            return _Algebra(a, 1 / a, m, c, c / a)
        except (TypeError, AttributeError):
            pass  # a push that takes arrays only
    return _tried(coupling, asarray or (lambda a: a))


def _tried(coupling: Coupling, asarray: Callable[[Any], Any]) -> _Algebra:
    """Return a coupling's figures as measured on random values."""
    import numpy as np

    rng, count = np.random.default_rng(0), coupling.num_outputs + coupling.uses_source
    x, *f = (rng.standard_normal(256) for _ in range(1 + count))

    def call(function: Callable[[Any, Any], Any], x: Any, f: Sequence[Any]) -> Any:
        parts = tuple(asarray(part) for part in f)
        out = function(asarray(x), parts[0] if len(parts) == 1 else parts)
        return np.asarray(out.detach() if hasattr(out, "detach") else out, np.float64)

    def rms(values: Any) -> float:
        return float(np.sqrt(np.mean(values**2)))

    try:
        delta = 1e-3 * rng.standard_normal(256)
        y = call(coupling.forward, x, f)
        keep = (call(coupling.forward, x + delta, f) - y) / 1e-3
        back = (call(coupling.inverse, y + delta, f) - call(coupling.inverse, y, f)) / 1e-3
        moved = [[*f[:i], part + delta, *f[i + 1 :]] for i, part in enumerate(f)]
        push = [rms(call(coupling.forward, x, g) - y) / 1e-3 for g in moved]
        pull = [rms(call(coupling.inverse, y, g) - call(coupling.inverse, y, f)) / 1e-3 for g in moved]
    except Exception as error:  # whatever their own code raises
        raise SpecError(
            f"amplification: {coupling!r} could not be tried on arrays of shape (256,): {error}. Give asarray= if it "
            "takes one library's arrays alone; measure with check_inverse if it holds arrays of its own"
        ) from error
    sign = math.copysign(1.0, float(np.sum(back * delta)))
    return _Algebra(sign * rms(keep), sign * rms(back), 0.0, math.hypot(*push), math.hypot(*pull), linear=False)


def _sizes(program: Program, algebra: Sequence[_Algebra | None]) -> list[list[float]]:
    """Return every stream's mean square before each step, and at the end."""
    n = program.num_streams
    start = [0.0] * (n - 1) + [1.0] if program.split == "zeros" else [1.0] * n
    alike = program.split == "copy"
    Q = [[start[i] if i == j or alike else 0.0 for j in range(n)] for i in range(n)]
    sizes = [[Q[i][i] for i in range(n)]]
    for step, figures in zip(program.unrolled, algebra, strict=True):
        if isinstance(step, Couple):
            assert figures is not None
            t = step.target
            direct = figures.direct if step.block else figures.push
            row = [figures.keep * Q[t][j] + direct * sum(Q[s][j] for s in step.sources) for j in range(n)]
            mean = figures.keep * row[t] + direct * sum(row[s] for s in step.sources)
            _put(Q, t, row, mean + (figures.push**2 if step.block else 0.0))
        elif isinstance(step.forward if isinstance(step, Bijection) else None, Permute):
            Q = _permuted(Q, step.forward.order)  # type: ignore[union-attr]
        sizes.append([Q[i][i] for i in range(n)])
    return sizes


class _Walk:
    """The covariance of the streams' errors on the way back."""

    def __init__(self, eps: float, block_eps: float, num_streams: int) -> None:
        self.noise, self.block_eps, self.num_streams = (_ROUNDING * eps) ** 2, block_eps, num_streams
        self.narrow = block_eps > eps
        self.start()

    def start(self) -> None:
        """Begin where the streams are kept."""
        self.P = [[0.0] * self.num_streams for _ in range(self.num_streams)]

    def errors(self) -> list[float]:
        """Return every stream's mean square error."""
        return [self.P[i][i] for i in range(self.num_streams)]

    def back(
        self,
        step: Primitive,
        figures: _Algebra | None,
        before: Sequence[float],
        after: Sequence[float],
        gain: float | None,
    ) -> float:
        """Go back through a step; return the relative error of what its gradient is made of."""
        if isinstance(step, Bijection):
            if isinstance(step.forward, Permute):
                self.P = _permuted(self.P, step.forward.inverted().order)
            elif not isinstance(step.forward, SpaceToDepth):  # taken to keep the size of errors, and to round twice
                for i in range(self.num_streams):
                    self.P[i][i] += 2 * self.noise * before[i]
            return _ratio(sum(self.errors()), sum(before))
        assert isinstance(step, Couple)
        assert figures is not None
        P, t, sources = self.P, step.target, step.sources
        seen, size = sum(P[i][j] for i in sources for j in sources), sum(before[s] for s in sources)
        if step.combine == "args":
            seen = sum(P[s][s] for s in sources)
        direct = figures.direct if step.block else figures.push
        # linear in the errors of y and z, whose covariance is known
        row = [figures.back * (P[t][j] - direct * sum(P[s][j] for s in sources)) for j in range(self.num_streams)]
        mean = figures.back * (row[t] - direct * sum(row[s] for s in sources))
        if step.block:
            mean += self._through(figures, seen, size, before[t], gain)
        mean += self.noise * (before[t] + after[t] * figures.back**2 * (1 if figures.back == 1 else 2))
        _put(P, t, row, mean)
        # a coupling that is not linear has a gradient that is made of the target as well
        return _ratio(seen, size) if figures.linear else max(_ratio(seen, size), _ratio(mean, before[t]))

    def _through(self, figures: _Algebra, seen: float, size: float, target: float, gain: float | None) -> float:
        """Return the mean square error that the target gets through the block."""
        if not seen:
            return 0.0
        if self.narrow:
            seen += _FLIPS * self.block_eps * math.sqrt(seen * size)
        else:
            seen += (_INSIDE * self.block_eps) ** 2 * size
        seen = min(seen, 2 * size)  # no input, however wrong, changes a block's output by more than another output
        if gain is not None:
            return (figures.pull if figures.linear else figures.back) ** 2 * gain**2 * seen
        relative = _GAIN**2 * seen / size if size else 0.0
        return relative * (figures.pull**2 + figures.scaled**2 * target)


def _ratio(error: float, size: float) -> float:
    """Return the relative error of a mean square error."""
    return math.sqrt(error / size) if size else 0.0


def _put(matrix: list[list[float]], t: int, row: Sequence[float], mean: float) -> None:
    for j, value in enumerate(row):
        matrix[t][j] = matrix[j][t] = value
    matrix[t][t] = mean


def _permuted(matrix: list[list[float]], order: Sequence[int]) -> list[list[float]]:
    return [[matrix[i][j] for j in order] for i in order]


def report_of(program: Program, errors: Sequence[float], dtype: str, policy: Policy) -> DriftReport:
    """Return measured reconstruction errors as a report; gradient errors follow from them by the predictor's rule."""
    steps = program.unrolled
    blocks = tuple(i for i, step in enumerate(steps) if step.block)
    # what a block is given when its step is undone is what was rebuilt before: the streams after the step
    after = (*errors[1:], 0.0)
    gradient = tuple(_gradient(after[i], dtype) if errors[i] else 0.0 for i in blocks)
    names = tuple(type(step).__name__ for step in steps)
    report = DriftReport(names, tuple(errors), blocks, gradient, dtype, dtype, measured=True)
    return replace(report, remedy=remedy(program, dtype, policy)) if report.worst > WARN else report
