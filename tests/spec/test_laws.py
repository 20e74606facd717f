"""Couplings keep their laws, and ``check_coupling`` catches those that do not, nearly do not, or cannot be tried."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from revcore import Additive, Affine, Coupling, Momentum, SpecError, check_coupling

GOOD = {
    "additive": Additive(),
    "half": Additive(0.5),
    "minus": Additive(-2),
    "momentum": Momentum(0.9),
    "slow momentum": Momentum(0.99),
    "fast momentum": Momentum(0.5),
    "affine": Affine(),
    "reflection": Coupling.from_functions(lambda x, f: f - x, lambda y, f: f - y),
    "gated": Coupling.from_functions(lambda x, f: x * (1 + f * f) + f, lambda y, f: (y - f) / (1 + f * f)),
}
OWN_VJP = (Additive, Momentum, Affine)


def library(name: str) -> Callable[[np.ndarray], Any] | None:
    if name == "numpy":
        return None
    if name == "torch":
        return importlib.import_module("torch").from_numpy
    jnp = importlib.import_module("jax.numpy")
    return jnp.asarray


LIBRARIES = pytest.mark.parametrize(
    "asarray", [library(name) for name in ("numpy", "torch", "jax")], ids=["numpy", "torch", "jax"]
)


# --- the laws, stated here a second time, in each dtype ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("coupling", GOOD.values(), ids=GOOD)
def test_inverse_undoes_forward(coupling: Coupling, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, *f = (rng.standard_normal((32, 8)).astype(dtype) for _ in range(1 + coupling.num_outputs))
    given: Any = f[0] if len(f) == 1 else tuple(f)
    y = coupling.forward(x, given)
    back = coupling.inverse(y, given)
    assert y.dtype == back.dtype == x.dtype
    assert y.shape == back.shape == x.shape
    size = sum(np.linalg.norm(a.astype(float)) for a in (x, y, *f))
    amplification = 1 / getattr(coupling, "beta", 1)
    assert np.linalg.norm(back.astype(float) - x.astype(float)) <= 4 * np.finfo(dtype).eps * amplification * size
    assert not np.array_equal(y, x)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("coupling", [c for c in GOOD.values() if type(c) in OWN_VJP], ids=repr)
def test_vjp_is_the_derivative(coupling: Coupling, dtype: str) -> None:
    """The derivative by the complex step in float64; ``vjp`` in each dtype."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(64).astype(dtype) for _ in range(1 + coupling.num_outputs)]
    gy = rng.standard_normal(64).astype(dtype)

    def forward(x: Any, *f: Any) -> Any:
        return coupling.forward(x, f[0] if len(f) == 1 else f)

    gx, gf = coupling.vjp(arrays[0], arrays[1] if coupling.num_outputs == 1 else tuple(arrays[1:]), gy)
    grads = [gx, *(gf if isinstance(gf, tuple) else (gf,))]
    assert len(grads) == len(arrays)
    for i, grad in enumerate(grads):
        moved = [a.astype(complex) for a in arrays]
        moved[i] += 1e-20j
        expected = gy.astype(float) * forward(*moved).imag / 1e-20  # element-wise, so its own Jacobian's diagonal
        assert grad.dtype == np.dtype(dtype)
        assert np.linalg.norm(grad - expected) <= 4 * np.finfo(dtype).eps * np.linalg.norm(expected)
        assert np.linalg.norm(expected) > 0


# --- check_coupling on what is right ----------------------------------------------------------------------------------


@LIBRARIES
@pytest.mark.parametrize("coupling", GOOD.values(), ids=GOOD)
def test_good_couplings_pass(coupling: Coupling, asarray: Any) -> None:
    report = check_coupling(coupling, asarray=asarray)
    assert report.ok
    assert {"float32", "float16"} <= set(report.round_trip)
    assert all(0 <= error < 0.02 for error in report.round_trip.values())
    assert (report.vjp_error is None) == (type(coupling) not in OWN_VJP)


@pytest.mark.parametrize(
    ("coupling", "expected"), [(Additive(), 1), (Additive(3), 1), (Momentum(0.9), 1 / 0.9), (Momentum(0.5), 2)], ids=str
)
def test_amplification(coupling: Coupling, expected: float) -> None:
    assert check_coupling(coupling).amplification == pytest.approx(expected, rel=1e-6)


