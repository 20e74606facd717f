"""Both engines against the NumPy oracle, against themselves storing everything, and back again.

Tolerances: float64 against the complex step 1e-12; anything else ``16·depth·eps`` of the dtype; both in the relative L2
norm over the whole tree, and nothing absolute. bfloat16: at most twice the error that store-all makes itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from revcore import Checkpoint, Policy, Program, Reverse, StoreAll
from revcore.parity import EPS, Record, Report, compare
from tests.conformance.backends import Backend
from tests.conformance.cases import COUPLINGS, DEPTHS, STREAMS, STRUCTURES, Case, oracle, plain
from tests.tiers import product

REBUILDING: tuple[Policy, ...] = (
    Reverse(),
    Reverse(anchor_every=2),
    Reverse(keep_last=1),
    Checkpoint(1),
    Checkpoint(3),
)


def against_oracle(record: Record, case: Case) -> Report:
    if record.dtype == "float64":
        return compare(record, oracle(case), limit=1e-12 / EPS["float64"], depth=1, names=("engine", "oracle"))
    return compare(record, oracle(case), names=("engine", "oracle"))


Run = Callable[[Policy], Record]


def runs_of(backend: Backend, case: Case, dtype: str) -> Run:
    """Return what runs a case under a policy: once, however many checks look at it."""
    return functools.cache(lambda policy: backend.run(case, policy, dtype))


def check_oracle(run: Run, case: Case) -> None:
    for policy in (StoreAll(), Reverse()):
        report = against_oracle(run(policy), case)
        assert report.ok, f"{policy}: {report}"


def check_policies(run: Run, policies: tuple[Policy, ...] = REBUILDING) -> None:
    for policy in policies:
        report = compare(run(policy), run(StoreAll()), names=(str(policy), "StoreAll"))
        assert report.ok, str(report)


def check_inverse(backend: Backend, case: Case, dtype: str) -> None:
    streams = {name: array for name, array in case.inputs.items() if name.startswith("stream.")}
    back = Record(backend.invert(case, dtype), depth=case.depth, dtype=dtype)
    report = compare(back, Record(streams, depth=case.depth, dtype="float64"), names=("inverse", "input"))
    assert report.ok, str(report)


def first_alone(coupling: str, depth: int, num_streams: int, dtype: str) -> bool:
    """Return whether a case differs from another fast one in one thing alone; products of two are random programs'."""
    if num_streams != 2:
        return (coupling, depth, dtype) == ("additive", 3, "float64")
    if dtype == "float32":
        return depth == 8  # deep enough for what drifts, and for the law of rounding to bite
    return depth == 3 or (coupling in ("additive", "momentum") and depth in (1, 32))


@pytest.mark.parametrize(
    ("coupling", "depth", "num_streams", "dtype"),
    product(COUPLINGS, DEPTHS, STREAMS, ("float64", "float32"), fast=first_alone),
)
def test_every_coupling_depth_and_width(
    backend: Backend, coupling: str, depth: int, num_streams: int, dtype: str
) -> None:
    case = plain(coupling, depth, num_streams)
    run = runs_of(backend, case, dtype)
    check_oracle(run, case)
    check_policies(run, (Reverse(),))
    check_inverse(backend, case, dtype)


@pytest.mark.parametrize(
    ("coupling", "depth"),
    product(
        COUPLINGS,
        [depth for depth in DEPTHS if depth <= 8],
        fast=lambda coupling, depth: depth == 8 and coupling in ("momentum", "affine"),  # scales, and uses the source
    ),
)
def test_every_policy(backend: Backend, coupling: str, depth: int) -> None:
    check_policies(runs_of(backend, plain(coupling, depth, 2), "float64"))


# Of two that differ in a size alone, in the long tier; so are the other policies, which random programs draw too.
LARGER = ("repeat-32", "momentum-pair-0.99", "grouped-4", "columns-additive", "space-to-depth-channels-first")


@pytest.mark.parametrize("case", product(STRUCTURES, fast=lambda case: case.name not in LARGER))
def test_every_structure(backend: Backend, case: Case) -> None:
    run = runs_of(backend, case, "float64")
    check_oracle(run, case)
    if case.uses_anchors:
        with pytest.raises(ValueError, match="is an Anchor, which has no inverse"):
            backend.invert(case)
    else:
        check_inverse(backend, case, "float64")


@pytest.mark.long
@pytest.mark.parametrize("case", STRUCTURES, ids=str)
def test_every_policy_on_every_structure(backend: Backend, case: Case) -> None:
    check_policies(runs_of(backend, case, "float64"), (Reverse(), Reverse(anchor_every=3, keep_last=2), Checkpoint(3)))


@pytest.mark.parametrize(
    "case",
    product(
        [case for case in STRUCTURES if case.repeats or case.uses_anchors],
        fast=lambda case: case.name in ("nested-repeat", "anchor"),
    ),
)
def test_structures_in_float32(backend: Backend, case: Case) -> None:
    run = runs_of(backend, case, "float32")
    check_oracle(run, case)
    check_policies(run, (Reverse(),))


@pytest.mark.parametrize("policy", [StoreAll(), *REBUILDING], ids=str)
def test_a_program_without_steps_returns_its_input(backend: Backend, policy: Policy) -> None:
    x, y = backend.ones((2, 3)), backend.ones((2, 3))
    for result in (backend.call(Program(()), [], (x, y), policy=policy), backend.undo(Program(()), [], (x, y))):
        assert [array.tolist() for array in result] == [x.tolist(), y.tolist()]


@pytest.mark.parametrize(
    ("coupling", "bfloat16"),
    product(COUPLINGS, ("blocks", "streams"), fast=lambda coupling, where: coupling == "momentum"),
)
# bfloat16 streams of eight steps drift by some percent, rightly warned of; the test bounds it by bfloat16's own error
@pytest.mark.filterwarnings("ignore::revcore.DriftWarning")
def test_bfloat16_errs_at_most_twice_as_much_as_storing_everything(
    backend: Backend, coupling: str, bfloat16: str
) -> None:
    case = plain(coupling, 8, 2, wide=True)
    dtype, block_dtype = {"blocks": ("float32", "bfloat16"), "streams": ("bfloat16", None)}[bfloat16]

    def error(policy: Policy) -> float:
        record = backend.run(case, policy, dtype, block_dtype)
        report = compare(record, oracle(case), dtype="float64", depth=1, limit=1e-2 / EPS["float64"])
        assert not report.problems, report.problems
        assert report.gradient_error is not None
        return report.gradient_error

    own = error(StoreAll())
    assert 0 < own < 0.1, "store-all itself is lost, so that twice its error proves nothing"
    assert error(Reverse()) <= 2 * own
