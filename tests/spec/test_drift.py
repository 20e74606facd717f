"""The predictor: its recurrence, what policies do to it, and every kind of program."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import revcore
from revcore import (
    BDIA,
    Additive,
    Affine,
    Anchor,
    Bijection,
    Checkpoint,
    Couple,
    Coupling,
    MemoryBudget,
    Momentum,
    Program,
    Repeat,
    Reverse,
    SpecError,
    StoreAll,
    amplification,
    bdia,
    grouped,
    leapfrog,
    momentum_net,
    reversible_columns,
    revnet,
)
from revcore.drift import EPS, dtype_name, foresee, report_of
from revcore.probe import combined
from tests.helpers import name_of

DOUBLED = Coupling.from_functions(lambda x, f: 0.5 * x + f, lambda y, f: 2 * (y - f))


def test_the_recurrence_by_hand() -> None:
    """Two steps of momentum, with measured figures, in the formula's own words."""
    eps, a, c, kappa = EPS["float32"], 0.5, 0.5, 3.0
    rms = [(1.0, 2.0), (3.0, 2.0), (3.0, 4.0)]
    noise = (0.21 * eps) ** 2
    last = noise * (2.0**2 + (4.0**2 + 4.0**2) / a**2)  # stream 1, from a source that is kept
    inside = (0.7 * eps) ** 2 * 2.0**2
    first = noise * (1.0**2 + (3.0**2 + 3.0**2) / a**2) + (c / a) ** 2 * kappa**2 * (last + inside)
    report = amplification(revnet(2, Momentum(a)), rms=rms, gain=[kappa, kappa])
    assert report.reconstruction[1] == pytest.approx(math.sqrt(last / 13))
    assert report.reconstruction[0] == pytest.approx(math.sqrt((first + last) / 5))
    assert pytest.approx(report.reconstruction[0] / eps) == report.A
    assert report.gradient == pytest.approx((math.hypot(1.2 * math.sqrt(last / 4), 0.6 * eps), 0.0))


def test_what_errors_have_in_common_counts() -> None:
    """BDIA's linear part doubles an error a step, ``e₀ = 2·e₂ − e₁``; independent errors would grow by 1.6."""
    quiet = [0.0] * 20
    errors = amplification(revnet(20, BDIA(0.5)), "float64", gain=quiet, rms=[(1.0, 1.0)] * 21).reconstruction
    assert errors[0] / errors[4] == pytest.approx(2**4, rel=0.01)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_errors_grow_with_the_dtypes_eps(dtype: str) -> None:
    base, other = amplification(revnet(16), "float32"), amplification(revnet(16), dtype)
    assert pytest.approx(base.A, rel=0.1) == other.A
    assert other.worst / EPS[dtype] == pytest.approx(base.worst / EPS["float32"], rel=0.1)


@pytest.mark.parametrize(
    "program",
    [
        revnet(12),
        revnet(12, Momentum(0.9), num_streams=3),
        momentum_net(6),
        dataclasses.replace(momentum_net(6), split="zeros", merge="last"),
        leapfrog(12, 0.1),
        grouped(3, 4),
        reversible_columns(3, 4),
        revnet(12, Affine()),
        revnet(12, DOUBLED),
        revnet(12, BDIA(0.5)),
        Program([Repeat(Couple(0, 1), 6), Bijection.permute((1, 0)), Repeat(Couple(0, 1), 6)]),
        Program([Couple(0, 1), Bijection(lambda a, b: (b, a), lambda a, b: (b, a)), Couple(1, 0), Bijection()]),
        Program([Couple(0, 1), Bijection.space_to_depth(2), Couple(1, 0)]),
    ],
    ids=name_of,
)
def test_every_kind_of_program_is_predicted(program: Program) -> None:
    report = amplification(program)
    assert len(report.reconstruction) == len(report.steps) == len(program.unrolled)
    assert len(report.gradient) == len(report.blocks) == program.num_blocks
    assert all(math.isfinite(e) and e >= 0 for e in (*report.reconstruction, *report.gradient))
    assert 1e-8 < report.reconstruction[0] < 1e-2
    assert "predicted, float32" in str(report)


def test_a_coupling_of_functions_is_tried() -> None:
    """What it does to errors is measured: here the same as that of the linear one."""
    halved = Coupling.from_functions(lambda x, f: 0.5 * x + 0.5 * f, lambda y, f: (y - 0.5 * f) / 0.5)
    by_trial, by_rule = (amplification(revnet(24, c)).A for c in (halved, Momentum(0.5)))
    assert by_trial == pytest.approx(by_rule, rel=0.2)
    needs_torch = Coupling.from_functions(lambda x, f: x.relu6(f), lambda y, f: y)
    with pytest.raises(SpecError, match=r"could not be tried on arrays of shape \(256,\): .* Give asarray="):
        amplification(revnet(2, needs_torch))
    assert foresee(revnet(2, needs_torch), ["float32"], Reverse()) is None


