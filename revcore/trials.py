"""The trials of :func:`revcore.check_coupling`: one coupling, on values drawn by NumPy, with the arrays of one library.

Each law stands in a method of its own. What they demand is in the docstring of ``check_coupling``.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from revcore.arrays import array_namespace, as_type
from revcore.coupling import Coupling
from revcore.errors import SpecError
from revcore.parity import to_numpy

# Rounding errors of a handful of operations; a wrong law is off by many orders more in float64.
_ROUNDINGS = 32
# in 16 bits each is so large that as many would hide a fault of a tenth
_NARROW_ROUNDINGS = 8
# An exponent's rounding grows with the logarithm of the number: x ** (1/3) of 1e-231 is off by a hundred eps.
_OF_EXTREMES, _OF_NARROW_EXTREMES = 32, 4
_SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 5), (2, 1, 3, 5))
_CALLS = 3  # again, after the first: what comes every second or third time shows


class _Range(NamedTuple):
    """What a dtype holds: the spacing above 1, the largest number, the smallest of full precision."""

    eps: float
    largest: float
    smallest: float


def _range_of(dtype: str) -> _Range:
    if dtype == "bfloat16":  # of which NumPy knows nothing
        return _Range(2.0**-7, 2.0**128 * (1 - 2.0**-8), 2.0**-126)
    found = np.finfo(dtype)
    return _Range(float(found.eps), float(found.max), float(found.smallest_normal))


class _RoundTrip(NamedTuple):
    """An ``x``, what ``inverse`` made of it, and how far the two may be apart; all on the host."""

    x: np.ndarray
    back: np.ndarray
    error: float
    allowed: float


class _Demand(NamedTuple):
    """What a round trip is asked: where it is made, whether with values far from 1, whether to allow the rounding of
    numbers around 1, too; and whether ``y`` tells one ``x`` from another, where the inverse may not have a pole.
    """

    where: str = ""
    extreme: bool = False
    absolute: bool = False
    told: Any = True


_USUAL = _Demand()


class Trials:
    """One coupling under trial."""

    def __init__(
        self, coupling: Coupling, shape: tuple[int, ...] | None, asarray: Callable[[Any], Any], rng: np.random.Generator
    ) -> None:
        self.coupling, self.asarray, self.rng = coupling, asarray, rng
        self.shape, self.others = ((64,), _SHAPES) if shape is None else (shape, ())
        given = getattr(coupling, "name", None)
        self.name = type(coupling).__name__ if given is None else f"coupling {given!r}"
        self.lattice = getattr(coupling, "lattice", None)
        # float64, or the widest that the library has switched on (JAX's float32)
        self.wide = _name(self.asarray(np.zeros(1)))
        self.eps = _range_of(self.wide).eps

    def run_first(self) -> tuple[float, dict[str, float]]:
        """Try the laws on normal values; return the amplification, and the relative error of a round trip by dtype."""
        amplification = self.amplification()
        self.check_repeats()
        round_trip = {}
        for dtype in ("float64", "float32", "float16"):
            self._try(dtype, round_trip)
        return amplification, round_trip

    def _try(self, dtype: str, round_trip: dict[str, float]) -> None:
        """Note the error of a round trip, where the library has the dtype and normal values stay in its range."""
        if (drawn := self.draw(dtype)) is not None and np.isfinite(_host(self.forward(*drawn)[0])).all():
            round_trip[dtype] = self.check_round_trip(dtype, *drawn)

    def run(self) -> tuple[str, dict[str, float], float, float | None, tuple[tuple[int, ...], ...]]:
        """Return the fields of a report, or say which law does not hold."""
        amplification, round_trip = self.run_first()
        self._try("bfloat16", round_trip)
        for dtype in ("complex128", "complex64"):
            if (error := self.check_complex(dtype)) is not None:
                round_trip[dtype] = error
        for dtype in round_trip:
            if not dtype.startswith("complex"):
                self.check_sizes(dtype)
        self.check_special_values()
        vjp_error, shape = self.check_vjp(round_trip), self.shape
        return self.name, round_trip, amplification, vjp_error, (shape, *self.check_shapes())

    # --- values -------------------------------------------------------------------------------------------------------

    def normal(self, *sizes: float) -> list[np.ndarray]:
        """Return ``x`` and the arrays of ``f``, of those two sizes, in float64 on the host."""
        count = self.coupling.num_outputs + self.coupling.uses_source
        x, f = sizes or (1.0, 1.0)
        return [np.asarray(size * self.rng.standard_normal(self.shape)) for size in (x, *[f] * count)]

    def make(self, values: np.ndarray, dtype: str) -> Any:
        """Return the library's array of ``values``; ``None`` where it has no such dtype, or has not switched it on."""
        array = self.asarray(np.array(values, "float32" if dtype == "bfloat16" else dtype))
        if dtype == "bfloat16":
            namespace = array_namespace(array)
            array = as_type(array, namespace.bfloat16) if hasattr(namespace, "bfloat16") else array
        return array if _name(array) == dtype else None

    def arrays(self, values: list[np.ndarray], dtype: str) -> tuple[Any, Any] | None:
        """Return ``(x, f)`` of them as a network would hand them over: an exact coupling's stream is on its lattice."""
        made = [self.make(value, dtype) for value in values]
        if made[0] is None:
            return None
        x, *f = made
        if self.lattice is not None:
            try:
                self.lattice.check_dtype(x.dtype, "the stream")
            except SpecError:
                if dtype == self.wide:
                    raise
                return None
            # within reach of the range's end, whatever is added
            scale = min(1.0, self.lattice.limit(x.dtype) / 256)
            x, f = self.lattice.encode(x * scale), [part * scale for part in f]
        return x, f[0] if len(f) == 1 else tuple(f)

    def draw(self, dtype: str) -> tuple[Any, Any] | None:
        return self.arrays(self.normal(), dtype)

    def drawn(self) -> tuple[Any, Any]:
        """Return ``x`` and ``f`` in the widest dtype."""
        found = self.draw(self.wide)
        assert found is not None
        return found

    # --- calls --------------------------------------------------------------------------------------------------------

    def call(self, role: str, function: Callable[..., Any], *given: Any) -> Any:
        """Call one of the functions, and refuse one that writes into its arguments."""
        names = ["y" if role == "inverse" else "x", "f", "gy"]
        parts = [
            (f"{name}[{i}]" if isinstance(value, tuple) else name, part)
            for name, value in zip(names, given, strict=False)
            for i, part in enumerate(value if isinstance(value, tuple) else (value,))
        ]
        before = [_bits(part) for _, part in parts]
        result = function(*given)
        for (name, part), bits in zip(parts, before, strict=True):
            if _bits(part) != bits:
                raise SpecError(
                    f"{self.name}: {role} changed {name} in place, which is not its own (a stream that others read, or "
                    "what a block returned): write y = x + f for x += f, and clone what is changed"
                )
        return result

    def forward(self, x: Any, f: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return ``y`` and what :meth:`inverse` needs beside it."""
        y, carry = self.call("forward", self.coupling.advance, x, f)
        self._check_kept("forward", "x", y, x)
        return y, carry

    def inverse(self, y: Any, f: Any, carry: tuple[Any, ...]) -> Any:
        x, wrong = self.call("inverse", lambda y, f: self.coupling.restore(y, f, carry), y, f)
        self._check_kept("inverse", "y", x, y)
        if wrong is not None and self.lattice is not None and bool(wrong):
            raise SpecError(f"{self.name}: the stream that came back is not the one that was there, bit for bit")
        return x

    def _check_kept(self, role: str, name: str, got: Any, given: Any) -> None:
        if not hasattr(got, "dtype"):
            raise SpecError(f"{self.name}: {role} returned {type(got).__name__}, expected an array like {name}")
        if tuple(got.shape) != tuple(given.shape) or got.dtype != given.dtype:
            raise SpecError(
                f"{self.name}: {role} turned {name} of {_name(given)}, shape {tuple(given.shape)}, into {_name(got)}, "
                f"shape {tuple(got.shape)}: a coupling keeps the stream's dtype and shape"
            )

    # --- laws ---------------------------------------------------------------------------------------------------------

    def amplification(self) -> float:
        x, f = self.drawn()
        y, carry = self.forward(x, f)
        values = _host(y)
        if not np.isfinite(values).all():
            raise SpecError(f"{self.name}: forward gave non-finite values on standard normal x and f")
        if self.lattice is not None:
            return 1.0
        step = self.eps**0.4 * max(1.0, _norm(values) / max(1, values.size) ** 0.5)
        moved = self.make(values + step * self.rng.standard_normal(self.shape), self.wide)
        growth = _norm(_host(self.inverse(moved, f, carry)) - _host(self.inverse(y, f, carry)))
        digits = 7 if self.eps < 1e-12 else 3  # the digits beyond are the difference's own rounding
        return float(f"{growth / _norm(_host(moved) - values):.{digits}g}")

    def check_repeats(self) -> None:
        """Refuse state between calls: an engine calls in any order, and again in the backward pass."""
        (x, f), (other, g) = self.drawn(), self.drawn()
        first, there = self.forward(x, f), self.forward(other, g)
        back = self.inverse(first[0], f, first[1])  # after another's forward
        for _ in range(_CALLS):
            again, carry = self.forward(x, f)
            self._check_same("forward", first[0], again)
            self._check_same("inverse", back, self.inverse(again, f, carry))
            self.inverse(there[0], g, there[1])
            self._check_same("inverse", back, self.inverse(first[0], f, first[1]))

    def _check_same(self, role: str, first: Any, again: Any) -> None:
        if _bits(first) != _bits(again):
            given = {"inverse": "y and f", "vjp": "x, f and gy"}.get(role, "x and f")
            raise SpecError(
                f"{self.name}: {role} gave other numbers for the same {given} when it was called again, after calls "
                "with others. Engines call a coupling in any order, and again in the backward pass: keep nothing "
                "between calls and draw nothing; what changes from step to step belongs into the block's output"
            )

    def round_trip(self, dtype: str, x: Any, f: Any, demand: _Demand = _USUAL) -> _RoundTrip:
        """Go forward and back. What the rounding of ``y`` does to ``x`` is tried out, for an inverse may amplify."""
        y, carry = self.forward(x, f)
        back = self.inverse(y, f, carry)
        xs, ys, backs = _host(x), _host(y), _host(back)
        fs = [_host(part) for part in (f if isinstance(f, tuple) else (f,))]
        if self.lattice is not None:
            out = not np.abs(ys).max(initial=0.0) <= self.lattice.limit(y.dtype)  # which the engines refuse
            return _RoundTrip(xs, backs, 0.0 if out else _norm(backs - xs), 0.0)
        eps, _, smallest = _range_of(dtype.replace("complex128", "float64").replace("complex64", "float32"))
        sizes = sum(
            (np.nan_to_num(np.abs(a), posinf=0.0) for a in (ys, *fs)), np.full(xs.shape, float(demand.absolute))
        )
        delta = 4 * (eps * sizes + smallest) * self.rng.choice([-1.0, 1.0], self.shape)
        moved = self.make(ys + delta, dtype)
        response, shift = _host(self.inverse(moved, f, carry)) - backs, _host(moved) - ys
        felt = _norm(response[np.isfinite(response)]) / 4
        roundings = _ROUNDINGS if eps < 1e-6 else _NARROW_ROUNDINGS
        if demand.extreme:
            roundings *= _OF_EXTREMES if eps < 1e-6 else _OF_NARROW_EXTREMES
        allowed = roundings * (eps * _norm(xs[np.isfinite(xs)]) + max(eps * _norm(sizes), felt))
        pole = ~(np.abs(response) <= np.abs(shift) / eps**0.5)
        here = np.isfinite(xs) & np.isfinite(ys) & (demand.told | ~pole)
        return _RoundTrip(xs, backs, _norm((backs - xs)[here]), allowed)

    def check_round_trip(self, dtype: str, x: Any, f: Any, demand: _Demand = _USUAL) -> float:
        """Return the relative error, or refuse it."""
        found = self.round_trip(dtype, x, f, demand)
        norm = _norm(found.x)
        if not found.error <= found.allowed:
            off, explained, of = found.error, found.allowed, ""
            if norm:
                off, explained, of = off / norm, explained / norm, " of x"
            raise SpecError(
                f"{self.name}: inverse(forward(x, f), f) is off by {off:.1e}{of} in {dtype}{demand.where} (rounding "
                f"would explain {explained:.1e}). {self.right_inverse()}"
            )
        return found.error / norm if norm else 0.0

    def check_complex(self, dtype: str) -> float | None:
        """As :meth:`check_round_trip`; ``None`` for a coupling of real numbers: not linear in a complex ``x``."""
        if self.lattice is not None:
            return None
        turned = [a + 1j * b for a, b in zip(self.normal(), self.normal(), strict=True)]
        with warnings.catch_warnings(), _may_raise():
            warnings.simplefilter("ignore")  # NumPy's, of imaginary parts that are dropped
            if (drawn := self.arrays(turned, dtype)) is None:
                return None
            x, f = drawn
            quarter, zero = self.make(1j * turned[0], dtype), self.make(0 * turned[0], dtype)
            if _name(self.call("forward", self.coupling.forward, x, f)) != dtype:
                return None
            at_zero, at_one, at_i = (_host(self.forward(a, f)[0]) for a in (zero, x, quarter))
            eps = _range_of("float64" if dtype == "complex128" else "float32").eps
            if not _norm(at_i - at_zero - 1j * (at_one - at_zero)) <= 1e3 * eps * (_norm(at_one) + _norm(at_zero)):
                return None
            return self.check_round_trip(dtype, x, f)
        return None

    def check_sizes(self, dtype: str) -> None:
        """Try large, small, tiny values and zeros of ``x`` and ``f``."""
        eps, largest, smallest = _range_of(dtype)
        big, huge = (largest**0.25, largest**0.6) if self.lattice is None else (4.0, 16.0)
        for sizes in ((big, 1.0), (huge, 1.0), (1.0, big)):
            self._check_large(dtype, *sizes)
        # A coupling that goes by way of 1, such as (x + 1)·(f + 1) − 1, rounds as numbers around 1 do. One that keeps
        # eps/8 does not, and must keep what is smaller yet.
        absolute = True
        for size in (eps**0.25, eps**0.5, eps**0.75, eps / 8, smallest**0.25, smallest**0.6):
            if not smallest / eps <= size <= eps**0.25:
                continue
            if size == eps / 8:
                found = self.round_trip(dtype, *self._sized(dtype, size, size), _Demand(extreme=True))
                absolute = not found.error <= found.allowed
            self._check_small(dtype, size, size, absolute)
            self._check_small(dtype, size, 0.0, absolute)
        for sizes in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
            self._check_small(dtype, *sizes, absolute)

    def _sized(self, dtype: str, x: float, f: float) -> tuple[Any, Any]:
        drawn = self.arrays(self.normal(x, f), dtype)
        assert drawn is not None
        return drawn

    def _check_small(self, dtype: str, x: float, f: float, absolute: bool) -> None:
        drawn, where = self._sized(dtype, x, f), f" where x is of size {x:.1g} and f of size {f:.1g}"
        self.check_round_trip(dtype, *drawn, _Demand(where, extreme=True, absolute=absolute))
        if not np.isfinite(_host(self.forward(*drawn)[0])).all():
            raise SpecError(f"{self.name}: forward gave non-finite values in {dtype}{where}")

    def _check_large(self, dtype: str, x: float, f: float) -> None:
        drawn, where = self._sized(dtype, x, f), f" where x is of size {x:.1g} and f of size {f:.1g}"
        with _may_raise():  # a coupling may refuse such values by itself
            y, told = _host(self.forward(*drawn)[0]), True
            if not np.isfinite(y).all():
                return
            if self.lattice is None:
                half = _host(self.forward(drawn[0] / 2, drawn[1])[0])
                told = np.abs(y - half) > 0.1 * (np.abs(y) + max(1.0, f))
            self.check_round_trip(dtype, *drawn, _Demand(where, extreme=True, told=told))

    def check_special_values(self) -> None:
        """Refuse a NaN or infinity in ``x`` or ``f`` that comes back as another number."""
        if self.lattice is not None or not self.shape:  # the engines watch the range of exact streams
            return
        for which in range(len(self.normal())):
            for value in (np.nan, np.inf, -np.inf):
                values = self.normal()
                values[which].flat[values[which].size // 2] = value
                drawn = self.arrays(values, self.wide)
                assert drawn is not None
                with _may_raise():
                    found = self.round_trip(self.wide, *drawn)
                    known, y = np.isfinite(found.x), _host(self.forward(*drawn)[0])
                    right = (found.back == found.x) | np.isnan(found.back) | (known & ~np.isfinite(found.back))
                    right |= known & (np.abs(found.back - found.x) <= found.allowed)
                    right |= np.isinf(found.x) & np.isfinite(y)  # as tanh makes of it
                    if right.all():
                        continue
                    place = int(np.argmin(right.ravel()))
                    was, got = found.x.ravel()[place], found.back.ravel()[place]
                    raise SpecError(
                        f"{self.name}: with {value} in one element of {self._names(len(values))[which]}, "
                        f"inverse(forward(x, f), f) gives {got:.6g} for an x of {was:.6g}: what is not finite must "
                        "come back as it was or as NaN, so that it shows, and never as another number (do not clamp "
                        "or replace it)"
                    )

    def check_shapes(self) -> list[tuple[int, ...]]:
        """Return the other shapes that the coupling takes; on those it must keep what it keeps on the first."""
        taken = []
        for shape in self.others:
            self.shape = shape
            with _may_raise():
                self.check_round_trip(self.wide, *self.drawn(), _Demand(f" on shape {shape}"))
                if self.coupling.vjp(*self.drawn(), self.make(*self._ones())) is not NotImplemented:
                    self._vjp_error([*self.normal(), np.asarray(self.rng.standard_normal(shape))], 1.0)
                taken.append(shape)
        return taken

    # --- the derivative -----------------------------------------------------------------------------------------------

    def check_vjp(self, dtypes: Any) -> float | None:
        """Return the largest relative error of ``vjp``; ``None`` where there is none."""
        x, f = self.drawn()
        if self.call("vjp", self.coupling.vjp, x, f, self.make(*self._ones())) is NotImplemented:
            return None
        worst = 0.0
        for size, push, pull, sign in (
            (1.0, 1.0, 1.0, 0),
            (1.0, 1.0, 1.0, 1),
            (1.0, 1.0, 1.0, -1),
            (1.0, 1.0, 1e4, 0),
            (1.0, 1.0, 1e-4, 0),
            (100.0, 1.0, 1.0, 0),
            (0.01, 0.01, 1.0, 0),
        ):
            values = [*self.normal(size, push), np.asarray(pull * self.rng.standard_normal(self.shape))]
            values = [sign * np.abs(value) for value in values] if sign else values
            worst = max(worst, self._vjp_error(values, size))
        for dtype in dtypes:
            self._check_gradients(dtype)
        self._check_special_gradients()
        return worst

    def _ones(self) -> tuple[np.ndarray, str]:
        return np.ones(self.shape), self.wide

    def _names(self, count: int) -> list[str]:
        return ["x", *(f"f[{i}]" for i in range(count - 1))]

    def _vjp(self, values: list[np.ndarray], dtype: str) -> tuple[Any, Any, Any, list[Any]] | None:
        """Return ``(x, f, gy, gradients)``."""
        drawn, gy = self.arrays(values[:-1], dtype), self.make(values[-1], dtype)
        if drawn is None or gy is None:
            return None
        x, f = drawn
        gx, gf = self.call("vjp", self.coupling.vjp, x, f, gy)
        given, got = [x, *(f if isinstance(f, tuple) else (f,))], [gx, *(gf if isinstance(gf, tuple) else (gf,))]
        if len(got) != len(given):
            raise SpecError(
                f"{self.name}: vjp returned {len(got) - 1} gradients of f, expected {len(given) - 1}: return (gx, gf), "
                "with gf a tuple where f is one"
            )
        for name, g, a in zip(self._names(len(got)), got, given, strict=True):
            if not hasattr(g, "dtype") or tuple(g.shape) != tuple(a.shape) or g.dtype != a.dtype:
                came = f"{_name(g)}, shape {tuple(g.shape)}" if hasattr(g, "dtype") else type(g).__name__
                raise SpecError(
                    f"{self.name}: vjp's gradient of {name} is {came}, expected {_name(a)}, shape {tuple(a.shape)}: a "
                    f"gradient has the dtype and shape of what it belongs to"
                )
        return x, f, gy, got

    def _check_gradients(self, dtype: str) -> None:
        """Refuse gradients of another kind than their values, or that change from call to call."""
        values = [*self.normal(), np.asarray(self.rng.standard_normal(self.shape))]
        found = self._vjp(values, dtype)
        assert found is not None
        for _ in range(_CALLS):
            for again in (self._vjp(values, dtype), self._vjp(values, dtype)):
                assert again is not None
                for first, second in zip(found[3], again[3], strict=True):
                    self._check_same("vjp", first, second)
            self._vjp([2 * value for value in values], dtype)

    def _check_special_gradients(self) -> None:
        """Refuse a NaN in ``gy`` that vjp hides."""
        values = [*self.normal(), np.asarray(self.rng.standard_normal(self.shape))]
        place = values[-1].size // 2
        usual = self._vjp(values, self.wide)
        values[-1] = np.where(np.arange(values[-1].size).reshape(self.shape) == place, np.nan, values[-1])
        found = self._vjp(values, self.wide)
        assert usual is not None
        assert found is not None
        for name, before, now in zip(self._names(len(found[3])), usual[3], found[3], strict=True):
            if np.any(_host(before)) and np.isfinite(_host(now)).all():
                raise SpecError(
                    f"{self.name}: vjp's gradient of {name} is finite though gy holds NaN: a NaN must show in what is "
                    "made of it (do not clamp or replace it)"
                )

    def _vjp_error(self, values: list[np.ndarray], size: float) -> float:
        found = self._vjp(values, self.wide)
        assert found is not None
        x, f, gy, grads = found
        given = [x, *(f if isinstance(f, tuple) else (f,))]
        auto, worst = self._autodiff(given, gy), 0.0
        for which, name in enumerate(self._names(len(given))):
            direction = np.asarray(self.rng.standard_normal(self.shape))
            if auto is not None:
                expected, exact = float((auto[which] * direction).sum()), True
                scale = _norm(auto[which]) * _norm(direction)
            else:
                derivative, exact = self._derivative(given, which, direction)
                if not exact and size > 1:  # a difference's step is for numbers around 1
                    continue
                expected = float((_host(gy) * derivative).sum())
                scale = _norm(_host(gy)) * _norm(derivative)
            got = float((_host(grads[which]) * direction).sum())
            error = abs(got - expected) / (scale or 1.0)
            if not error <= (512 * self.eps if exact else 32 * self.eps ** (2 / 3)) * max(1, direction.size) ** 0.5:
                raise SpecError(
                    f"{self.name}: vjp's gradient of {name} gives {got:.6g} along a random direction, but forward's "
                    f"derivative there is {expected:.6g} (off by {error:.1e}): vjp(x, f, gy) must return the "
                    "gradients of sum(gy·forward(x, f))"
                )
            worst = max(worst, error)
        return worst

    def _autodiff(self, given: list[Any], gy: Any) -> list[np.ndarray] | None:
        """Return the gradients by the library's own differentiation; ``None`` where it has none."""
        library = array_namespace(given[0]).__name__.partition(".")[0]

        def run(x: Any, *f: Any) -> Any:
            return self.coupling.forward(x, f[0] if len(f) == 1 else f)

        with contextlib.suppress(TypeError, ValueError, RuntimeError, NotImplementedError):
            if library == "torch":
                torch = sys.modules["torch"]
                leaves = [a.detach().clone().requires_grad_() for a in given]
                with torch.enable_grad():
                    y = run(*leaves)
                grads = torch.autograd.grad(y, leaves, gy, allow_unused=True, materialize_grads=True)
                return [_host(g) for g in grads]
            if library == "jax":
                return [_host(g) for g in sys.modules["jax"].vjp(run, *given)[1](gy)]
        return None

    def _derivative(self, given: list[Any], which: int, direction: np.ndarray) -> tuple[np.ndarray, bool]:
        """Return the derivative of ``forward`` along ``direction`` in one argument, and whether it is exact."""

        def moved(step: Any) -> np.ndarray:
            values = [_host(a) for a in given]
            values[which] = values[which] + step * direction
            dtype = self.wide if np.isrealobj(values[which]) else {"float64": "complex128"}.get(self.wide, "complex64")
            x, *f = (self.make(v, dtype if i == which else self.wide) for i, v in enumerate(values))
            return _host(self.coupling.forward(x, f[0] if len(f) == 1 else tuple(f)))

        with contextlib.suppress(TypeError, ValueError, RuntimeError, NotImplementedError):
            result = np.imag(moved(1e-20j)) / 1e-20
            if np.isfinite(result).all() and np.any(result):
                return result, True
        h = self.eps ** (1 / 3)  # where the rounding of the difference and its truncation weigh the same
        return (moved(h) - moved(-h)) / (2 * h), False

    # --- help ---------------------------------------------------------------------------------------------------------

    def right_inverse(self) -> str:
        """Say what the inverse should be, where ``forward`` is linear in ``x``."""
        if self.lattice is not None:
            return "An exact coupling gives its stream back bit for bit"
        x, f = self.drawn()
        tiny = 1e3 * self.eps
        zeros, ones = self.make(np.zeros(self.shape), self.wide), self.make(*self._ones())
        zero, one, there = (_host(self.forward(a, f)[0]) for a in (zeros, ones, x))
        slope = one - zero
        linear = np.allclose(there, slope * _host(x) + zero, rtol=tiny, atol=tiny)
        if not linear or not np.all(np.abs(slope) > tiny):
            return "forward is not linear in x, so no inverse can be proposed: check that it is one-to-one in x"
        if not isinstance(f, tuple):
            weight = zero / _host(f)
            if all(np.ptp(a) <= tiny * np.abs(a).max() for a in (slope, weight)):
                a, c = (f"{float(np.median(v)):.6g}" for v in (slope, weight))
                return f"forward is y = {a}·x + {c}·f, whose inverse is x = (y - {c}·f) / {a}"
        return "forward is linear in x, so its inverse is x = (y - forward(0, f)) / (forward(1, f) - forward(0, f))"


@contextlib.contextmanager
def _may_raise() -> Iterator[None]:
    """Pass over what a coupling's own code raises: it will do so in a network, too, and nothing is silent."""
    try:
        yield
    except SpecError:
        raise
    except Exception:
        return


def _name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _host(array: Any) -> np.ndarray:
    """Return an array in float64 or complex128, which hold all others' values."""
    values = to_numpy(array)
    return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def _bits(array: Any) -> bytes:
    return _host(array).tobytes()


def _norm(values: np.ndarray) -> float:
    """Return the L2 norm; of numbers whose squares leave float64's range, too."""
    peak = float(np.max(np.abs(values), initial=0.0))
    return peak * float(np.linalg.norm((values / peak).ravel())) if 0 < peak < np.inf else peak
