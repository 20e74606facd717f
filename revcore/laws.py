"""What a coupling must keep: :func:`check_coupling` tries it, with figures. The trials are in ``revcore.trials``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from revcore.coupling import Additive, Coupling
from revcore.errors import SpecError
from revcore.trials import Trials


@dataclass(frozen=True)
class CouplingReport:
    """What :func:`check_coupling` measured.

    Attributes:
        name: the coupling.
        round_trip: relative error of ``inverse(forward(x, f), f)`` by dtype, on standard normal values.
        amplification: how much one inverse step grows an error in ``y`` (1 for additive, ``1/β`` for momentum; 1 for
            :class:`revcore.Exact`, whose ``y`` has none).
        vjp_error: relative error of ``vjp`` against the derivative of ``forward``; ``None`` where the coupling
            leaves its derivative to the backend.
        shapes: those that it was tried on. One on which its functions raise is left out: they will do so in a network.

    >>> import revcore
    >>> report = revcore.check_coupling(revcore.Momentum(0.5))
    >>> report.ok, report.amplification, list(report.round_trip)
    (True, 2.0, ['float64', 'float32', 'float16', 'complex128', 'complex64'])
    >>> report.shapes
    ((64,), (), (1,), (7,), (3, 5), (2, 3, 5), (2, 1, 3, 5))
    """

    name: str
    round_trip: dict[str, float]
    amplification: float
    vjp_error: float | None
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def ok(self) -> bool:
        """True, for a report exists only for a coupling that keeps the laws."""
        return True

    def __str__(self) -> str:
        lines = [f"{self.name}: a coupling with a true inverse"]
        lines += [f"  round trip in {dtype:10} {error:.1e}" for dtype, error in self.round_trip.items()]
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
    shape: tuple[int, ...] | None = None,
    asarray: Callable[[np.ndarray], Any] | None = None,
    seed: int = 0,
) -> CouplingReport:
    """Try whether ``coupling`` keeps its laws, with the arrays of one library.

    1. ``inverse(forward(x, f), f) == x`` to the rounding of ``x``, ``f`` and ``y``, and what ``inverse`` makes of it:
       on normal, large, tiny and zero values. Where ``y`` is not finite for a large ``x``, or hardly moves when ``x``
       is halved, nothing is demanded.
    2. Of NaN and infinity in ``x`` or ``f``, what comes back is ``x``, or not finite, and NaN for a NaN: never another
       number, so that it shows. A NaN in ``gy`` shows in each gradient that ``vjp`` returns.
    3. ``y``, and what ``inverse`` returns, have the dtype and shape of ``x``, at any rank.
    4. The functions are functions: they give the same bits for the same arguments, in any order of calls, and change no
       argument.
    5. ``vjp`` is the derivative of ``forward``, on both signs and several sizes: by the library's own differentiation;
       for NumPy by the complex step, or by central differences where the coupling is not analytic.

    The dtypes are float64, float32, float16, and bfloat16 where the library has it. Complex ones are tried where
    ``forward`` is linear in a complex ``x``; else the coupling is taken to be one of real numbers. An exact coupling is
    tried on its lattice, and must give ``x`` back bit for bit.

    Args:
        coupling: the coupling to check.
        shape: the shape of ``x`` and ``f``; give a real one where the coupling holds arrays. ``None``: 64 elements,
            then all ranks up to 4 with odd sizes.
        asarray: makes the library's array of a NumPy array (``torch.from_numpy``, ``jax.numpy.asarray``), for a
            coupling whose functions work on that library's arrays only.
        seed: of a generator of its own; no global random state is touched.

    Returns:
        The figures. A coupling that breaks a law raises instead.

    Raises:
        SpecError: a law does not hold; the message says where, and gives the size of the error and, where ``forward``
            is linear in ``x``, the right inverse.

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
    trials = Trials(coupling, shape, asarray or (lambda a: a), np.random.default_rng(seed))
    with np.errstate(all="ignore"):  # large values overflow, and that is the question
        return CouplingReport(*trials.run())


def couplings_from_functions(forward: Any, inverse: Any, asarray: Callable[[np.ndarray], Any]) -> tuple[Coupling, ...]:
    """Pair ``coupling_forward`` with ``coupling_inverse`` (functions, or lists of one length), and try each pair.

    On normal values only: :func:`check_coupling` does the rest.

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
            # check_coupling tries more, for which JAX would have to compile for seconds
            with np.errstate(all="ignore"):
                Trials(coupling, (64,), asarray, np.random.default_rng(0)).run_first()
        except SpecError:
            raise
        except Exception as error:  # whatever their own code raises
            raise SpecError(
                f"coupling_forward and coupling_inverse could not be tried on arrays of shape (64,): {error}. If they "
                "hold arrays of their own, prove them by check_coupling(coupling, shape=...) and give them as "
                "coupling=Coupling.from_functions(forward, inverse)"
            ) from error
    return couplings