def test_the_report_reads_well() -> None:
    text = str(check_coupling(Momentum(0.5)))
    assert text.splitlines()[0] == "Momentum: a coupling with a true inverse"
    for words in (
        "round trip in float64",
        "round trip in float16",
        "error of one inverse step grows by 2",
        "vjp error",
    ):
        assert words in text
    assert "vjp left to autodiff" in str(check_coupling(GOOD["gated"]))


def test_it_touches_no_global_random_state() -> None:
    before = np.random.get_state()  # noqa: NPY002
    check_coupling(Affine())
    assert all(np.array_equal(a, b) for a, b in zip(before, np.random.get_state(), strict=True))  # noqa: NPY002
    assert check_coupling(Affine()) == check_coupling(Affine())


def test_a_coupling_that_holds_an_array_is_tried_on_its_shape() -> None:
    scale = np.linspace(0.5, 2, 6).reshape(2, 3)
    learned = Coupling.from_functions(
        lambda x, f: (x * scale).astype(x.dtype) + f, lambda y, f: ((y - f) / scale).astype(y.dtype)
    )
    assert check_coupling(learned, shape=(2, 3)).ok


# --- check_coupling on what is wrong ----------------------------------------------------------------------------------


@LIBRARIES
@pytest.mark.parametrize("beta", [0.99, 0.9])
def test_the_momentum_net_example_of_the_seed_is_caught(beta: float, asarray: Any) -> None:
    """The README of revlib 1.0.1: its ``output / beta`` lacks ``(1 - beta)·f / beta``."""
    seed = Coupling.from_functions(
        lambda other, out: other * beta + out * (1 - beta), lambda y, out: y / beta - out * (1 - beta)
    )
    c = f"{1 - beta:.6g}"
    with pytest.raises(SpecError) as caught:
        check_coupling(seed, asarray=asarray)
    message = str(caught.value)
    assert "inverse(forward(x, f), f) is off by" in message
    assert f"forward is y = {beta}·x + {c}·f, whose inverse is x = (y - {c}·f) / {beta}" in message
    size = float(message.partition("off by ")[2].split()[0])
    assert size == pytest.approx((1 - beta) ** 2 / beta, rel=0.3), "‖f‖/‖x‖ ≈ 1 times the missing term"
    allowed = float(message.partition("would explain ")[2].partition(")")[0])
    assert allowed < size / 5


@pytest.mark.parametrize("beta", [0.99, 0.9])
def test_the_inverse_that_the_message_names_is_right(beta: float) -> None:
    right = Coupling.from_functions(lambda x, f: x * beta + f * (1 - beta), lambda y, f: (y - f * (1 - beta)) / beta)
    assert check_coupling(right).round_trip["float64"] < 1e-14


def wrong_vjp(pull: Callable[[Momentum, Any, Any, Any], Any]) -> Coupling:
    return type("WrongMomentum", (Momentum,), {"vjp": lambda self, x, f, gy: pull(self, x, f, gy)})(0.9)


class WrongAffine(Affine):
    def vjp(self, x: Any, f: Any, gy: Any) -> Any:
        gx, (g_scale, g_shift) = super().vjp(x, f, gy)
        return gx, (g_scale, 2 * g_shift)


def _nan(x: Any, f: Any) -> Any:
    return x / 0.0 * 0.0 + f


def _cast(x: Any, f: Any) -> Any:
    return (x + f).astype("float32")


def _pair(forward: Callable[..., Any], inverse: Callable[..., Any]) -> Coupling:
    return Coupling.from_functions(forward, inverse)


