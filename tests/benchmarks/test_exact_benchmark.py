"""The benchmark of exact arithmetic: it counts and judges rightly, on less."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from benchmarks import exact as benchmark
from benchmarks.exact import Errors, Found, Held, Run, Runs
from revcore import DriftWarning, Momentum, revnet


def runs(*losses: float) -> Runs:
    return Runs(tuple(Run(loss, (2.0, loss)) for loss in losses))


def found(exact: Runs, errors: Errors, held: Held) -> Found:
    made = Found({("digits", "additive", None): runs(1.0, 1.1, 1.2), ("digits", "additive", 12): exact})
    made.errors = {"ordinary": Errors(0.6, 1.0, False), "exact": errors}
    made.deep = {"store-all": runs(1.0, 1.1, 1.2), "ordinary": None, "exact": exact}
    made.seconds = {"additive": {way: [1.0, 2.0] for way in benchmark.WAYS}}
    made.held = {("Additive()", guard): held for guard in benchmark.GUARDS}
    return made


def test_it_tells_what_holds_and_draws(tmp_path: Path) -> None:
    good = found(runs(1.05, 1.1, 1.2), Errors(0.0, 0.0, True), Held(1, 1.0, 4.0))
    text = benchmark.report(good)
    assert "**no**" not in text
    assert "not finite" in text
    benchmark.picture(tmp_path / "exact.png", good)
    assert (tmp_path / "exact.png").stat().st_size > 10_000


def test_it_tells_what_does_not_hold() -> None:
    bad = found(runs(1.2, 1.2, 1.3), Errors(1e-9, 1e-9, False), Held(1, 1.5, 4.0))
    assert [words for words, ok in benchmark.claims(bad) if ok] == [
        "momentum 0.5: ordinary mode loses a gradient (error ≥ 0.45)"
    ]
    assert benchmark.report(bad).count("**no**") == 4
    assert benchmark.report(bad).count("**outside**") == 1


@pytest.mark.parametrize(("name", "guard"), [("Additive()", 0), ("Momentum(0.3)", 2)])
def test_what_is_counted_is_what_is_stated(name: str, guard: int) -> None:
    held = benchmark.held(benchmark.CARRIED[name], guard, depths=(2, 4))
    assert (held.bits, held.checksum) == (held.stated, 4)


def test_gradients_that_ordinary_arithmetic_loses() -> None:
    program = revnet(benchmark.DEEP, Momentum(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        assert benchmark.gradient_errors(program).worst >= 0.45
    assert benchmark.gradient_errors(program.exact()) == Errors(0.0, 0.0, True)


def test_training_goes_on_as_it_would() -> None:
    ordinary = benchmark.train_digits(revnet(4), 0, epochs=2)
    exact = benchmark.train_digits(revnet(4).exact(), 0, epochs=2)
    assert exact.loss != ordinary.loss  # it rounds
    assert exact.curve == pytest.approx(ordinary.curve, rel=1e-2)
    assert ordinary.curve[1] < ordinary.curve[0]
