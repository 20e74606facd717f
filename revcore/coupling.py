"""Couplings: the algebra that merges a block's output ``f`` into its target stream ``x``.

A coupling is three functions that stand side by side: ``y = forward(x, f)``, ``x = inverse(y, f)`` and
``vjp(x, f, gy) -> (gx, gf)``. None is ever used in place of another. They are written with arithmetic
operators only (or functions of the array's own namespace), so that one object serves NumPy, torch and
JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from revcore.arrays import array_namespace, widened
from revcore.errors import SpecError


class Coupling:
    """Base of all couplings. Subclass it, or write :meth:`from_functions`.

    Shapes and dtypes: ``x``, ``y`` and every array of ``f`` have the target stream's shape; ``y`` has the
    target stream's dtype. ``f`` is one array where ``num_outputs == 1``, else a tuple of ``num_outputs``
    arrays.

    A subclass must be immutable and hashable (a frozen dataclass): engines use it as a key.

    >>> class Negated(Coupling):
    ...     def forward(self, x, f): return f - x
    ...     def inverse(self, y, f): return f - y
    >>> Negated().inverse(Negated().forward(2.0, 5.0), 5.0)
    2.0
    """

    num_outputs: ClassVar[int] = 1
    """How many arrays of a block's output the coupling takes; whatever follows is auxiliary."""

    uses_source: ClassVar[bool] = False
    """Whether ``f`` is ``(block(source), source)``: the coupling takes what the block was given, too."""

    def forward(self, x: Any, f: Any) -> Any:
        """Return the new target stream ``y``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, f)")

    def inverse(self, y: Any, f: Any) -> Any:
        """Return the target stream as it was before: the ``x`` with ``forward(x, f) == y``."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse(y, f)")

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        """Return ``(gx, gf)``, the gradients of ``sum(gy * forward(x, f))``.

        ``NotImplemented`` (the default) tells an engine to differentiate :meth:`Coupling.forward` by itself.
        """
        return NotImplemented

    # What engines call. A coupling whose inverse needs more than y and f (`Exact`) says so here.

    def advance(self, x: Any, f: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return ``(forward(x, f), carry)``: ``carry`` are the small arrays that :meth:`restore` needs beside ``f``."""
        return self.forward(x, f), ()

    def restore(self, y: Any, f: Any, carry: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return ``(x, wrong)``; ``wrong`` is an array of one truth value, or ``None`` where nothing is checked."""
        return self.inverse(y, f), None

    @staticmethod
    def from_functions(
        forward: Callable[[Any, Any], Any],
        inverse: Callable[[Any, Any], Any],
        *,
        name: str | None = None,
    ) -> FunctionCoupling:
        """Make a coupling of two functions, ``y = forward(x, f)`` and ``x = inverse(y, f)``.

        The gradient is taken from ``forward`` by the backend's own autodiff. A ``name`` lets the coupling
        be written into a dict (:meth:`revcore.Program.to_dict`) and found again on loading.

        Raises:
            SpecError: one of the two is missing or cannot be called.

        >>> import revcore
        >>> halved = Coupling.from_functions(lambda x, f: 0.5 * x + f, lambda y, f: (y - f) / 0.5)
        >>> halved.inverse(halved.forward(3.0, 1.0), 1.0)
        3.0
        >>> revcore.check_coupling(halved).ok
        True
        """
        for role, function in (("forward", forward), ("inverse", inverse)):
            if not callable(function):
                raise SpecError(
                    f"Coupling.from_functions: {role} came as {function!r}, but must be a function: a coupling needs "
                    "both y = forward(x, f) and x = inverse(y, f), and neither can be derived from the other"
                )
        return FunctionCoupling(forward, inverse, name)


@dataclass(frozen=True)
class FunctionCoupling(Coupling):
    """What :meth:`Coupling.from_functions` returns; equal only to couplings of the same two functions.

    >>> FunctionCoupling(max, min) == FunctionCoupling(max, min)
    True
    """

    _forward: Callable[[Any, Any], Any]
    _inverse: Callable[[Any, Any], Any]
    name: str | None = field(default=None)

    def forward(self, x: Any, f: Any) -> Any:
        return self._forward(x, f)

    def inverse(self, y: Any, f: Any) -> Any:
        return self._inverse(y, f)


class LinearCoupling(Coupling):
    """``y = a·x + push(f)`` with a number ``a``, :attr:`rate`, and a linear ``push``. Inverse ``x = (y − push(f))/a``.

    The base of :class:`Additive`, :class:`Momentum` and :class:`BDIA`; a subclass of your own with a ``rate`` and a
    ``push`` gets the three functions, and can be made exact (:class:`revcore.Exact`).

    >>> @dataclass(frozen=True)
    ... class Halved(LinearCoupling):
    ...     rate = 0.5
    ...     def push(self, f): return f
    >>> Halved().forward(4.0, 1.0), Halved().inverse(3.0, 1.0)
    (3.0, 4.0)
    """

    @property
    def rate(self) -> float:
        """The number ``a``, what is left of the target."""
        raise NotImplementedError(f"{type(self).__name__} has no rate")

    def push(self, f: Any) -> Any:
        """Return what is added to ``a·x``."""
        raise NotImplementedError(f"{type(self).__name__} has no push(f)")

    def forward(self, x: Any, f: Any) -> Any:
        # a product with 1 would cost a pass over memory and change nothing
        return (x if self.rate == 1 else self.rate * x) + self.push(f)

    def inverse(self, y: Any, f: Any) -> Any:
        kept = y - self.push(f)
        return kept if self.rate == 1 else kept / self.rate


@dataclass(frozen=True)
class Additive(LinearCoupling):
    """``y = x + s·f``, inverse ``x = y − s·f``.

    RevNet (Gomez et al., arXiv 1707.04585) with ``scale`` 1; the midpoint and leapfrog rules (Chang et al.,
    arXiv 1709.03698) with ``scale = 2h``.

    Args:
        scale: the number ``s``; finite and not 0.

    Raises:
        SpecError: ``scale`` is 0 or not finite.

    >>> Additive(0.5).forward(1.0, 4.0)
    3.0
    >>> Additive(0.5).inverse(3.0, 4.0)
    1.0
    >>> Additive(0.5).vjp(1.0, 4.0, 10.0)
    (10.0, 5.0)
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.scale) or self.scale == 0:
            raise SpecError(f"Additive: scale came as {self.scale!r}, but must be a finite number other than 0")

    @property
    def rate(self) -> float:
        return 1.0

    def push(self, f: Any) -> Any:
        return f if self.scale == 1 else self.scale * f

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        return gy, self.push(gy)


@dataclass(frozen=True)
class Momentum(LinearCoupling):
    """``y = β·x + (1 − β)·f``, inverse ``x = (y − (1 − β)·f) / β``.

    MomentumNet (Sander et al., arXiv 2102.07870). Every inverse multiplies an error by ``1/β``, so float32
    carries ``β = 0.9`` through some hundred steps and ``β = 0.5`` through some twenty.

    Args:
        beta: the share of the old stream, strictly between 0 and 1.

    Raises:
        SpecError: ``beta`` is out of that range.

    >>> Momentum(0.75).forward(4.0, 8.0)
    5.0
    >>> Momentum(0.75).inverse(5.0, 8.0)
    4.0
    >>> Momentum(0.75).vjp(4.0, 8.0, 1.0)
    (0.75, 0.25)
    """

    beta: float

    def __post_init__(self) -> None:
        if not _is_number(self.beta) or not 0 < self.beta < 1:
            raise SpecError(
                f"Momentum: beta came as {self.beta!r}, but must lie strictly between 0 and 1 (0 forgets the stream, "
                "so nothing could be rebuilt; 1 ignores the block): write Momentum(0.9)"
            )

    @property
    def rate(self) -> float:
        return self.beta

    def push(self, f: Any) -> Any:
        return (1 - self.beta) * f

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        return self.beta * gy, (1 - self.beta) * gy


@dataclass(frozen=True)
class BDIA(LinearCoupling):
    """``y = γ·x + (1 − γ)·s + (1 + γ)·h``, where ``s`` is the source and ``h`` what the block makes of it.

    Bidirectional integration approximation (Zhang et al., arXiv 2407.09093): ``x`` is the activation before last, ``s``
    the last one. The inverse divides by ``γ``, so with ``γ = ±½`` it doubles an error at every step: use it exactly
    (:func:`revcore.bdia`, :class:`revcore.Exact`).

    Args:
        gamma: the number ``γ``, strictly between −1 and 1 and not 0; ±½ in the paper.

    Raises:
        SpecError: ``gamma`` is out of that range.

    >>> BDIA(0.5).forward(4.0, (2.0, 6.0))
    8.0
    >>> BDIA(0.5).inverse(8.0, (2.0, 6.0))
    4.0
    >>> BDIA(0.5).vjp(4.0, (2.0, 6.0), 1.0)
    (0.5, (1.5, 0.5))
    """

    uses_source: ClassVar[bool] = True

    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not _is_number(self.gamma) or not 0 < abs(self.gamma) < 1:
            raise SpecError(
                f"BDIA: gamma came as {self.gamma!r}, but must lie strictly between -1 and 1 and not be 0 (which "
                "forgets the stream, so nothing could be rebuilt): write BDIA(0.5)"
            )

    @property
    def rate(self) -> float:
        return self.gamma

    def push(self, f: Any) -> Any:
        h, source = f
        return (1 - self.gamma) * source + (1 + self.gamma) * h

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        return self.gamma * gy, ((1 + self.gamma) * gy, (1 - self.gamma) * gy)


@dataclass(frozen=True)
class Affine(Coupling):
    """``y = x·exp(ls) + t`` with ``f = (ls, t)``, inverse ``x = (y − t)·exp(−ls)``.

    RealNVP (Dinh et al., arXiv 1605.08803), Glow (Kingma and Dhariwal, arXiv 1807.03039); with a learned
    ``ls`` that ignores the source also RevCol's α (Cai et al., arXiv 2212.11696). The block returns the pair
    ``(ls, t)``, each of the target stream's shape.

    >>> import numpy as np
    >>> x, ls, t = np.float64(3.0), np.log(2.0), np.float64(1.0)
    >>> y = Affine().forward(x, (ls, t)); float(y)
    7.0
    >>> float(Affine().inverse(y, (ls, t)))
    3.0
    >>> gx, (gls, gt) = Affine().vjp(x, (ls, t), 1.0); float(gx), float(gls), float(gt)
    (2.0, 6.0, 1.0)
    """

    num_outputs: ClassVar[int] = 2

    def forward(self, x: Any, f: Any) -> Any:
        log_scale, shift = widened(f, x)  # exp(ls)·exp(−ls) = 1 to the stream's rounding, not to a narrower block's
        return x * array_namespace(log_scale).exp(log_scale) + shift

    def inverse(self, y: Any, f: Any) -> Any:
        log_scale, shift = widened(f, y)
        return (y - shift) * array_namespace(log_scale).exp(-log_scale)

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        log_scale, _ = widened(f, x)
        gx = gy * array_namespace(log_scale).exp(log_scale)
        return gx, (gx * x, gy)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
