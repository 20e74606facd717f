"""The range of an exact program's streams: looked at on the way, judged once at the end (T16)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from revcore.errors import InversionError
from revcore.lattice import Lattice, out_of_range


class Watch:
    """Puts streams on the lattice, and notes the largest absolute value of each that a step made."""

    def __init__(self, lattice: Lattice) -> None:
        self.lattice = lattice
        self.seen: list[tuple[str, Tensor, float]] = []

    def encode(self, streams: Sequence[Tensor], where: str) -> tuple[Tensor, ...]:
        """Return the streams on the lattice."""
        for i, stream in enumerate(streams):
            self.lattice.check_dtype(stream.dtype, f"stream {i} of {where}")
        result = tuple(map(self.lattice.encode, streams))
        for stream in result:
            self.note(where, stream)
        return result

    def note(self, where: str, stream: Tensor) -> None:
        if stream.numel():
            peak = torch.linalg.vector_norm(stream.detach(), math.inf)  # of a NaN, NaN
            self.seen.append((where, peak, self.lattice.limit(stream.dtype)))

    def settle(self, streams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Raise if a stream left the range. Where values cannot be looked at (``torch.func``), make them NaN.

        Raises:
            InversionError: with the first such step and its value.
        """
        if not self.seen:
            return streams
        seen, self.seen = self.seen, []
        device = seen[0][1].device
        within = torch.stack([(peak <= limit).to(device) for _, peak, limit in seen])
        if is_faking() or device.type == "meta":
            return streams
        if not is_known(within):
            # a product: torch.where would have a gradient of zero, as if all were well
            factor = torch.where(within.all(), 1.0, math.nan)
            return tuple(s * factor.to(s) for s in streams)
        for (where, peak, limit), good in zip(seen, within.tolist(), strict=True):
            if not good:
                raise InversionError(out_of_range(where, float(peak), limit, self.lattice.bits))
        return streams


def is_known(tensor: Tensor) -> bool:
    """Return whether a tensor has a value that Python can look at."""
    return (
        torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and not is_faking()
        and not torch._C._get_tracing_state()
        and not torch.compiler.is_exporting()
        and tensor.device.type != "meta"
    )


def is_faking() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