INVERSE = r"inverse\(forward\(x, f\), f\) is off by "
BAD: dict[str, tuple[Coupling, str]] = {
    "its own inverse": (
        _pair(lambda x, f: x + f, lambda y, f: y + f),
        INVERSE + ".*whose inverse is x = .y - 1·f. / 1",
    ),
    "nearly right": (_pair(lambda x, f: x + f, lambda y, f: y - f * (1 + 1e-6)), INVERSE + r"[0-9.]+e-0[67]"),
    "nearly right by 1e-12": (_pair(lambda x, f: x + f, lambda y, f: y - f * (1 + 1e-12)), INVERSE + r"[0-9.]+e-1[23]"),
    "forgets": (_pair(lambda x, f: f, lambda y, f: y), INVERSE + ".*forward is not linear in x"),
    "not one to one": (_pair(lambda x, f: x * x + f, lambda y, f: abs(y - f) ** 0.5), INVERSE + ".*not linear in x"),
    "linear by element": (
        _pair(lambda x, f: x * (2 + f * f) + f, lambda y, f: y - f),
        INVERSE + r".*linear in x, so its inverse is x = \(y - forward\(0, f\)\) / \(forward\(1, f\)",
    ),
    "nan": (_pair(_nan, lambda y, f: y), "forward gave non-finite values"),
    "nan inverse": (_pair(lambda x, f: x + f, lambda y, f: (y - f) * np.nan), INVERSE + "nan"),
    "narrows": (
        _pair(_cast, lambda y, f: y - f),
        "turned x of float64, shape .64,., into float32.*keeps the stream's dtype",
    ),
    "widens": (
        _pair(lambda x, f: (x + f).astype("float64"), lambda y, f: y - f),
        "turned x of float32 into float64: a coupling keeps the stream's dtype",
    ),
    "reshapes": (
        _pair(lambda x, f: (x + f)[:1], lambda y, f: y),
        r"turned x of float64, shape \(64,\), into float64, shape \(1,\)",
    ),
    "mixes elements": (_pair(lambda x, f: np.roll(x, 1) + f, lambda y, f: y - f), INVERSE),
    # the adjoint of the old library: forward, applied to gradients
    "forward as its vjp": (
        wrong_vjp(lambda c, x, f, gy: (c.forward(gy, 0 * gy), c.forward(gy, 0 * gy))),
        "gradient of f.0. gives",
    ),
    "vjp of additive": (
        wrong_vjp(lambda c, x, f, gy: (gy, gy)),
        "vjp's gradient of x gives .* but forward's derivative there is",
    ),
    "vjp swapped": (wrong_vjp(lambda c, x, f, gy: Momentum.vjp(c, x, f, gy)[::-1]), "vjp's gradient of x"),
    "vjp zero": (wrong_vjp(lambda c, x, f, gy: (0.9 * gy, 0 * gy)), r"vjp's gradient of f\[0\] gives 0 "),
    "vjp nan": (wrong_vjp(lambda c, x, f, gy: (0.9 * gy, np.nan * gy)), r"vjp's gradient of f\[0\] gives nan"),
    "vjp of the second array": (WrongAffine(), r"vjp's gradient of f\[1\] gives"),
    "vjp nearly": (wrong_vjp(lambda c, x, f, gy: (0.9 * gy, 0.1 * (1 + 1e-6) * gy)), r"vjp's gradient of f\[0\]"),
}


@pytest.mark.filterwarnings("ignore:.*(invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize(("coupling", "message"), BAD.values(), ids=BAD)
def test_bad_couplings_are_caught(coupling: Coupling, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_coupling(coupling)


@pytest.mark.parametrize("missing", ["forward", "inverse"])
def test_a_coupling_that_lacks_a_function(missing: str) -> None:
    have = "inverse" if missing == "forward" else "forward"
    coupling = type("Half", (Coupling,), {have: lambda self, a, f: a})()
    with pytest.raises(NotImplementedError, match=rf"Half has no {missing}\("):
        check_coupling(coupling)


@pytest.mark.parametrize(("factor", "ok"), [(1, True), (1 + 1e-6, False), (2, False)])
@LIBRARIES
def test_a_coupling_of_real_numbers_only_is_differentiated_by_differences(
    factor: float, ok: bool, asarray: Any
) -> None:
    def forward(self: Coupling, x: Any, f: Any) -> Any:
        if "complex" in str(x.dtype):
            raise TypeError("real numbers only")
        return x + f * f * f

    body = {"forward": forward, "inverse": lambda self, y, f: y - f * f * f}
    coupling = type("Cubed", (Coupling,), body | {"vjp": lambda self, x, f, gy: (gy, factor * 3 * f * f * gy)})()
    wide = asarray is None or np.asarray(asarray(np.zeros(1))).dtype == np.float64
    if ok:
        assert check_coupling(coupling, asarray=asarray).vjp_error < (1e-9 if wide else 1e-3)  # type: ignore[operator]
    elif wide or factor == 2:  # float32 cannot tell 1e-6
        with pytest.raises(SpecError, match=r"vjp's gradient of f\[0\] gives"):
            check_coupling(coupling, asarray=asarray)
