"""Exact couplings on NumPy arrays: every inverse is bit for bit, and what is kept for it has the stated size."""

from __future__ import annotations

import json
import os
import re
from fractions import Fraction
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
    Couple,
    Exact,
    LinearCoupling,
    Momentum,
    Program,
    SpecError,
    reference,
)
from revcore.exact import _checksum, _pack, _unpack
from revcore.lattice import Lattice

LINEAR = (
    Additive(),
    Additive(-0.5),
    Momentum(0.5),
    Momentum(0.9),
    Momentum(0.99),
    Momentum(0.3),
    BDIA(0.5),
    BDIA(-0.5),
)
# REVCORE_EXACT_VALUES=1000000 for what the documentation says was tried
VALUES = int(os.environ.get("REVCORE_EXACT_VALUES", "4000"))
DEPTH = 1000


def given(coupling: LinearCoupling, f: np.ndarray, source: np.ndarray) -> Any:
    return (f, source) if coupling.uses_source else f


def draw(shape: Any, dtype: str, scale: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(dtype)


@pytest.mark.parametrize("coupling", LINEAR, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("guard", [0, 1, 2, 4])
def test_one_step_inverts_to_the_bit_and_is_the_coupling_to_one_unit(
    coupling: LinearCoupling, dtype: str, guard: int
) -> None:
    exact, shape = Exact(coupling, guard=guard), (5, 13)
    x = exact.lattice.round(draw(shape, dtype, 300.0))
    f = given(coupling, draw(shape, dtype, 30.0, 1), exact.lattice.round(draw(shape, dtype, 90.0, 2)))
    y, carry = exact.advance(x, f)
    back, wrong = exact.restore(y, f, carry)
    assert back.dtype == x.dtype
    assert back.tobytes() == x.tobytes()
    assert not wrong
    assert np.array_equal(y, exact.forward(x, f))
    assert np.array_equal(y, exact.lattice.round(y))
    assert np.abs(y.astype("f8") - coupling.forward(x, f)).max() <= 2.0**-12 * (1 + 1e-3)


@pytest.mark.parametrize("coupling", [Additive(), Momentum(0.9), BDIA(0.5), Momentum(0.5)], ids=repr)
def test_a_thousand_steps_give_the_input_back(coupling: LinearCoupling) -> None:
    exact, rng = Exact(coupling), np.random.default_rng(0)
    limit = exact.lattice.limit(np.dtype("float32"))
    values = draw(VALUES, "float32", 1.0)
    # as large and as small as the lattice goes, both zeros, the neighbours of ties
    adversarial = np.array(
        [0.0, -0.0, limit / 4, -limit / 4, 2**-12, -(2**-12), 2**-13, 3 * 2**-13, 1e-30, -1e-30], "f4"
    )
    values[: adversarial.size] = adversarial
    start = tuple(map(exact.lattice.encode, (values, values[::-1].copy())))
    phases = rng.uniform(0, 6.3, DEPTH).astype("float32")

    def block(i: int, source: np.ndarray) -> np.ndarray:  # bounded, and not periodic
        return np.abs((source * np.float32(1.7) + phases[i]) % np.float32(2) - 1) - np.float32(0.5)

    streams, carries = list(start), []
    for i in range(DEPTH):
        source = streams[1 - i % 2]
        f = given(coupling, block(i, source), source)
        streams[i % 2], carry = exact.advance(streams[i % 2], f)
        assert np.abs(streams[i % 2]).max() <= limit
        carries.append(carry)
    assert any((a != b).any() for a, b in zip(streams, start, strict=True))
    for i in reversed(range(DEPTH)):
        source = streams[1 - i % 2]
        streams[i % 2], wrong = exact.restore(streams[i % 2], given(coupling, block(i, source), source), carries[i])
        assert not wrong
    assert all((a == b).all() and a.tobytes() == b.tobytes() for a, b in zip(streams, start, strict=True))


@pytest.mark.parametrize(
    ("exact", "bits"),
    [
        (Exact(Additive()), 0),
        (Exact(Additive(), guard=1), 1),
        (Exact(Momentum(0.9)), 1),
        (Exact(BDIA(-0.5)), 1),
        (Exact(Momentum(0.99), guard=2), 3),
        (Exact(Momentum(0.3)), 2),
        (Exact(Momentum(0.1)), 4),
        (Exact(Momentum(1 / 256)), 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("checksum", [True, False])
def test_what_is_carried_has_the_size_that_is_stated(exact: Exact, bits: int, checksum: bool) -> None:
    exact = Exact(exact.coupling, exact.bits, exact.guard, checksum)
    assert exact.carry_bits == bits
    x = exact.lattice.round(draw((3, 64), "float32", 9.0))
    _, carry = exact.advance(x, given(exact.coupling, x[::-1].copy(), x))
    assert sum(part.nbytes for part in carry) == 3 * 64 * bits // 8 + 4 * checksum


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(), (1,), (3, 8), (2, 13), (0, 5), (4, 0)], ids=str)
def test_packing_is_undone(width: int, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, 2**width, shape, dtype=np.int32)
    like = np.zeros(shape, "float32")
    assert np.array_equal(_unpack(_pack(codes, width), width, like), codes)


def noisy(f: np.ndarray, ulps: int) -> np.ndarray:
    signs = np.random.default_rng(7).choice([-1, 1], f.shape)
    return (f + signs * ulps * np.spacing(np.abs(f))).astype(f.dtype)


@pytest.mark.parametrize("coupling", [Additive(), Momentum(0.9), BDIA(0.5)], ids=repr)
def test_guard_bits_make_noise_good_and_without_them_the_checksum_tells(coupling: LinearCoupling) -> None:
    shape = (200, 50)
    x, f = Lattice(12).round(draw(shape, "float32", 3.0)), draw(shape, "float32", 1.0, 1)
    source = Lattice(12).round(draw(shape, "float32", 3.0, 2))
    for guard in (1, 0):
        exact = Exact(coupling, guard=guard)
        y, carry = exact.advance(x, given(coupling, f, source))
        back, wrong = exact.restore(y, given(coupling, noisy(f, 8), source), carry)
        assert (back == x).all() == bool(guard)
        assert wrong == (not guard)


def test_the_checksum_tells_errors_that_a_sum_does_not() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-4000, 4000, (64, 48), dtype=np.int32)
    right = _checksum(integers)
    for trial in range(300):
        spoilt = integers.copy()
        if trial % 3 == 0:  # one number off by one
            spoilt.flat[rng.integers(spoilt.size)] += 1
        elif trial % 3 == 1:  # two neighbours, so that their sum stays
            place = rng.integers(spoilt.size - 1)
            spoilt.flat[place] += 1
            spoilt.flat[place + 1] -= 1
        else:  # 1, −2, 1, which a sum weighted by place does not tell either
            place = rng.integers(spoilt.size - 2)
            spoilt.flat[place : place + 3] += np.array([1, -2, 1], "i4")
        assert spoilt.sum() == integers.sum() or trial % 3 == 0
        assert _checksum(spoilt) != right


def test_the_checksum_tells_one_number_that_is_off_by_its_highest_bit() -> None:
    for place in range(64):
        integers = np.zeros((4, 16), "i4")
        integers.flat[place] = -(2**31)
        assert _checksum(integers) != 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Exact(Affine()), "expected a linear one, y = a·x + push(f): write Exact(Additive())"),  # type: ignore[arg-type]
        (lambda: Exact(Momentum(0.123456789)), "expected at least 1/256, and a ratio of whole numbers up to 4096"),
        (lambda: Exact(Momentum(0.001)), "expected at least 1/256"),
        (lambda: Exact(Additive(), bits=0), "bits came as 0, expected a whole number from 1 to 51"),
        (lambda: Exact(Additive(), guard=3), "guard came as 3, expected 0, 1, 2 or 4"),
        (lambda: Exact(Additive(), checksum=1), "checksum came as 1, expected True or False"),  # type: ignore[arg-type]
        (lambda: revcore.revnet(2, Affine()).exact(), "Exact: coupling came as Affine()"),
        (lambda: Program([Couple(0, 1), Couple(1, 0, Exact(Additive()))]), "either all are exact, with equal bits"),
        (
            lambda: Program([Couple(0, 1, Exact(Additive(), 11)), Couple(1, 0, Exact(Additive()))]),
            "beside an exact coupling of 11 bits",
        ),
        (
            lambda: Program([Couple(0, 1, Exact(Additive())), Bijection()]),
            "step 1 is a bijection made of code beside exact couplings",
        ),
        (lambda: Couple(0, (1, 2), BDIA(0.5)), "BDIA takes what the block was given beside what it returns"),
        (lambda: Couple(0, 1, Exact(BDIA(0.5)), block=False), "Exact takes what the block was given"),
        (lambda: BDIA(0.0), "gamma came as 0.0"),
    ],
)
def test_what_cannot_be_exact_is_refused(make: Any, words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        make()


def test_the_range_is_watched_and_the_step_named() -> None:
    program = revcore.revnet(6).exact()
    blocks = [lambda x: np.tanh(x)] * 3 + [lambda x: 5000 + 0 * x] + [np.tanh] * 2
    with pytest.raises(revcore.InversionError, match=r"step 3 took a stream out .*bits=11 reaches 8192"):
        reference.forward(program, blocks, (np.array([0.5], "f4"), np.array([0.25], "f4")))
    blocks[3] = lambda x: x * np.float32(np.nan)
    with pytest.raises(revcore.InversionError, match="step 3 gave a stream with NaN or infinity"):
        reference.forward(program, blocks, (np.array([0.5], "f4"), np.array([0.25], "f4")))
    with pytest.raises(revcore.InversionError, match="the input took a stream out"):
        reference.forward(program, [np.tanh] * 6, (np.array([1e6], "f4"), np.array([0.25], "f4")))
    for dtype, words in (("float16", "float16, but exact arithmetic needs streams of float32 or float64"),):
        with pytest.raises(SpecError, match=words):
            reference.forward(program, [np.tanh] * 6, (np.ones(1, dtype), np.ones(1, dtype)))
    with pytest.raises(SpecError, match="bits came as 24, but float32 holds 24 digits"):
        reference.forward(revcore.revnet(1).exact(24), [np.tanh], (np.ones(1, "f4"), np.ones(1, "f4")))


def test_bdia_is_the_paper_s() -> None:
    """Zhang et al., eq. 20 to 23: parity bits, one rounding of the update, the sign of γ outside of the parity."""
    unit, gamma = 2.0**-12, -0.5
    program, lattice = revcore.bdia(4, gamma), Lattice(12)
    x = draw(1000, "float64", 2.0)
    weights = [0.7, -1.1, 0.4, 0.9]
    blocks = [lambda x, w=w: np.sin(w * x) for w in weights]
    older = newer = lattice.round(x)
    newer = newer + lattice.round(blocks[0](newer))
    for h in blocks[1:]:
        odd = np.abs(older / unit) % 2  # the paper's s
        update = lattice.round((1 - gamma) * newer + (1 + gamma) * h(newer))
        older, newer = newer, gamma * (older + odd * unit) + update
    y = reference.forward(program, blocks, (x, x))
    assert np.array_equal(y[1], newer)
    assert np.array_equal(y[0], older)
    assert (program.split, program.merge) == ("copy", "last")


def test_bdia_of_few_blocks() -> None:
    assert revcore.bdia(0).unrolled == ()
    assert len(revcore.bdia(1).unrolled) == 1


@pytest.mark.parametrize(
    "program", [revcore.bdia(3, -0.5), revcore.momentum_net(2, 0.5).exact(20, guard=2)], ids=["a", "b"]
)
def test_exact_programs_are_plain_data(program: Program) -> None:
    assert Program.from_dict(json.loads(json.dumps(program.to_dict()))) == program
    assert program.exact(guard=4).exact(checksum=False) == program.exact(checksum=False)
    assert program.exact(guard=4).lattice == program.lattice
    assert program.exact(9).lattice == Lattice(9)


def test_gradients_are_those_of_the_coupling() -> None:
    """The complex step goes straight through the rounding."""
    program = revcore.revnet(4, Momentum(0.9)).exact(40)
    x = draw(5, "float64", 1.0), draw(5, "float64", 1.0, 1)

    def loss(program: Program) -> Any:
        return lambda streams: sum((y**3).sum() for y in reference.forward(program, [np.tanh] * 4, streams))

    exact, plain = (reference.gradient(loss(p), list(x)) for p in (program, revcore.revnet(4, Momentum(0.9))))
    assert all(np.allclose(a, b, rtol=1e-9) for a, b in zip(exact, plain, strict=True))
    assert any((a != b).any() for a, b in zip(exact, plain, strict=True)), "the lattice is there"


def test_an_anchor_s_output_is_put_on_the_lattice() -> None:
    program = Program([Couple(0, 1), Anchor(), Couple(1, 0)]).exact(6)
    streams = reference.forward(
        program, [np.tanh, lambda a, b: (a / 3, b / 7), np.tanh], (draw(9, "float64", 1.0), draw(9, "float64", 1.0, 1))
    )
    assert all(np.array_equal(s, Lattice(6).round(s)) for s in streams)


def test_every_ratio_up_to_the_largest_denominator_inverts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        d = int(rng.integers(2, 4097))
        n = int(rng.integers(max(1, d // 256 + 1), d))
        exact = Exact(Momentum(float(Fraction(n, d))))
        x = exact.lattice.round(rng.uniform(-4000, 4000, 200).astype("float32"))
        f = rng.standard_normal(200).astype("float32")
        y, carry = exact.advance(x, f)
        assert exact.restore(y, f, carry)[0].tobytes() == x.tobytes(), (n, d)
