"""The laws a coupling must keep, proved on random values, with figures.

1. ``inverse(forward(x, f), f) == x``, to rounding.
2. ``vjp`` is the derivative of ``forward`` (against the complex step, or central differences where a coupling is
   not analytic).
3. ``y`` has the dtype and shape of ``x``.

And one figure: by how much a single inverse step amplifies an error in ``y``, which bounds the depth a dtype carries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from revcore.coupling import Additive, Coupling
from revcore.errors import SpecError

_DTYPES = ("float64", "float32", "float16")
# Rounding errors of a handful of operations; a wrong law is off by many orders more in float64.
_ROUNDINGS = 32


@dataclass(frozen=True)
class CouplingReport:
    """What :func:`check_coupling` measured.

    Attributes:
        name: the coupling.
        round_trip: relative error of ``inverse(forward(x, f), f)`` by dtype.
        amplification: how much one inverse step grows an error in ``y`` (1 for additive, ``1/β`` for momentum).
        vjp_error: relative error of ``vjp`` against the derivative of ``forward``; ``None`` where the coupling
            leaves its derivative to the backend.

    >>> import revcore
    >>> report = revcore.check_coupling(revcore.Momentum(0.5))
    >>> report.ok, report.amplification, sorted(report.round_trip)
    (True, 2.0, ['float16', 'float32', 'float64'])
    """

    name: str
    round_trip: dict[str, float]
    amplification: float
    vjp_error: float | None

    @property
    def ok(self) -> bool:
        """True, for a report exists only for a coupling that keeps the laws."""
        return True

    def __str__(self) -> str:
        lines = [f"{self.name}: a coupling with a true inverse"]
        lines += [f"  round trip in {dtype:8} {error:.1e}" for dtype, error in self.round_trip.items()]
        lines.append(f"  error of one inverse step grows by {self.amplification:.3g}")
        lines.append("  vjp left to autodiff" if self.vjp_error is None else f"  vjp error {self.vjp_error:.1e}")
        return "\n".join(lines)


@dataclass(frozen=True)
class InverseReport:
    """What a backend's ``check_inverse`` measured, one entry for each step, from the input to the output.

    Attributes:
        steps: the kind of each primitive step, in running order.
        local: relative error of a step's input, rebuilt from its exact output.
        drift: relative error of a step's input, rebuilt on a walk back from the network's output (or from the next
            anchor, whose input is kept).

    >>> report = InverseReport(("Couple", "Couple"), (1e-7, 0.0), (3e-7, 1e-7))
    >>> report.worst
    3e-07
    >>> print(report)
     step                 local     drift
        0  Couple       1.0e-07   3.0e-07
        1  Couple       0.0e+00   1.0e-07
    """

    steps: tuple[str, ...]
    local: tuple[float, ...]
    drift: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The largest error of any rebuilt input; NaN if one is."""
        return float(np.max(self.drift, initial=0.0))

    def __str__(self) -> str:
        rows = zip(self.steps, self.local, self.drift, strict=True)
        lines = [f"{i:5}  {step:9}  {local:9.1e} {drift:9.1e}" for i, (step, local, drift) in enumerate(rows)]
        return "\n".join([f"{'step':>5}  {'':9}  {'local':>9} {'drift':>9}", *lines])


def relative_error(got: Sequence[Any], expected: Sequence[Any]) -> float:
    """Return ``‖got − expected‖ / ‖expected‖`` (L2) over all arrays together; NaN if any is.

    >>> relative_error([np.array([3.0, 5.0])], [np.array([3.0, 4.0])])
    0.2
    """
    wide = [(np.asarray(a, np.complex128), np.asarray(b, np.complex128)) for a, b in zip(got, expected, strict=True)]
    off = sum(float(np.sum(np.abs(a - b) ** 2)) for a, b in wide)
    size = sum(float(np.sum(np.abs(b) ** 2)) for _, b in wide)
    return float(np.sqrt(np.divide(off, size))) if off else 0.0


