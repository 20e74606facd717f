"""Exact: a coupling on a fixed-point lattice, whose inverse gives back the old stream bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from revcore.arrays import arange, array_namespace, as_type, constant, divided, straight, widened
from revcore.coupling import Coupling, LinearCoupling
from revcore.errors import SpecError
from revcore.lattice import Lattice

# n·r of a remainder r < d, and all that is added to it, stays far inside an int32.
_LARGEST_DENOMINATOR = 4096


@dataclass(frozen=True)
class Exact(Coupling):
    """A linear coupling ``y = a·x + push(f)`` in exact arithmetic: ``y = ⌊a·x⌉ + q(push(f))``.

    The streams are multiples of ``2⁻ᵇⁱᵗˢ``, and ``q`` rounds to the nearest of them; sums of such numbers are exact
    while they stay within ``±2^(24 − bits)`` in float32, ``±2^(53 − bits)`` in float64. Leaving that range raises, with
    the step and the value. Gradients are those of ``y = a·x + push(f)`` (straight through the rounding).

    Where ``a = ±n/d`` is not 1, the digits that ``⌊a·x⌉`` loses are kept: ``log2⌈d/n⌉`` bits an element and step,
    rounded up to 1, 2, 4 or 8; so 1 bit for ``Momentum(0.9)`` and ``BDIA(0.5)``, nothing for ``Additive()``. (Maclaurin
    et al., arXiv 1502.03492, carry such digits from step to step; here each step has its own.)

    Args:
        coupling: :class:`Additive`, :class:`Momentum`, :class:`BDIA` or another :class:`LinearCoupling`, with a rate
            that is a ratio of whole numbers up to 4096. All steps of a program are exact, with equal ``bits``, or none.
        bits: the digits after the point. What a block returns is rounded to ``2⁻ᵇⁱᵗˢ``.
        guard: also keep so many of the last bits of ``q(push(f))`` (0, 1, 2 or 4 an element and step). Then the inverse
            is exact although the block returns another value the second time, off by less than
            ``(2^(guard − 1) − ½)·2⁻ᵇⁱᵗˢ``: on GPUs, under ``jax.jit``, with autotuned kernels.
        checksum: keep a sum of the old stream's bits (4 bytes a step; 8 in float64) and compare it with what was
            rebuilt: a difference raises :class:`InversionError`.

    Raises:
        SpecError: another coupling, a rate that is no such ratio, or a number out of range.

    >>> import numpy as np
    >>> from revcore import Momentum
    >>> x, f = Lattice(12).round(np.float32([0.1, -7.3])), np.float32([3.14159, 0.333])
    >>> exact = Exact(Momentum(0.9))
    >>> y, carry = exact.advance(x, f)
    >>> exact.restore(y, f, carry)[0] == x
    array([ True,  True])
    >>> exact.carry_bits
    1
    """

    coupling: LinearCoupling
    bits: int = 12
    guard: int = 0
    checksum: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.coupling, LinearCoupling):
            raise SpecError(
                f"Exact: coupling came as {self.coupling!r}, expected a linear one, y = a·x + push(f): write "
                "Exact(Additive()), Exact(Momentum(0.9)), Exact(BDIA(0.5)), or derive yours from LinearCoupling"
            )
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 51:
            raise SpecError(f"Exact: bits came as {self.bits!r}, expected a whole number from 1 to 51, such as 12")
        if isinstance(self.guard, bool) or self.guard not in (0, 1, 2, 4):
            raise SpecError(f"Exact: guard came as {self.guard!r}, expected 0, 1, 2 or 4 (bits)")
        if not isinstance(self.checksum, bool):
            raise SpecError(f"Exact: checksum came as {self.checksum!r}, expected True or False")
        rate = self.coupling.rate
        nearest = Fraction(rate).limit_denominator(_LARGEST_DENOMINATOR)
        if float(nearest) != rate or not 2**-8 <= abs(nearest) <= _LARGEST_DENOMINATOR:
            raise SpecError(
                f"Exact: {self.coupling!r} keeps {rate!r} of its stream, expected at least 1/256, and a ratio of whole "
                f"numbers up to {_LARGEST_DENOMINATOR}, whose digits can be kept: the nearest is {float(nearest)!r} "
                f"({nearest})"
            )

    @property
    def uses_source(self) -> bool:  # type: ignore[override]
        """Whether the coupling within takes what the block was given, too."""
        return self.coupling.uses_source

    @cached_property
    def lattice(self) -> Lattice:
        """The numbers that the streams are made of."""
        return Lattice(self.bits)

    @cached_property
    def _ratio(self) -> tuple[int, int, int]:
        """``(sign, n, d)``: the rate is ``sign·n/d``."""
        ratio = Fraction(self.coupling.rate).limit_denominator(_LARGEST_DENOMINATOR)
        return (1 if ratio > 0 else -1), abs(ratio.numerator), ratio.denominator

    @cached_property
    def _digit_bits(self) -> int:
        _, n, d = self._ratio
        needed = (-(-d // n) - 1).bit_length()
        return next(width for width in (0, 1, 2, 4, 8) if width >= needed)

    @property
    def carry_bits(self) -> int:
        """How many bits an element and step are kept, beside the checksum.

        A row (the last axis) of a stream takes whole bytes.

        >>> from revcore import Additive, BDIA, Momentum
        >>> [Exact(c).carry_bits for c in (Additive(), BDIA(0.5), Momentum(0.99), Momentum(0.3))]
        [0, 1, 1, 2]
        """
        return self._digit_bits + self.guard

    def forward(self, x: Any, f: Any) -> Any:
        return self._advanced(x, f)[0]

    def inverse(self, y: Any, f: Any) -> Any:
        if self.carry_bits:
            raise SpecError(
                f"{self}: the inverse needs the digits that a forward pass keeps for its backward pass, and they are "
                "not in the output"
            )
        return self._rebuilt(y, widened(f, y), None, None)

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        return self.coupling.vjp(x, f, gy)

    def advance(self, x: Any, f: Any) -> tuple[Any, tuple[Any, ...]]:
        y, pushed, remainder = self._advanced(x, f)
        carry = []
        if self._digit_bits:
            carry.append(_pack(divided(remainder, self._ratio[1])[0], self._digit_bits))
        if self.guard:
            carry.append(_pack(self.lattice.to_integers(pushed) & (2**self.guard - 1), self.guard))
        if self.checksum:
            carry.append(_checksum(self.lattice.to_integers(x)))
        return y, tuple(carry)

    def restore(self, y: Any, f: Any, carry: tuple[Any, ...]) -> tuple[Any, Any]:
        f, parts = widened(f, y), iter(carry)
        digits = _unpack(next(parts), self._digit_bits, y) if self._digit_bits else None
        last = _unpack(next(parts), self.guard, y) if self.guard else None
        x = self._rebuilt(y, f, digits, last)
        return x, _checksum(self.lattice.to_integers(x)) != next(parts) if self.checksum else None

    def _advanced(self, x: Any, f: Any) -> tuple[Any, Any, Any]:
        """Return ``y``, ``q(push(f))``, and what tells ``x`` from others with the same ``⌊a·x⌉``."""
        f = widened(f, x)
        kept, remainder = self._multiply(x)
        pushed = self.lattice.round(self.coupling.push(f))
        return straight(kept + pushed, lambda: self.coupling.forward(x, f)), pushed, remainder

    def _rebuilt(self, y: Any, f: Any, digits: Any, last: Any) -> Any:
        pushed = self.coupling.push(f)
        pushed = self.lattice.round(pushed) if last is None else self._guarded(pushed, last)
        x = self._divide(constant(y) - pushed, digits) + 0.0
        return straight(x, lambda: self.coupling.inverse(y, f))

    def _multiply(self, x: Any) -> tuple[Any, Any]:
        """Return ``⌊a·x⌉``, and the ``R`` of ``n·X + d//2 = d·P + R`` that belongs to it."""
        sign, n, d = self._ratio
        if n == d:
            return constant(x) * sign, None
        # By parts, as n·X itself would leave the integers' range.
        whole, part = self._divided(self.lattice.to_integers(x), d)
        carried, remainder = divided(n * part + d // 2, d)
        return self.lattice.to_floats(sign * (n * whole + carried), x.dtype), remainder

    def _divide(self, kept: Any, digits: Any) -> Any:
        """Undo :meth:`_multiply`."""
        sign, n, d = self._ratio
        if n == d:
            return kept * sign
        whole, part = self._divided(sign * self.lattice.to_integers(kept), n)
        # X = (d·P + R − d//2) / n is whole, so R is known but for multiples of n.
        remainder = divided(d * (n - part) + d // 2, n)[1] + (0 if digits is None else n * digits)
        return self.lattice.to_floats(d * whole + divided(d * part + remainder - d // 2 + n, n)[0] - 1, kept.dtype)

    def _divided(self, integers: Any, by: int) -> tuple[Any, Any]:
        """Return quotient and remainder, rounding down, of integers on the lattice."""
        above = 2 ** (25 if integers.dtype.itemsize == 4 else 54) // by + 1  # no quotient is as large
        quotient, remainder = divided(integers + above * by, by)
        return quotient - above, remainder

    def _guarded(self, pushed: Any, last: Any) -> Any:
        """Return the point of the lattice with those last bits that is nearest to ``pushed``."""
        scale, span = 2.0**self.bits, 2.0**self.guard
        last = as_type(last, pushed.dtype)
        steps = array_namespace(pushed).round((constant(pushed) * scale - last) * (1 / span))
        return (steps * span + last) * (1 / scale)


def _pack(codes: Any, width: int) -> Any:
    """Return ``codes``, integers below ``2^width``, with ``8/width`` of the last axis in each byte."""
    xp, each = array_namespace(codes), 8 // width
    codes = codes.reshape(codes.shape or (1,))
    if missing := -codes.shape[-1] % each:
        codes = xp.concatenate((codes, *[codes[..., :1] * 0] * missing), -1)
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
    return as_type((parts << width * arange(0, each, codes)).sum(-1), xp.uint8)


def _unpack(packed: Any, width: int, like: Any) -> Any:
    """Undo :func:`_pack` of codes with the shape of ``like``; integers of its size."""
    xp, each = array_namespace(packed), 8 // width
    packed = as_type(packed, xp.int32 if like.dtype.itemsize == 4 else xp.int64)
    codes = (packed[..., None] >> width * arange(0, each, packed)) & (2**width - 1)
    codes = codes.reshape(*packed.shape[:-1], packed.shape[-1] * each)
    return codes[..., : (like.shape or (1,))[-1]].reshape(like.shape)


def _checksum(integers: Any) -> Any:
    """Return a sum that no likely error leaves as it is: modulo ``2³²`` (or ``2⁶⁴``), each number times one of its own.

    The factors are odd, so that a single wrong number always shows, and scattered, so that a few of ``±1`` do.
    """
    while integers.shape:
        integers = (integers * _scattered(integers.shape[-1], integers)).sum(-1, dtype=integers.dtype)
    return integers


def _scattered(n: int, like: Any) -> Any:
    """Return ``n`` odd numbers in no order (the finalizer of MurmurHash3, with factors below ``2³¹``)."""
    i = arange(1, n + 1, like)
    i = (i ^ (i >> 15)) * 0x2C1B3C6D
    i = (i ^ (i >> 13)) * 0x297A2D39
    return (i ^ (i >> 16)) | 1
