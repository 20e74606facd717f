"""Couplings keep their laws, and ``check_coupling`` catches those that do not, nearly do not, or cannot be tried."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from revcore import BDIA, Additive, Affine, Coupling, Exact, Momentum, SpecError, check_coupling
from tests import tiers

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


@pytest.mark.parametrize(
    ("name", "coupling"),
    # JAX compiles each operation for each dtype and shape
    tiers.product(
        ["numpy", "torch", "jax"],
        GOOD.values(),
        fast=lambda name, coupling: name != "jax" or coupling is GOOD["affine"],
        name=lambda value: value if isinstance(value, str) else next(key for key in GOOD if GOOD[key] is value),
    ),
)
def test_good_couplings_pass(coupling: Coupling, name: str, quick_compilation: None) -> None:
    report = check_coupling(coupling, asarray=library(name))
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
        "turned x of float32, shape .64,., into float64, shape .64,.: a coupling keeps the stream's dtype",
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


# --- values, shapes and dtypes at which a fault hides -----------------------------------------------------------------


def _add(x: Any, f: Any) -> Any:
    return x + f


def _take(y: Any, f: Any) -> Any:
    return y - f


def _only(where: Callable[[Any], bool]) -> Coupling:
    """Additive, with an inverse that is wrong where ``where`` says so of an array."""
    return _pair(_add, lambda y, f: y - 2 * f if where(y) else y - f)


HIDDEN: dict[str, tuple[Coupling, str]] = {
    "clamps in inverse": (_pair(_add, lambda y, f: np.clip(y - f, -1e9, 1e9)), INVERSE + ".* x is of size 1e.77"),
    "clamps in forward": (_pair(lambda x, f: np.clip(x, -1e9, 1e9) + f, _take), INVERSE + ".* x is of size 1e.77"),
    "clamps a block's output": (_pair(lambda x, f: x + np.clip(f, -9, 9), _take), INVERSE + ".* f of size 1e.77"),
    "overflows on its way back": (
        _pair(_add, lambda y, f: np.copysign(np.sqrt(np.square(y - f)), y - f)),
        INVERSE + "inf of x in float64 where x is of size 9e.184",
    ),
    "drops small": (_pair(_add, lambda y, f: (y - f) * (abs(y - f) > 1e-6)), INVERSE + ".* x is of size 0.0001"),
    "drops tiny": (_pair(_add, lambda y, f: (y - f) * (abs(y - f) > 1e-100)), INVERSE + ".* x is of size 3e-185"),
    "0 / 0 in inverse": (_pair(_add, lambda y, f: (y - f) / (y - f) * (y - f)), INVERSE + ".* x is of size 0"),
    "0 / 0 in forward": (_pair(lambda x, f: x + f / f * f, _take), "forward gave non-finite values .* f of size 0"),
    "hides NaN in forward": (
        _pair(lambda x, f: np.where(np.isnan(x), 0, x).astype(x.dtype) + f, _take),
        r"with nan in one element of x, inverse\(forward\(x, f\), f\) gives 0 for an x of nan: what is not finite must",
    ),
    "hides a block's NaN": (
        _pair(lambda x, f: x + f, lambda y, f: np.where(np.isnan(y - f), 0, y - f).astype(y.dtype)),
        "with nan in one element of (x|f)",
    ),
    "hides infinity": (
        _pair(lambda x, f: x + f, lambda y, f: np.where(np.isinf(y), 0, y - f).astype(y.dtype)),
        "with inf in one element of x.* for an x of inf",
    ),
    "0-d becomes 1-d": (_pair(lambda x, f: np.atleast_1d(x + f), _take), r"shape \(\), into float64, shape \(1,\)"),
    "of one element": (_only(lambda y: y.size == 1 and y.ndim == 1), INVERSE + r".* on shape \(1,\)"),
    "of odd size": (_only(lambda y: y.ndim == 1 and y.size % 2 == 1 and y.size > 1), INVERSE + r".* on shape \(7,\)"),
    "of rank 2": (_only(lambda y: y.ndim == 2), INVERSE + r".* on shape \(3, 5\)"),
    "of rank 3": (_only(lambda y: y.ndim == 3), INVERSE + r".* on shape \(2, 3, 5\)"),
    "of rank 4": (_only(lambda y: y.ndim == 4), INVERSE + r".* on shape \(2, 1, 3, 5\)"),
    "in float16": (_only(lambda y: y.dtype == np.float16), INVERSE + ".* in float16"),
    "of complex numbers": (_pair(_add, lambda y, f: np.conj(y - f)), INVERSE + ".* in complex128"),
    "makes them real": (_pair(_add, lambda y, f: (y - f).real), "inverse turned y of complex128.* into float64"),
    "inverse widens": (
        _pair(_add, lambda y, f: (y - f).astype(np.promote_types(y.dtype, "float64"))),
        "inverse turned y of float32.* into float64.*keeps the stream's dtype",
    ),
    "returns nothing": (_pair(lambda x, f: None, _take), "forward returned NoneType, expected an array like x"),
}


@pytest.mark.parametrize(("coupling", "message"), HIDDEN.values(), ids=HIDDEN)
def test_a_fault_of_some_values_alone_is_found(coupling: Coupling, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_coupling(coupling)


@pytest.mark.parametrize("asarray", [library("torch"), library("jax")], ids=["torch", "jax"])
def test_a_fault_in_bfloat16_is_found(asarray: Any) -> None:
    with pytest.raises(SpecError, match=INVERSE + ".* in bfloat16"):
        check_coupling(_only(lambda y: "bfloat16" in str(y.dtype)), asarray=asarray)


# --- functions that are none ------------------------------------------------------------------------------------------


class Stateful(Coupling):
    """Additive, but for what ``spoil(calls)`` says of the function's calls so far."""

    def __init__(self, role: str, spoil: Callable[[int], bool]) -> None:
        self.role, self.spoil, self.calls = role, spoil, 0

    def _factor(self, role: str) -> float:
        self.calls += role == self.role
        return 1 + 1e-14 * (role == self.role and self.spoil(self.calls))

    def forward(self, x: Any, f: Any) -> Any:
        return self._factor("forward") * x + f

    def inverse(self, y: Any, f: Any) -> Any:
        return self._factor("inverse") * (y - f)

    def vjp(self, x: Any, f: Any, gy: Any) -> Any:
        return gy, self._factor("vjp") * gy