def check_coupling(
    coupling: Coupling,
    *,
    shape: tuple[int, ...] = (64,),
    asarray: Callable[[np.ndarray], Any] | None = None,
    seed: int = 0,
) -> CouplingReport:
    """Prove on random values in float64, float32 and float16 that ``coupling`` keeps its laws (see the module).

    Args:
        coupling: the coupling to check.
        shape: the shape of the random ``x`` and ``f``; give a real one where the coupling holds arrays.
        asarray: makes the library's array of a NumPy array (``torch.from_numpy``, ``jax.numpy.asarray``), for a
            coupling whose functions work on that library's arrays only.
        seed: of a generator of its own; no global random state is touched.

    Returns:
        The figures. A coupling that breaks a law raises instead.

    Raises:
        SpecError: a law does not hold; the message gives the size of the error and, where ``forward`` is linear in
            ``x``, the right inverse.

    >>> print(check_coupling(Coupling.from_functions(lambda x, f: 2 * x + f, lambda y, f: (y - f) / 2)).amplification)
    0.5
    >>> check_coupling(Coupling.from_functions(
    ...     lambda x, f: x * 0.9 + f * (1 - 0.9), lambda y, f: y / 0.9 - f * (1 - 0.9)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    revcore.SpecError: FunctionCoupling: inverse(forward(x, f), f) is off by 1.0e-02 of x in float64 (rounding would \
explain ...). forward is y = 0.9·x + 0.1·f, whose inverse is x = (y - 0.1·f) / 0.9
    """
    if not isinstance(coupling, Coupling):
        raise SpecError(
            f"check_coupling: came {coupling!r}, expected a revcore.Coupling: Coupling.from_functions(f, g)"
        )
    probe = _Probe(coupling, shape, asarray or (lambda a: a), np.random.default_rng(seed))
    amplification = probe.amplification()
    round_trip = {}
    for dtype in _DTYPES:
        x, f = probe.draw(dtype)
        if x.dtype.name != dtype:  # the library has no such dtype switched on (JAX's float64)
            continue
        error, scale = probe.round_trip(x, f)
        allowed = _ROUNDINGS * np.finfo(dtype).eps * max(1.0, amplification) * scale
        if not error <= allowed:
            raise SpecError(
                f"{probe.name}: inverse(forward(x, f), f) is off by {error:.1e} of x in {dtype} (rounding would "
                f"explain {allowed:.1e}). {probe.right_inverse()}"
            )
        round_trip[dtype] = error
    return CouplingReport(probe.name, round_trip, amplification, probe.check_vjp())


def couplings_from_functions(forward: Any, inverse: Any, asarray: Callable[[np.ndarray], Any]) -> tuple[Coupling, ...]:
    """Pair ``coupling_forward`` with ``coupling_inverse`` (functions, or lists of one length), and prove each pair.

    ``None`` in the place of both is the additive coupling.

    Raises:
        SpecError: lists of different lengths, a function that is none, a pair that breaks a law.

    >>> len(couplings_from_functions(lambda x, f: x + f, lambda y, f: y - f, np.asarray))
    1
    """
    forwards, inverses = (list(f) if isinstance(f, (list, tuple)) else [f] for f in (forward, inverse))
    if len(forwards) != len(inverses):
        raise SpecError(
            f"{len(forwards)} coupling_forward and {len(inverses)} coupling_inverse came, expected as many of one as "
            "of the other: they are used in pairs"
        )
    couplings = tuple(
        Additive() if pair == (None, None) else Coupling.from_functions(*pair)
        for pair in zip(forwards, inverses, strict=True)
    )
    for coupling in couplings:
        try:
            check_coupling(coupling, asarray=asarray)
        except SpecError:
            raise
        except Exception as error:  # whatever their own code raises
            raise SpecError(
                f"coupling_forward and coupling_inverse could not be tried on arrays of shape (64,): {error}. If they "
                "hold arrays of their own, prove them by check_coupling(coupling, shape=...) and give them as "
                "coupling=Coupling.from_functions(forward, inverse)"
            ) from error
    return couplings


