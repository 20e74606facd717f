"""Drift in torch: a warning before training, and a probe of what the backward pass really rebuilds."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from revcore.drift import EPS, dtype_name, foresee, warn_of_drift
from revcore.policy import Policy, Reverse
from revcore.probe import Probe, combined, places
from revcore.program import Program
from revcore_torch.watch import is_faking


def warn_once(program: Program, dtypes: Sequence[torch.dtype], policy: Policy) -> None:
    """Warn before the first run of a program whose gradients are predicted to be off by more than 1 %."""
    if is_faking():
        return  # a plan trains nothing
    words = foresee(program, dtypes, policy, torch.from_numpy)
    if words is not None:
        warn_of_drift(program, dtypes, policy, words)


class DriftProbe(Probe):
    """Measure in real backward passes how far rebuilt streams are from the true ones.

    In a measured step, ``samples`` elements of the streams before each step are kept by the forward pass, and compared
    when the backward pass has rebuilt them. That costs ``samples`` elements of memory and a few small kernels a step of
    the program, and no further run of any block; in the other steps nothing. Values, gradients, buffers and random
    state stay as they are.

    Args:
        program: the model to look at, or its program. Other reversible calls in the same training step are left out.
        every: measure the first of so many training steps.
        samples: how many elements a step of the program, over all streams.

    A model that is compiled as a whole has no tape: measure it before it is compiled.

    >>> import revcore_torch
    >>> model = revcore_torch.ReversibleSequential(*[torch.nn.Linear(8, 8) for _ in range(16)])
    >>> probe = revcore_torch.DriftProbe(model, every=10)
    >>> for _ in range(20):
    ...     with probe:
    ...         model(torch.ones(4, 16)).sum().backward()
    >>> [at for at, _ in probe.history], probe.report().level
    ([0, 10], 'fine')
    """

    def __init__(self, program: Any, *, every: int = 100, samples: int = 256) -> None:
        super().__init__(program, every=every, samples=samples)
        self._places: dict[Any, Tensor] = {}
        self._sums: dict[int, list[Any]] | None = None  # by step; None where nothing is measured
        self._dtype, self._policy = "", Reverse()
        self._token: Any = None

    def __enter__(self) -> DriftProbe:
        if self._due():
            self._sums, self._token = {}, _active.set(self)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._sums is None:
            return
        _active.reset(self._token)
        sums, self._sums = self._sums, None
        if sums and kind is None:
            errors = [0.0] * len(self.program.unrolled)
            for index, parts in sums.items():
                errors[index] = combined([(float(e), float(s), n, size) for e, s, n, size in parts])
            self._note(self.calls - 1, errors, self._dtype, self._policy)

    def take(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Return the sampled elements of each stream."""
        return [s.detach().take(self._at(s)) for s in streams]

    def compare(self, index: int, taken: Sequence[Tensor], streams: Sequence[Tensor]) -> None:
        """Note how far the rebuilt streams before step ``index`` are from what was taken there."""
        if self._sums is None:  # a backward pass after the step that is measured
            return
        for true, stream in zip(taken, streams, strict=True):
            wide = torch.float32 if stream.device.type == "mps" else torch.float64
            true = true.to(wide) if not true.is_complex() else true
            off = (stream.detach().take(self._at(stream)) - true).abs().to(wide).square().sum()
            square = true.abs().to(wide).square().sum()
            self._sums.setdefault(index, []).append((off, square, true.numel(), stream.numel()))

    def _at(self, stream: Tensor) -> Tensor:
        key = stream.numel(), stream.device
        if key not in self._places:
            chosen = places(stream.numel(), -(-self.samples // self.program.num_streams))
            self._places[key] = torch.tensor(chosen, dtype=torch.int64, device=stream.device)
        return self._places[key]


# One for each thread that runs a training step.
_active: ContextVar[DriftProbe | None] = ContextVar("probe", default=None)


def probing(program: Program, streams: Sequence[Tensor], policy: Any) -> DriftProbe | None:
    """Return the probe that measures this call, if one does."""
    probe = _active.get()
    if probe is None or (probe.program is not program and probe.program != program):
        return None
    probe._dtype = max((dtype_name(s.dtype) for s in streams), key=EPS.__getitem__)
    probe._policy = policy
    return probe
