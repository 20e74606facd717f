"""Random programs: NumPy, torch and JAX agree on the values and gradients of networks that nobody thought of.

Fifteen in every run, the same ones each time, and a hundred in the long tier. Ten thousand new ones by hand:
``python -m pytest tests/conformance/test_random_programs.py -k hundred --tier all --hypothesis-profile=long``
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from revcore import (
    BDIA,
    Additive,
    Affine,
    Anchor,
    Bijection,
    Chain,
    Checkpoint,
    Couple,
    Coupling,
    Exact,
    LinearCoupling,
    Momentum,
    Policy,
    Program,
    Repeat,
    Reverse,
    StoreAll,
    revnet,
)
from revcore.parity import EPS, Record, Report, compare
from revcore.step import Permute, Step
from tests.conformance.backends import BACKENDS, Backend, load_backend
from tests.conformance.cases import GATED, Case, Mlp, Project, Shear, case_of, momentum_pair, oracle

LIMIT = 1e-11
NEGATED = Coupling.from_functions(lambda x, f: f - x, lambda y, f: f - y)
MIX = Bijection(lambda a, *rest: (a + 0.5 * rest[-1], *rest), lambda a, *rest: (a - 0.5 * rest[-1], *rest))
FEATURES = st.sampled_from((1, 3))  # few, since JAX compiles each operation once for each shape
COUPLINGS: tuple[Coupling, ...] = (
    Additive(),
    Additive(-0.5),
    Momentum(0.5),
    Momentum(0.9),
    Affine(),
    BDIA(-0.75),
    GATED,
    NEGATED,
)
BITS = 24  # of exact programs; in float64, so that a value between two points of the lattice is a rare one


# --- what is drawn ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Builder:
    """Draws steps together with the blocks they call, and follows what becomes of the streams' sizes."""

    draw: Callable[..., Any]
    couplings: Sequence[Coupling]
    sizes: tuple[int, ...]
    """The features of each stream."""
    left: int
    """How many more primitive steps may run."""
    exact: bool
    """Whether there is nothing that an exact program refuses."""

    def chain(self, level: int = 0, times: int = 1, fixed: bool = False) -> tuple[list[Step], list[Any]]:
        """Return steps, which run ``times`` times, and their blocks; with ``fixed``, no step changes a size."""
        steps: list[Step] = []
        blocks: list[Any] = []
        for _ in range(self.draw(st.integers(0 if level else 1, 3 if level else 8))):
            if self.left < times:
                break
            step, called = self.step(level, times, fixed)
            steps.append(step)
            blocks += called
        return steps, blocks

    def step(self, level: int, times: int, fixed: bool) -> tuple[Step, list[Any]]:
        draw, sizes = self.draw, self.sizes
        alike = len(set(sizes)) == 1
        kinds = ["couple"] * 4 + ["shear"] * (not self.exact)
        kinds += ["chain", "repeat", "repeat"] if level < 2 else []
        kinds += ["permute"] if alike or not fixed else []
        kinds += ["mix"] if sizes[0] == sizes[-1] and not self.exact else []
        kinds += ["anchor"] if alike else []
        kind = draw(st.sampled_from(kinds))
        if kind == "chain":
            steps, blocks = self.chain(level + 1, times, fixed)
            return Chain(steps), blocks
        if kind == "repeat":
            n = draw(st.integers(1, 3))
            steps, blocks = self.chain(level + 1, times * n, fixed=True)
            return Repeat(steps[0] if len(steps) == 1 else Chain(steps), n), blocks * n
        self.left -= times
        if kind == "couple":
            return self.couple()
        if kind == "shear":
            return Bijection(), [Shear(sizes[0], sizes[-1])]
        if kind == "mix":
            return MIX, []
        if kind == "anchor":
            to = sizes[0] if fixed else draw(FEATURES)
            self.sizes = (to,) * len(sizes)
            return Anchor(), [Project(sizes[0], to)]
        order = draw(st.permutations(range(len(sizes))))
        self.sizes = tuple(sizes[i] for i in order)
        return Bijection.permute(order), []

    def couple(self) -> tuple[Step, list[Any]]:
        draw, sizes = self.draw, self.sizes
        target, *others = draw(st.permutations(range(len(sizes))))
        sources = tuple(others[: draw(st.integers(1, len(others)))])
        alike = len({sizes[s] for s in sources}) == 1
        combine = draw(st.sampled_from(["args", "sum"])) if alike else "args"
        seen = sources[:1] if combine == "sum" else sources
        linear = [c for c in self.couplings if isinstance(c, LinearCoupling)]
        fits = len(seen) == 1 and sizes[seen[0]] == sizes[target]
        coupling = draw(
            st.sampled_from(linear if self.exact else self.couplings).filter(lambda c: fits or not c.uses_source)
        )
        if fits and coupling.num_outputs == 1 and not coupling.uses_source and draw(st.integers(0, 4)) == 4:
            return Couple(target, sources, coupling, combine, block=False), []
        aux = draw(st.integers(0, 3)) == 3
        block = Mlp(tuple(sizes[s] for s in seen), sizes[target], outputs=coupling.num_outputs, aux=aux)
        return Couple(target, sources, coupling, combine), [block]


