"""Drift in torch: a warning before training, and a probe of what the backward pass really rebuilds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from revcore.drift import foresee, warn_of_drift
from revcore.policy import Policy
from revcore.program import Program


def warn_once(program: Program, dtypes: Sequence[torch.dtype], policy: Policy) -> None:
    """Warn before the first run of a program whose gradients are predicted to be off by more than 1 %."""
    words = foresee(program, dtypes, policy, torch.from_numpy)
    if words is not None:
        warn_of_drift(program, dtypes, policy, words)
