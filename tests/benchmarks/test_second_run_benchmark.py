"""The benchmark of the second run's comparison, in small."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import second_run
from revcore_torch import ReversibleSequential, determinism


def test_alarms_are_counted_for_each_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    second_run.alarms(steps=1, batch=1, context=8)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[-5:-3] for row in rows] == [["1", "0"]] * 3
    assert all(float(row[-1]) <= 1 for row in rows)


def test_a_margin_is_the_least_factor_that_raises_nothing() -> None:
    """And the rule is as it was afterwards."""
    broken, allowed = determinism._Rule.broken, determinism._FACTOR
    torch.manual_seed(0)
    model = ReversibleSequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(16)])
    with second_run.Margin() as margin:
        for _ in range(2):
            model(torch.randn(16, 128, requires_grad=True)).square().sum().backward()
    assert (determinism._Rule.broken, determinism._FACTOR) == (broken, allowed)
    assert max(margin.needed, default=0.0) < 1