class Remembering(Coupling):
    """Right, if inverse comes directly after its forward."""

    def forward(self, x: Any, f: Any) -> Any:
        self.x = x
        return 0 * x + f

    def inverse(self, y: Any, f: Any) -> Any:
        return self.x


@pytest.mark.parametrize("role", ["forward", "inverse", "vjp"])
@pytest.mark.parametrize("every", [2, 3])
def test_state_between_calls_is_found(role: str, every: int) -> None:
    with pytest.raises(SpecError, match=f"Stateful: {role} gave other numbers for the same .* keep nothing between"):
        check_coupling(Stateful(role, lambda calls: calls % every == 0))
    check_coupling(Stateful(role, lambda calls: False))


def test_a_coupling_that_remembers_its_input_is_found() -> None:
    with pytest.raises(SpecError, match="Remembering: inverse gave other numbers"):
        check_coupling(Remembering())


class InPlace(Affine):
    """``x + t``, whose functions may write into one of their arguments."""

    def __init__(self, role: str, which: str) -> None:
        self.role, self.which = role, which

    def _write(self, role: str, **given: Any) -> None:
        if role == self.role:
            given[self.which] += 1.0

    def forward(self, x: Any, f: Any) -> Any:
        y = x + f[1]
        self._write("forward", x=x, first=f[0], second=f[1])
        return y

    def inverse(self, y: Any, f: Any) -> Any:
        x = y - f[1]
        self._write("inverse", y=y, first=f[0], second=f[1])
        return x

    def vjp(self, x: Any, f: Any, gy: Any) -> Any:
        grads = gy + 0, (0 * gy, gy + 0)
        self._write("vjp", x=x, first=f[0], second=f[1], gy=gy)
        return grads


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("role", "which", "told"),
    [
        ("forward", "x", "x"),
        ("forward", "first", r"f\[0\]"),
        ("forward", "second", r"f\[1\]"),
        ("inverse", "y", "y"),
        ("inverse", "second", r"f\[1\]"),
        ("vjp", "gy", "gy"),
        ("vjp", "x", "x"),
    ],
)
def test_a_write_into_an_argument_is_found(role: str, which: str, told: str, name: str) -> None:
    with pytest.raises(SpecError, match=f"InPlace: {role} changed {told} in place"):
        check_coupling(InPlace(role, which), asarray=library(name))