@st.composite
def cases(draw: Callable[..., Any], couplings: Sequence[Coupling] = COUPLINGS) -> Case:
    n = draw(st.integers(2, 4))
    equal = draw(st.booleans())
    sizes = (draw(FEATURES),) * n if equal else draw(st.tuples(*[FEATURES] * n))
    exact = draw(st.integers(0, 3)) == 3 and any(isinstance(c, LinearCoupling) for c in couplings)
    builder = Builder(draw, couplings, sizes, left=12, exact=exact)
    steps, blocks = builder.chain()
    output = draw(st.permutations(range(n)))
    program = Program(steps, n, output, same_shape=equal)
    if exact:
        program = program.exact(BITS, guard=draw(st.sampled_from([0, 1])), checksum=draw(st.booleans()))
    return Case(
        name=f"random-{draw(st.integers(0, 999))}",  # the seed of all numbers
        program=program,
        blocks=tuple(blocks),
        shapes=tuple((2, size) for size in sizes),
        uses_anchors=any(isinstance(step, Anchor) for step in program.unrolled),
        masked=draw(st.booleans()),
        unused=tuple(sorted(draw(st.sets(st.integers(0, n - 1), max_size=n - 1)))),
    )


REBUILDING = st.builds(Reverse, st.none() | st.integers(1, 5), st.integers(0, 4))
POLICIES = REBUILDING | st.just(StoreAll()) | st.builds(Checkpoint, st.integers(1, 5))


# --- what must hold ---------------------------------------------------------------------------------------------------


def eagerly(backend: Backend) -> contextlib.AbstractContextManager[Any]:
    """Operation by operation: to compile each program would take ten times as long."""
    if backend.name != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.disable_jit()


def compare_gradients(backend: Backend, case: Case, policy: Policy) -> Report:
    """Compare with the oracle. The gradient of what no output depends on is zero, or (in torch) absent."""
    expected = oracle.__wrapped__(case)  # without its cache, which would hold all of ten thousand
    record = type(backend).run.__wrapped__(backend, case, policy)  # type: ignore[attr-defined]
    absent = {name: array for name, array in (expected.gradients or {}).items() if not array.any()}
    record = dataclasses.replace(record, gradients={**absent, **(record.gradients or {})})
    return compare(record, expected, limit=LIMIT / EPS["float64"], depth=1, names=(backend.name, "NumPy"))


def compare_inverse(backend: Backend, case: Case) -> Report:
    back = Record(backend.invert(case), dtype="float64")
    given = Record({f"stream.{i}": case.arrays[f"stream.{i}"] for i in range(len(case.shapes))}, dtype="float64")
    return compare(back, given, limit=LIMIT / EPS["float64"], depth=1, names=("inverse", "input"))


def carries(case: Case) -> bool:
    """Return whether an inverse needs more than the output."""
    couplings = (step.coupling for step in case.program.unrolled if isinstance(step, Couple))
    return any(isinstance(coupling, Exact) and coupling.carry_bits for coupling in couplings)


def check(backend: Backend, case: Case, policy: Policy) -> None:
    report = compare_gradients(backend, case, policy)
    assert report.ok, f"{policy}: {report}"
    if not case.uses_anchors and not carries(case):
        report = compare_inverse(backend, case)
        assert report.ok, str(report)


@settings(max_examples=12, phases=[Phase.generate])
@given(cases(), POLICIES, st.data())
def test_numpy_torch_and_jax_agree(case: Case, policy: Policy, data: st.DataObject) -> None:
    agree(case, policy, data)