class _Probe:
    """One coupling on random NumPy values; arrays of another library are made and read back at its edge."""

    def __init__(self, coupling: Coupling, shape: tuple[int, ...], asarray: Callable[[Any], Any], rng: Any) -> None:
        self.coupling, self.shape, self.asarray, self.rng = coupling, shape, asarray, rng
        given = getattr(coupling, "name", None)
        self.name = type(coupling).__name__ if given is None else f"coupling {given!r}"
        # float64's, or that of the widest dtype that the library has switched on (JAX's float32)
        self.eps = float(np.finfo(np.asarray(self.asarray(np.zeros(1))).dtype).eps)

    def draw(self, dtype: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        def one() -> np.ndarray:
            return np.asarray(self.asarray(self.rng.standard_normal(self.shape).astype(dtype)))

        return one(), tuple(one() for _ in range(self.coupling.num_outputs + self.coupling.uses_source))

    def _call(self, function: Callable[..., Any], x: np.ndarray, f: tuple[np.ndarray, ...], *more: np.ndarray) -> Any:
        given = tuple(self.asarray(part) for part in f)
        return function(self.asarray(x), given[0] if len(given) == 1 else given, *map(self.asarray, more))

    def forward(self, x: np.ndarray, f: tuple[np.ndarray, ...]) -> np.ndarray:
        return _to_numpy(self._call(self.coupling.forward, x, f))

    def inverse(self, y: np.ndarray, f: tuple[np.ndarray, ...]) -> np.ndarray:
        return _to_numpy(self._call(self.coupling.inverse, y, f))

    def amplification(self) -> float:
        x, f = self.draw("float64")
        y = self.forward(x, f)
        if y.shape != x.shape or y.dtype != x.dtype:
            raise SpecError(
                f"{self.name}: forward turned x of {x.dtype}, shape {x.shape}, into {y.dtype}, shape {y.shape}: a "
                "coupling keeps the stream's dtype and shape"
            )
        if not np.isfinite(y).all():
            raise SpecError(f"{self.name}: forward gave non-finite values on standard normal x and f")
        delta = (self.eps**0.4 * self.rng.standard_normal(self.shape)).astype(y.dtype)
        moved, still = self.inverse(y + delta, f), self.inverse(y, f)
        growth = float(np.linalg.norm(moved - still) / np.linalg.norm(delta))
        return round(growth, 6 if self.eps < 1e-12 else 2)  # the digits beyond are the difference's own rounding

    def round_trip(self, x: np.ndarray, f: tuple[np.ndarray, ...]) -> tuple[float, float]:
        """Return the relative error, and the size of what was added up on the way in units of ``x``."""
        y = self.forward(x, f)
        if y.dtype != x.dtype:
            raise SpecError(
                f"{self.name}: forward turned x of {x.dtype} into {y.dtype}: a coupling keeps the stream's dtype"
            )
        back = self.inverse(y, f).astype(np.float64)
        norm = float(np.linalg.norm(x.astype(np.float64)))
        scale = sum(float(np.linalg.norm(a.astype(np.float64))) for a in (x, y, *f)) / norm
        return float(np.linalg.norm(back - x.astype(np.float64)) / norm), scale

    def right_inverse(self) -> str:
        """Say what the inverse should be, where ``forward`` is linear in ``x``."""
        x, f = self.draw("float64")
        zero, one = self.forward(np.zeros_like(x), f), self.forward(np.ones_like(x), f)
        slope, tiny = one - zero, 1e3 * self.eps
        linear = np.allclose(self.forward(x, f), slope * x + zero, rtol=tiny, atol=tiny)
        if not linear or not np.all(np.abs(slope) > tiny):
            return "forward is not linear in x, so no inverse can be proposed: check that it is one-to-one in x"
        weight = zero / f[0]
        constant = all(np.ptp(a) <= tiny * np.abs(a).max() for a in (slope, weight))
        if len(f) == 1 and constant:
            a, c = (f"{float(np.median(v)):.6g}" for v in (slope, weight))
            return f"forward is y = {a}·x + {c}·f, whose inverse is x = (y - {c}·f) / {a}"
        return "forward is linear in x, so its inverse is x = (y - forward(0, f)) / (forward(1, f) - forward(0, f))"

    def check_vjp(self) -> float | None:
        x, f = self.draw("float64")
        gy = self.rng.standard_normal(self.shape)
        pulled = self._call(self.coupling.vjp, x, f, gy)
        if pulled is NotImplemented:
            return None
        gx, gf = pulled
        grads = [_to_numpy(g) for g in (gx, *(gf if isinstance(gf, tuple) else (gf,)))]
        worst = 0.0
        for which, name in enumerate(("x", *(f"f[{i}]" for i in range(len(f))))):
            direction = self.rng.standard_normal(self.shape)
            derivative, exact = self._derivative(x, f, which, direction)
            expected, got = float((gy * derivative).sum()), float((grads[which] * direction).sum())
            scale = float(np.linalg.norm(gy) * np.linalg.norm(derivative)) or 1.0
            error = abs(got - expected) / scale
            if not error <= (512 * self.eps if exact else 32 * self.eps ** (2 / 3)) * np.sqrt(gy.size):
                raise SpecError(
                    f"{self.name}: vjp's gradient of {name} gives {got:.6g} along a random direction, but forward's "
                    f"derivative there is {expected:.6g} (off by {error:.1e}): vjp(x, f, gy) must return the "
                    "gradients of sum(gy·forward(x, f))"
                )
            worst = max(worst, error)
        return worst

    def _derivative(self, x: Any, f: Any, which: int, direction: Any) -> tuple[np.ndarray, bool]:
        """Return the derivative of ``forward`` along ``direction`` in one argument, and whether it is exact."""

        def moved(step: Any) -> np.ndarray:
            arrays = [x, *f]
            arrays[which] = arrays[which] + step * direction.astype(x.dtype)
            return self.forward(arrays[0], tuple(arrays[1:]))

        try:
            result = np.imag(moved(1e-20j)) / 1e-20
            if np.isfinite(result).all() and np.any(result):
                return result, True
        except (TypeError, ValueError, RuntimeError, NotImplementedError):
            pass  # the coupling does not take complex arrays
        h = self.eps ** (1 / 3)  # where the rounding of the difference and its truncation weigh the same
        return (moved(h) - moved(-h)) / (2 * h), False


def _to_numpy(array: Any) -> np.ndarray:
    return np.asarray(array.detach() if hasattr(array, "detach") else array)
