"""The oracle itself: against networks written out by hand, and against derivatives known in closed form."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from revcore import (
    Affine,
    Anchor,
    Bijection,
    Couple,
    Momentum,
    Program,
    Repeat,
    SpecError,
    grouped,
    leapfrog,
    momentum_net,
    reference,
    reversible_columns,
    revnet,
)

rng = np.random.default_rng(0)
X, Y, Z = rng.standard_normal((3, 2, 3))


def blocks(n: int) -> list[Any]:
    """Blocks that differ."""
    return [lambda x, k=k: np.tanh(x * (k + 1)) for k in range(n)]


def same(got: Any, *expected: Any) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_revnet_hands_its_streams_out_oldest_first() -> None:
    f, g, h = blocks(3)
    x2 = X + f(Y)
    x3 = Y + g(x2)
    x4 = x2 + h(x3)
    same(reference.forward(revnet(1), [f], (X, Y)), Y, x2)
    same(reference.forward(revnet(2), [f, g], (X, Y)), x2, x3)
    same(reference.forward(revnet(3), [f, g, h], (X, Y)), x3, x4)
    same(reference.forward(revnet(0), [], (X, Y)), X, Y)


def test_three_streams() -> None:
    f, g = blocks(2)
    first = X + f(Y)
    same(reference.forward(revnet(2, num_streams=3), [f, g], (X, Y, Z)), Z, first, Y + g(Z))


def test_leapfrog() -> None:
    f, g = blocks(2)
    x2 = X + 2 * 0.25 * f(Y)
    x3 = Y + 2 * 0.25 * g(x2)
    same(reference.forward(leapfrog(2, 0.25), [f, g], (X, Y)), x2, x3)


def test_momentum_net() -> None:
    f, g = blocks(2)
    v1 = 0.75 * X + 0.25 * f(Y)
    x1 = Y + v1
    v2 = 0.75 * v1 + 0.25 * g(x1)
    same(reference.forward(momentum_net(2, 0.75), [f, g], (X, Y)), v2, x1 + v2)


def test_grouped() -> None:
    f, g, h = blocks(3)
    y0 = X + f(Y + Z)
    y1 = Y + g(y0)
    same(reference.forward(grouped(3, 1), [f, g, h], (X, Y, Z)), y0, y1, Z + h(y1))


def test_reversible_columns() -> None:
    def block(*sources: Any) -> Any:
        total = sum(s.sum() for s in sources)
        return (np.tanh(0.1 * total), np.tanh(total))

    shapes = [row[: i + 1] for i, row in enumerate((X[0], Y[0], Z[0]))]

    def shaped(i: int) -> Any:
        return lambda *sources: tuple(np.full(shapes[i].shape, part) for part in block(*sources))

    a, b, c = shapes
    couple = Affine().forward
    a1 = couple(a, shaped(0)(b))
    b1 = couple(b, shaped(1)(a1, c))
    c1 = couple(c, shaped(2)(b1))
    same(reference.forward(reversible_columns(1, 3), [shaped(0), shaped(1), shaped(2)], shapes), a1, b1, c1)


def test_extra_arguments_and_aux() -> None:
    def block(x: Any, a: Any, scale: float = 1.0) -> Any:
        return x * a * scale, "aux", x.sum()

    streams, aux = reference.forward(revnet(1), [block], (X, Y), 2.0, scale=3.0)
    same(streams, Y, X + Y * 6)
    assert aux == [("aux", Y.sum())]


def test_bijections_and_anchors() -> None:
    class Scale:
        def forward(self, a: Any, b: Any) -> Any:
            return 2 * a, b

        def inverse(self, a: Any, b: Any) -> Any:
            return a / 2, b

    program = Program(
        [Bijection.permute((1, 0)), Bijection(), Bijection(lambda a, b: (a + b, b), lambda a, b: (a - b, b))]
    )
    out = reference.forward(program, [Scale()], (X, Y))
    same(out, 2 * Y + X, X)
    for got, expected in zip(reference.inverse(program, [Scale()], out), (X, Y), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14)
    anchored = Program([Anchor(), Couple(0, 1)])
    same(reference.forward(anchored, [lambda a, b: (a[:1], b[:1]), np.tanh], (X, Y)), X[:1] + np.tanh(Y[:1]), Y[:1])
    with pytest.raises(SpecError, match="step 0 is an Anchor, which has no inverse"):
        reference.inverse(anchored, [np.tanh, np.tanh], (X, Y))


def test_a_bijection_that_loses_streams() -> None:
    both = Program([Bijection(lambda a, b: (a, b, a), lambda a, b: (a, b, b))])
    with pytest.raises(SpecError, match=r"step 0 \(Bijection\) must return its 2 streams .* returned 3 of them"):
        reference.forward(both, [], (X, Y))
    with pytest.raises(SpecError, match=r"step 0 \(Bijection.inverse\) must return .* returned 3 of them"):
        reference.inverse(both, [], (X, Y))


@pytest.mark.parametrize(
    "program",
    [
        revnet(5, Momentum(0.9), 3),
        grouped(3, 2),
        momentum_net(4),
        Program(
            [Repeat(Couple(0, (1, 2), combine="sum"), 3), Bijection.permute((2, 0, 1)), Couple(1, 0)], 3, (2, 1, 0)
        ),
    ],
    ids=["revnet", "grouped", "momentum_net", "mixed"],
)
def test_inverse(program: Program) -> None:
    streams = (X, Y, Z)[: program.num_streams]
    out = reference.forward(program, blocks(program.num_blocks), streams)
    assert not all(np.allclose(a, b) for a, b in zip(out, streams, strict=True))
    for got, expected in zip(reference.inverse(program, blocks(program.num_blocks), out), streams, strict=True):
        assert np.linalg.norm(got - expected) <= 1e-14 * np.linalg.norm(expected)


def test_the_gradient_is_exact() -> None:
    """Of functions whose derivative is known in closed form, to the last digits."""
    at = {"a": X, "b": [Y, (Z,)]}
    got = reference.gradient(lambda t: (np.tanh(t["a"]) * t["b"][0]).sum() + (t["b"][1][0] ** 3).sum(), at)
    assert type(got["b"]) is list
    assert type(got["b"][1]) is tuple
    for grad, expected in ((got["a"], Y / np.cosh(X) ** 2), (got["b"][0], np.tanh(X)), (got["b"][1][0], 3 * Z**2)):
        assert np.linalg.norm(grad - expected) <= 4e-16 * np.linalg.norm(expected)


def test_the_directional_derivative_is_the_gradient_along_it() -> None:
    def function(t: Any) -> Any:
        y = reference.forward(revnet(4, Momentum(0.9)), blocks(4), tuple(t))
        return (y[0] * y[1]).sum()

    grad = reference.gradient(function, [X, Y])
    along = reference.directional(function, [X, Y], [Z, X])
    assert along == pytest.approx((grad[0] * Z).sum() + (grad[1] * X).sum(), rel=1e-14)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.forward(revnet(2), blocks(1), (X, Y)), "1 blocks came, but the program takes 2"),
        (
            lambda: reference.forward(revnet(1), cast(Any, None), (X, Y)),
            "blocks came as NoneType, expected a sequence of 1",
        ),
        (lambda: reference.forward(revnet(1), blocks(1), (X,)), "1 streams came, but the program has 2"),
        (lambda: reference.forward(revnet(1), blocks(1), X), "streams came as one ndarray, expected a tuple of 2"),
        (
            lambda: reference.forward(revnet(1), blocks(1), (X, cast(Any, 1.0))),
            "stream 1 came as float, expected a NumPy array",
        ),
        (
            lambda: reference.forward(revnet(1), blocks(1), (X, Y.astype(int))),
            "stream 1 came as a NumPy array of int64",
        ),
        (lambda: reference.forward(revnet(1), blocks(1), (X, Y[:1])), r"streams came with shapes \(2, 3\), \(1, 3\)"),
        (
            lambda: reference.forward(revnet(1), [lambda x: x[:1]], (X, Y)),
            r"block 0 returned shape \(1, 3\), but the stream",
        ),
        (lambda: reference.forward(revnet(1), [lambda x: 1], (X, Y)), "block 0 returned int, expected a NumPy array"),
        (
            lambda: reference.forward(revnet(1), [lambda x: x * 1j], (X, Y)),
            "step 0 turned a stream of float64, .* into complex128",
        ),
        (
            lambda: reference.forward(Program([Anchor()]), [lambda a, b: a], (X, Y)),
            r"must return its 2 streams as a tuple",
        ),
        (lambda: reference.forward(Program([Anchor()]), [lambda a, b: (a,)], (X, Y)), "but returned 1 of them"),
    ],
)
def test_it_says_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        call()