def test_errors_begin_anew_where_streams_are_kept() -> None:
    program = revnet(32, Momentum(0.5))
    free, anchored = (amplification(program, policy=p) for p in (Reverse(), Reverse(anchor_every=8)))
    assert anchored.worst < 1e-3 < free.worst
    assert anchored.reconstruction[16] == pytest.approx(anchored.reconstruction[24], rel=0.01)
    stored = amplification(program, policy=Reverse(keep_last=30))
    assert stored.reconstruction[2:] == (0.0,) * 30
    assert all(e > 0 for e in stored.reconstruction[:2])
    inside = Program([*program.steps[:16], Anchor(), *program.steps[16:]])
    assert amplification(inside).reconstruction[16] == 0.0
    assert amplification(inside).reconstruction[0] < amplification(program).reconstruction[0] / 1e3


@pytest.mark.parametrize("policy", [StoreAll(), Checkpoint(4), [StoreAll()] * 32], ids=name_of)
def test_nothing_drifts_that_is_not_rebuilt(policy: Any) -> None:
    report = amplification(revnet(32, Momentum(0.5)), policy=policy)
    assert report.worst == report.A == 0.0
    assert report.level == "fine"


def test_exact_programs_do_not_drift() -> None:
    for program in (bdia(64), momentum_net(64, 0.5).exact(), revnet(64).exact()):
        assert amplification(program).worst == amplification(program).A == 0.0


def test_levels_and_remedies() -> None:
    levels = {depth: amplification(revnet(depth, Momentum(0.5))).level for depth in (4, 16, 24, 32)}
    assert levels == {4: "fine", 16: "note", 24: "error", 32: "error"}
    assert amplification(revnet(2), "bfloat16").level == "note"
    assert amplification(revnet(8), "bfloat16").level == "warn"
    broken = dataclasses.replace(amplification(revnet(2)), gradient=(math.nan, 0.0))
    assert broken.level == "error"
    words = foresee(revnet(32, Momentum(0.5)), ["float32"], Reverse())
    assert words is not None
    for part in ("32 steps", "float32", "1 or more", "anchor_every=16", "program.exact() (no error)"):
        assert part in words
    # the anchors that it names do what it says, and half as many would not
    good, bad = (amplification(revnet(32, Momentum(0.5)), policy=Reverse(anchor_every=k)).worst for k in (16, 32))
    assert good <= 1e-2 < bad
    affine = foresee(revnet(8, Affine()), ["bfloat16"], Reverse())
    assert affine is not None
    assert "exact" not in affine
    assert "float32 streams (blocks may stay in bfloat16" in affine


def test_the_coarsest_stream_counts() -> None:
    assert foresee(revnet(32), ["float32", "float32"], Reverse()) is None
    words = foresee(revnet(32), ["float32", "bfloat16"], Reverse())
    assert words is not None
    assert "bfloat16" in words


def test_narrow_blocks_are_an_upper_estimate() -> None:
    wide, mixed = amplification(revnet(32)), amplification(revnet(32), block_dtype="bfloat16")
    assert wide.worst < mixed.worst < amplification(revnet(32), "bfloat16").worst
    assert mixed.block_dtype == "bfloat16"


def test_measured_errors_make_the_same_kind_of_report() -> None:
    program = revnet(3)
    report = report_of(program, (3e-2, 2e-2, 1e-2), "float32", Reverse())
    assert report.measured
    assert report.gradient == pytest.approx((2.4e-2, 1.2e-2, 1.2 * 0.0 + 0.6 * EPS["float32"] * 0), abs=1e-12)
    assert report.level == "warn"
    assert "measured, float32" in str(report)


def test_each_stream_counts_by_its_size_however_many_samples_are_taken() -> None:
    """Two samples each of streams of 30 and 10 elements, and errors in the small one alone."""
    assert combined([(0.0, 8.0, 2, 30), (2.0, 8.0, 2, 10)]) == pytest.approx(math.sqrt(10 / 160))


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), "float32"], ids=name_of)
def test_dtypes_of_any_library(dtype: Any) -> None:
    assert dtype_name(dtype) == "float32"


def test_what_cannot_be_asked() -> None:
    with pytest.raises(SpecError, match="dtype came as 'int8', expected one of float64, float32"):
        amplification(revnet(2), "int8")
    with pytest.raises(SpecError, match="rms came with 2 entries, expected 3"):
        amplification(revnet(2), rms=[(1.0, 1.0)] * 2)
    with pytest.raises(SpecError, match="gain came with 3 entries, expected 2"):
        amplification(revnet(2), gain=[1.0] * 3)
    with pytest.raises(SpecError, match="MemoryBudget chooses for a model at hand"):
        amplification(revnet(2), policy=MemoryBudget(fraction=0.5))


def test_a_warning_is_a_user_warning() -> None:
    assert issubclass(revcore.DriftWarning, UserWarning)
    assert Additive().rate == 1.0