def test_that_coupling_is_right_but_for_its_writes() -> None:
    assert check_coupling(InPlace("nowhere", "x")).vjp_error < 1e-15  # type: ignore[operator]


# --- gradients that are wrong somewhere -------------------------------------------------------------------------------


class Squared(Coupling):
    """``x·(1 + f²)`` with the gradient that ``pull`` makes of the right one."""

    def __init__(self, pull: Callable[..., Any]) -> None:
        self.pull = pull

    def forward(self, x: Any, f: Any) -> Any:
        return x * (1 + f * f)

    def inverse(self, y: Any, f: Any) -> Any:
        return y / (1 + f * f)

    def vjp(self, x: Any, f: Any, gy: Any) -> Any:
        return self.pull(x, f, gy, (1 + f * f) * gy, 2 * x * f * gy)


PULLS: dict[str, tuple[Callable[..., Any], str]] = {
    "of positive x alone": (lambda x, f, gy, gx, gf: (gx, gf * (x > 0)), r"gradient of f\[0\] gives"),
    "of positive f alone": (lambda x, f, gy, gx, gf: (gx, abs(f) * 2 * x * gy), r"gradient of f\[0\] gives"),
    "of positive gy alone": (lambda x, f, gy, gx, gf: (gx * (gy > 0), gf), "gradient of x gives"),
    "of x below 20": (lambda x, f, gy, gx, gf: (gx, gf * (abs(x) < 20)), r"gradient of f\[0\] gives"),
    "of gy below 20": (lambda x, f, gy, gx, gf: (gx * (abs(gy) < 20), gf), "gradient of x gives"),
    "of gy above 0.001": (lambda x, f, gy, gx, gf: (gx * (abs(gy) > 1e-3), gf), "gradient of x gives"),
    "summed": (lambda x, f, gy, gx, gf: (gx, gf.sum()), r"gradient of f\[0\] is float.., shape \(\), expected float"),
    "two for one": (lambda x, f, gy, gx, gf: (gx, (gf, gf)), r"vjp returned 2 gradients of f, expected 1: return"),
}


