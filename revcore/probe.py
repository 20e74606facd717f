"""What the DriftProbe of every backend has in common: when it measures, its report and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from revcore.checks import check_program
from revcore.drift import WARN, DriftReport, amplification, report_of
from revcore.errors import SpecError, check_count
from revcore.pictures import GREY, STYLE, load_pyplot
from revcore.policy import Policy
from revcore.program import Program


class Probe:
    """Base of ``revcore_torch.DriftProbe`` and ``revcore_jax.DriftProbe``."""

    def __init__(self, program: Any, *, every: int = 100, samples: int = 256) -> None:
        self.program: Program = check_program(getattr(program, "program", program))
        self.every = check_count("DriftProbe", "every", every, 1, " (of training steps)")
        self.samples = check_count("DriftProbe", "samples", samples, 1, " (of elements)")
        self.calls = 0
        """How many training steps there were."""
        self.history: list[tuple[int, float]] = []
        """``(training step, largest reconstruction error)`` of each measurement."""
        self._last: tuple[tuple[float, ...], str, Policy] | None = None

    def _due(self) -> bool:
        """Count a training step; return whether it is measured."""
        self.calls += 1
        return (self.calls - 1) % self.every == 0

    def _note(self, at: int, errors: Sequence[float], dtype: str, policy: Policy) -> None:
        self._last = tuple(errors), dtype, policy
        self.history.append((at, max(errors, default=0.0)))

    def report(self) -> DriftReport:
        """Return the last measurement.

        Raises:
            SpecError: nothing has been measured yet.
        """
        if self._last is None:
            raise SpecError(f"DriftProbe: nothing was measured yet, in {self.calls} training steps")
        return report_of(self.program, *self._last)

    def picture(self, path: str | Path) -> None:
        """Draw the last measurement by step, beside what :func:`revcore.amplification` predicts.

        Raises:
            SpecError: nothing has been measured yet, or matplotlib is missing.
        """
        report = self.report()
        assert self._last is not None
        _, dtype, policy = self._last
        predicted = amplification(self.program, dtype, policy=policy).reconstruction
        pyplot = load_pyplot()
        with pyplot.rc_context(STYLE):
            figure, axis = pyplot.subplots(figsize=(8, 4.5))
            for label, errors, style in (("measured", report.reconstruction, "-"), ("predicted", predicted, "--")):
                shown = [e if 0 < e < math.inf else math.nan for e in errors]
                axis.plot(range(len(shown)), shown, style, label=label, color=None if style == "-" else GREY)
            axis.axhline(WARN, color="#d95f02", lw=1)
            axis.set(yscale="log", xlabel="step", title=f"Relative error of the rebuilt input, {dtype}: {report.level}")
            axis.legend()
            figure.savefig(path)
            pyplot.close(figure)


def places(count: int, samples: int) -> list[int]:
    """Return ``samples`` places among ``count``, scattered evenly and always the same; all of them where they are few.

    By the golden ratio, which falls in with no width of a layer.

    >>> places(4, 8), places(1000, 4)
    ([0, 1, 2, 3], [0, 618, 236, 854])
    """
    if samples >= count:
        return list(range(count))
    return [int(count * (k * 0.6180339887498949 % 1.0)) for k in range(samples)]


def combined(parts: Sequence[tuple[float, float, int, int]]) -> float:
    """Return the relative error of all streams together.

    Each part is one stream's: squared error and square, summed over its samples; their number, and its size.

    >>> combined([(1.0, 4.0, 1, 10), (0.0, 5.0, 1, 10)])
    0.3333333333333333
    """
    error = sum(e * size / taken for e, _, taken, size in parts if taken)
    square = sum(s * size / taken for _, s, taken, size in parts if taken)
    return math.sqrt(error / square) if square else (math.inf if error else 0.0)