@pytest.mark.long
@given(cases(), POLICIES, st.data())
def test_a_hundred_agree(case: Case, policy: Policy, data: st.DataObject) -> None:
    agree(case, policy, data)


def agree(case: Case, policy: Policy, data: st.DataObject) -> None:
    for name in BACKENDS:
        backend = load_backend(name)
        with eagerly(backend):
            check(backend, case, policy)
    count = len(case.program.unrolled)
    by_step = data.draw(st.lists(POLICIES, min_size=count, max_size=count), label="policy by step, in torch")
    check(load_backend("torch"), case, by_step)


@pytest.mark.long
@settings(max_examples=settings().max_examples // 25)
@given(cases(), POLICIES)
def test_numpy_and_compiled_jax_agree(case: Case, policy: Policy) -> None:
    """A few, since each is compiled: ``Repeat`` is a scan here, not a loop."""
    check(load_backend("jax"), case, policy)
    sys.modules["jax"].clear_caches()


# --- and that it is found if it does not ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OldMomentum(Momentum):
    """As revlib had it: ``forward`` served as the adjoint, and a target's gradient passed unscaled."""

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        return gy, gy


def first_failure(backend: Backend, coupling: Coupling) -> tuple[Case, Policy]:
    """Return the first of twenty programs with no other coupling whose gradients differ, or raise."""

    def fails(drawn: tuple[Case, Policy]) -> bool:
        with eagerly(backend):
            return not compare_gradients(backend, *drawn).ok

    once = settings(max_examples=20, phases=[Phase.generate], database=None)
    return find(st.tuples(cases([coupling]), REBUILDING), fails, settings=once, random=random.Random(0))


def test_a_wrong_inverse_is_found(backend: Backend) -> None:
    wrong = Coupling.from_functions(GATED.forward, Additive().inverse)
    case, policy = first_failure(backend, wrong)
    with eagerly(backend):
        assert compare_gradients(backend, case, StoreAll()).ok, f"storing everything needs no inverse, {policy} does"


def test_a_wrong_adjoint_is_found() -> None:
    """In JAX; the torch engine lets autograd differentiate ``forward``."""
    first_failure(load_backend("jax"), OldMomentum(0.9))


def test_a_right_coupling_is_not() -> None:
    with pytest.raises(NoSuchExample):
        first_failure(load_backend("torch"), momentum_pair(0.9))


def test_a_wrong_inverse_is_seen_by_the_inverse_too(backend: Backend) -> None:
    wrong = Coupling.from_functions(lambda x, f: x + f, lambda y, f: y + f)
    case = case_of("wrong-inverse", revnet(2, wrong))
    assert compare_inverse(backend, case_of("right-inverse", revnet(2))).ok
    assert not compare_inverse(backend, case).ok


def test_programs_are_as_varied_as_they_should_be() -> None:
    """Among a hundred, each of these: else the test above would not be what it says."""
    seen: set[str] = set()

    @settings(database=None, phases=[Phase.generate])
    @given(cases(), POLICIES)
    def look(case: Case, policy: Policy) -> None:
        steps = case.program.unrolled
        couples = [step for step in steps if isinstance(step, Couple)]
        found = {
            "repeat": case.repeats,
            "nested repeat": "Repeat" in repr(case.program.steps).partition("Repeat")[2],
            "anchor": case.uses_anchors,
            "learned bijection": any(isinstance(step, Bijection) and step.block for step in steps),
            "permutation": any(isinstance(step, Bijection) and isinstance(step.forward, Permute) for step in steps),
            "sum": any(step.combine == "sum" for step in couples),
            "no block": any(not step.block for step in couples),
            "aux": any(getattr(block, "aux", False) for block in case.blocks),
            "masks": case.masked,
            "unused": bool(case.unused),
            "unlike sizes": not case.program.same_shape,
            "output order": case.program.output != tuple(range(case.program.num_streams)),
            f"{case.program.num_streams} streams": True,
            type(policy).__name__: True,
            "exact": case.program.lattice is not None,
            **{repr(getattr(step.coupling, "coupling", step.coupling)): True for step in couples},
        }
        seen.update(name for name, there in found.items() if there)

    look()
    assert len(seen) == 13 + 3 + 3 + len(COUPLINGS), seen