@pytest.mark.parametrize("name", ["numpy", "torch", pytest.param("jax", marks=pytest.mark.long)])
@pytest.mark.parametrize(("pull", "message"), PULLS.values(), ids=PULLS)
def test_a_vjp_that_is_wrong_somewhere_is_found(pull: Callable[..., Any], message: str, name: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_coupling(Squared(pull), asarray=library(name))


def test_a_vjp_that_widens_or_hides_nan_is_found() -> None:
    with pytest.raises(SpecError, match=r"gradient of f\[0\] is float64, shape \(64,\), expected float32"):
        check_coupling(Squared(lambda x, f, gy, gx, gf: (gx, gf.astype("float64"))))
    with pytest.raises(SpecError, match="gradient of x is finite though gy holds NaN"):
        check_coupling(Squared(lambda x, f, gy, gx, gf: (np.nan_to_num(gx), gf)))
    assert check_coupling(Squared(lambda x, f, gy, gx, gf: (gx, gf))).vjp_error == pytest.approx(0, abs=1e-14)


# --- right couplings that are hard to judge ---------------------------------------------------------------------------

RIGHT: dict[str, Coupling] = {
    "bdia": BDIA(-0.5),
    "large scale": Additive(1e6),
    "small rate": Momentum(0.01),
    "exact": Exact(Additive()),
    "exact momentum": Exact(Momentum(0.9), guard=1),
    "exact bdia": Exact(BDIA(), bits=20),
    "behind a softsign": _pair(lambda x, f: x / (1 + abs(x)) + f, lambda y, f: (y - f) / (1 - abs(y - f))),
    "overflows as sinh": _pair(lambda x, f: np.sinh(x) + f, lambda y, f: np.arcsinh(y - f)),
    "flat at 0": _pair(lambda x, f: x * x * x + f, lambda y, f: np.cbrt(y - f)),
    "by way of 1": _pair(lambda x, f: (x + 1) * (f * f + 1) - 1, lambda y, f: (y + 1) / (f * f + 1) - 1),
    "of real numbers": _pair(
        lambda x, f: np.where(x > 0, x, x / 4) + f, lambda y, f: np.where(y > f, y - f, (y - f) * 4)
    ),
    "permutes": _pair(lambda x, f: x[..., ::-1] + f, lambda y, f: (y - f)[..., ::-1]),
    "mixes": _pair(lambda x, f: x / (2 + np.tanh(f.mean())) + f, lambda y, f: (y - f) * (2 + np.tanh(f.mean()))),
}


@pytest.mark.parametrize("coupling", RIGHT.values(), ids=RIGHT)
def test_a_right_coupling_is_not_accused(coupling: Coupling) -> None:
    assert check_coupling(coupling).ok


def test_couplings_written_with_a_frameworks_functions_are_not_accused() -> None:
    import jax
    import torch

    def gate(f: Any) -> Any:
        return torch.nn.functional.softplus(f) + 0.5

    couplings = [
        _pair(lambda x, f: torch.lerp(f, x, 0.9), lambda y, f: (y - 0.1 * f) / 0.9),
        _pair(lambda x, f: x * gate(f), lambda y, f: y / gate(f)),
        _pair(lambda x, f: x * torch.exp(f) + f, lambda y, f: (y - f) * torch.exp(-f)),
        _pair(lambda x, f: torch.nn.functional.elu(x) + f, lambda y, f: torch.where(y > f, y - f, torch.log1p(y - f))),
    ]
    for coupling in couplings:
        assert "bfloat16" in check_coupling(coupling, asarray=torch.from_numpy).round_trip

    doubled = _pair(lambda x, f: x * (1 + jax.nn.sigmoid(f)), lambda y, f: y / (1 + jax.nn.sigmoid(f)))
    assert "bfloat16" in check_coupling(doubled, shape=(7,), asarray=jax.numpy.asarray).round_trip


def test_the_report_says_what_was_tried() -> None:
    report = check_coupling(RIGHT["permutes"])
    assert report.shapes == ((64,), (1,), (7,), (3, 5), (2, 3, 5), (2, 1, 3, 5)), "0-d cannot be indexed"
    assert list(report.round_trip) == ["float64", "float32", "float16", "complex128", "complex64"]
    assert "complex128" not in check_coupling(RIGHT["of real numbers"]).round_trip
    assert check_coupling(RIGHT["exact"]).round_trip == {"float64": 0.0, "float32": 0.0}
    assert "float16" not in check_coupling(RIGHT["large scale"]).round_trip, "where it overflows"


def test_an_exact_coupling_that_loses_a_bit_is_found() -> None:
    class Late(Exact):
        def restore(self, y: Any, f: Any, carry: Any) -> Any:
            x, wrong = super().restore(y, f, carry)
            return x + 2.0**-12 * (np.arange(x.size).reshape(x.shape) == 3), wrong

    with pytest.raises(SpecError, match=INVERSE + ".*An exact coupling gives its stream back bit for bit"):
        check_coupling(Late(Additive()))
    with pytest.raises(SpecError, match="bits came as 40"):
        check_coupling(Exact(Additive(), bits=40), asarray=library("jax"))
