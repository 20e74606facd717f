"""A fixed-point lattice inside floating-point numbers, on which sums are exact, so that an inverse is bit for bit.

Written for any framework's arrays, and only with what rounds nowhere but where it says so: ``round`` (half to even),
products with powers of two, and integer arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from revcore.arrays import array_namespace, as_type, constant, straight
from revcore.errors import SpecError

# The digits of a float's mantissa, with the one that is not written, by its size in bytes.
_DIGITS = {4: 24, 8: 53}


@dataclass(frozen=True)
class Lattice:
    """The multiples of ``2⁻ᵇⁱᵗˢ`` up to :meth:`limit`: between them a float32 or float64 holds every one.

    >>> import numpy as np
    >>> Lattice(2).round(np.float32([0.3, -0.37, 0.125]))
    array([ 0.25, -0.25,  0.  ], dtype=float32)
    >>> Lattice(12).limit(np.dtype("float32"))
    4096.0
    """

    bits: int

    def limit(self, dtype: Any) -> float:
        """Return the largest absolute value on the lattice of that dtype."""
        return 2.0 ** (_DIGITS[dtype.itemsize] - self.bits)

    def check_dtype(self, dtype: Any, what: str) -> None:
        """Refuse a dtype whose numbers are too coarse, or the lattice for it."""
        name = str(dtype).removeprefix("torch.")
        if name not in ("float32", "float64"):
            instead = 'give the network stream_dtype="float32", which its blocks need not follow'
            if name.startswith("complex"):
                instead = "hold real and imaginary parts side by side"
            raise SpecError(
                f"{what} came as {name}, but exact arithmetic needs streams of float32 or float64: {instead}"
            )
        if self.limit(dtype) < 2:
            raise SpecError(
                f"Exact: bits came as {self.bits}, but {name} holds {_DIGITS[dtype.itemsize]} digits in all, and those "
                f"before the point are among them: write bits={12 if dtype.itemsize == 4 else 40}"
            )

    def round(self, values: Any) -> Any:
        """Return the nearest points of the lattice, half to even; no derivative flows through."""
        scale = 2.0**self.bits
        return array_namespace(values).round(constant(values) * scale) * (1 / scale)

    def encode(self, stream: Any) -> Any:
        """Return a stream on the lattice; its derivative is the identity's (straight through)."""
        return straight(self.round(stream) + 0.0, lambda: stream)  # + 0.0: there is one zero

    def to_integers(self, values: Any) -> Any:
        """Return ``values·2ᵇⁱᵗˢ`` of values on the lattice, as integers of the floats' size."""
        xp = array_namespace(values)
        values = constant(values)
        return as_type(values * 2.0**self.bits, xp.int32 if values.dtype.itemsize == 4 else xp.int64)

    def to_floats(self, integers: Any, dtype: Any) -> Any:
        """Undo :meth:`to_integers`."""
        return as_type(integers, dtype) * 2.0**-self.bits


def out_of_range(where: str, peak: float, limit: float, bits: int) -> str:
    """Return what to say of a stream that left the lattice.

    >>> print(out_of_range("step 3", 5000.0, 4096.0, 12))
    step 3 took a stream out of the exact range: its largest absolute value is 5000, and with bits=12 the lattice ends \
at 4096. Take fewer bits (bits=11 reaches 8192), hold the streams in float64, or keep the blocks' outputs smaller
    """
    if not peak <= 2.0**1000:  # NaN or infinity: no lattice is wide enough
        return (
            f"{where} gave a stream with NaN or infinity, which exact arithmetic has no place for: look for it in what "
            "came in and in the block of that step"
        )
    fitting = bits - max(1, math.ceil(math.log2(peak / limit)))
    advice = f"bits={fitting} reaches {limit * 2.0 ** (bits - fitting):g}" if fitting > 0 else "here none would do"
    return (
        f"{where} took a stream out of the exact range: its largest absolute value is {peak:g}, and with bits={bits} "
        f"the lattice ends at {limit:g}. Take fewer bits ({advice}), hold the streams in float64, or keep the blocks' "
        "outputs smaller"
    )
