"""The comparison says no whenever it must: each failure is made here, and found."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import revcore
from revcore.parity import EPS, Record, compare, to_numpy
from tests.helpers import assert_close, flat, tree_error

RNG = np.random.default_rng(0)
TREE = {"0.weight": RNG.standard_normal((4, 3)), "0.bias": RNG.standard_normal(4), "1.scale": RNG.standard_normal(())}


def gradients(tree: dict[str, Any], **options: Any) -> Record:
    return Record(gradients=tree, **{"depth": 4, "dtype": "float64", **options})


def changed(**arrays: Any) -> dict[str, Any]:
    return {**TREE, **{name.replace("__", "."): array for name, array in arrays.items()}}


def test_equal_trees_agree() -> None:
    report = compare(gradients(TREE), gradients(dict(reversed(TREE.items()))))
    assert report.ok
    assert report.gradient_error == 0
    assert report.value_error is None
    assert report.problems == ()
    assert report.verdict == "a and b agree: gradients differ by 0 depth·eps, 16 are allowed (depth 4, float64)."


def test_the_limit_is_in_units_of_depth_eps() -> None:
    unit = 4 * EPS["float64"]
    for factor, ok in ((15.0, True), (17.0, False)):
        moved = {name: array * (1 + factor * unit) for name, array in TREE.items()}
        report = compare(gradients(moved), gradients(TREE))
        assert report.ok is ok
        assert report.gradient_error == pytest.approx(factor * unit, rel=0.05)
        assert compare(gradients(moved), gradients(TREE), depth=8).ok
        assert compare(gradients(moved), gradients(TREE), limit=20).ok
        assert compare(gradients(moved), gradients(TREE), dtype="float32").ok


def test_the_coarser_dtype_counts() -> None:
    report = compare(gradients(TREE, dtype="float32"), gradients(TREE))
    assert report.dtype == "float32"


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (changed(**{"0__bias": np.array([1.0, np.nan, 0, 0])}), "gradient 0.bias is not finite in a"),
        (changed(**{"0__bias": np.array([1.0, np.inf, 0, 0])}), "gradient 0.bias is not finite in a"),
        ({k: v for k, v in TREE.items() if k != "0.bias"}, "gradient 0.bias is missing in a"),
        ({**TREE, "2.bias": np.ones(2)}, "gradient 2.bias is missing in b"),
        (changed(**{"0__bias": TREE["0.bias"][:, None]}), "gradient 0.bias has shape (4, 1) in a, but (4,) in b"),
        (changed(**{"1__scale": np.full(4, TREE["1.scale"])}), "gradient 1.scale has shape (4,) in a, but () in b"),
        ({name: 0 * array for name, array in TREE.items()}, "all gradients are zero in a"),
        ({}, "gradient 0.weight is missing in a"),
    ],
    ids=["nan", "inf", "missing", "unexpected", "shape", "broadcast", "zero", "empty"],
)
def test_each_failure_is_found(tree: dict[str, Any], reason: str) -> None:
    report = compare(gradients(tree), gradients(TREE))
    assert not report.ok
    assert reason in report.problems
    assert "do NOT agree" in report.verdict
    assert reason.split(" ", 1)[1] in str(report)
    mirrored = compare(gradients(TREE), gradients(tree))
    assert not mirrored.ok
    with pytest.raises(AssertionError, match="do NOT agree"):
        tree_error(tree, TREE)
    with pytest.raises(AssertionError, match="do NOT agree"):
        assert_close(TREE, tree, depth=10)


@pytest.mark.parametrize("tree", [{"w": np.zeros(3)}, {"w": np.full(3, np.nan)}, {}], ids=["zero", "nan", "empty"])
def test_what_is_wrong_on_both_sides_is_not_equal(tree: dict[str, Any]) -> None:
    assert not compare(gradients(tree), gradients(tree)).ok
    assert not compare(Record(tree, dtype="float64"), Record(tree, dtype="float64")).ok


def test_gradients_of_one_side_only() -> None:
    report = compare(Record({"loss": 1.0}, TREE), Record({"loss": 1.0}))
    assert not report.ok
    assert report.problems[0] == "gradient 0.weight is missing in b"


def test_a_tolerance_that_proves_nothing() -> None:
    report = compare(gradients(TREE, dtype="bfloat16"), gradients(TREE, dtype="bfloat16"))
    assert not report.ok
    assert "proves nothing" in report.verdict
    assert not compare(gradients(TREE), gradients(TREE), limit=math.nan).ok


def test_values_are_judged_too() -> None:
    report = compare(
        Record({"output": np.ones(3), "loss": 2.0}, TREE), Record({"output": np.ones(3), "loss": 2.1}, TREE)
    )
    assert not report.ok
    assert report.gradient_error == 0
    assert report.value_error == pytest.approx(0.1 / math.sqrt(3 + 2.1**2))


def test_a_leaf_that_is_nearly_zero_does_not_decide() -> None:
    a, b = changed(**{"0__bias": np.full(4, 1e-20)}), changed(**{"0__bias": np.full(4, -1e-20)})
    report = compare(gradients(a), gradients(b))
    assert report.ok
    assert "2.0e+00" in report.table()  # relative to itself: shown


# A large tree, and a tensor in it that is small, but far above what rounding leaves.
LARGE = {"large": RNG.standard_normal((300, 300)), "small": 1e-4 * RNG.standard_normal(50)}


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (np.zeros(50), r"small is zero in a, and of norm 0\.000\d+ in b"),
        (-LARGE["small"], "small has another sign in a than in b"),
        (LARGE["small"] * (np.arange(50) != abs(LARGE["small"]).argmax()), r"small differs by .*e-0\d of itself"),
        (LARGE["small"] * 1.3, r"small differs by 3\.0e-01 of itself"),
    ],
    ids=["zero", "sign", "sparse", "scaled"],
)
@pytest.mark.parametrize("kind", ["values", "gradients"])
def test_a_wrong_tensor_that_the_whole_tree_hides_is_named(wrong: np.ndarray, fault: str, kind: str) -> None:
    rounded: dict[str, Any] = {"large": LARGE["large"] * (1 + 5.5e-6), "small": wrong}
    trees: list[dict[str, Any]] = [{kind: rounded}, {kind: LARGE}]
    a, b = (Record(**tree, depth=4, dtype="float32") for tree in trees)
    report = compare(a, b)
    error = report.value_error if kind == "values" else report.gradient_error
    assert error is not None
    assert error <= report.limit * report.unit, "hidden"
    assert not report.ok
    assert re.fullmatch(f"{kind[:-1]} {fault}", report.problems[0])
    assert report.problems[0] in report.verdict
    assert f"{kind[:-1]} small" in report.table(limit=1)
    mirrored = compare(b, a)
    assert not mirrored.ok


def test_a_tensor_that_is_zero_but_for_rounding_is_not_accused() -> None:
    """As where a bias stands before a batch norm: noise on both sides, or on one."""
    noise = [{**LARGE, "small": 1e-7 * RNG.standard_normal(50)} for _ in range(2)]
    for tree in (noise[0], {**LARGE, "small": np.zeros(50)}):
        report = compare(gradients(tree, dtype="float32"), gradients(noise[1], dtype="float32"))
        assert report.ok, report.verdict
        assert report.rows[1].fault == ""
    assert not compare(gradients(noise[0]), gradients(noise[1])).ok, "in float64 it is no rounding"


def test_the_bias_before_a_batch_norm_is_not_accused() -> None:
    """In torch, in float32 held against float64."""
    torch = pytest.importorskip("torch")
    from torch import nn

    from revcore_torch import ReversibleSequential
    from revcore_torch.parity import record

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)]
    model, x = ReversibleSequential(*blocks), RNG.standard_normal((64, 16))
    narrow, wide = (record(model, [x], dtype=dtype) for dtype in ("float32", "float64"))
    report = compare(narrow, wide)
    biases = [row for row in report.rows if row.name.endswith(".0.bias")]
    assert len(biases) == 4
    assert all(row.error > row.norm for row in biases), "rounding alone"
    assert report.ok, f"\n{report}"


def test_a_wrong_whole_is_no_list_of_its_tensors() -> None:
    report = compare(gradients({name: 2 * array for name, array in TREE.items()}), gradients(TREE))
    assert not report.ok
    assert report.problems == ()
    assert all(row.fault == "differs by 1.0e+00 of itself" for row in report.rows)


def test_squares_are_summed_in_float64() -> None:
    big, small = np.full(4, 1e30, np.float32), np.full(4, 1e-30, np.float32)
    for array in (big, small):  # whose squares float32 cannot hold
        report = compare(gradients({"w": array * np.float32(1.001)}), gradients({"w": array}))
        assert report.gradient_error == pytest.approx(1e-3, rel=1e-3)
    halves = np.full(4, 60000, np.float16)
    assert compare(gradients({"w": -halves}), gradients({"w": halves})).gradient_error == 2


def test_the_table_lines_up_worst_first_and_ends() -> None:
    b = {f"{i}.weight": np.ones(10) * 10.0**-i for i in range(30)}
    a = {name: array * (1 + 1e-9) for name, array in b.items()} | {"29.weight": np.full(10, np.nan)}
    lines = compare(gradients(a), gradients(b)).table(limit=5).splitlines()
    assert lines[2].startswith("gradient 29.weight")
    assert [line.split()[1] for line in lines[3:7]] == [f"{i}.weight" for i in range(4)]
    assert lines[7].startswith("all gradients")
    assert "the worst 5 of 30" in lines[-1]
    assert len({len(line) for line in lines[3:8]}) == 1
    assert "\x1b" not in "".join(lines)


def test_arrays_of_both_frameworks() -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    weight = RNG.standard_normal((3, 2)).astype(np.float32)
    for dtype in ("float32", "bfloat16", "float16"):
        t = torch.from_numpy(weight).to(getattr(torch, dtype)).requires_grad_()
        j = jax.numpy.asarray(weight).astype(dtype)
        assert_close({"w": t}, {"w": j})
    assert_close({"w": torch.tensor([1 + 2j, 3]).conj()}, {"w": np.array([1 - 2j, 3])})
    with pytest.raises(revcore.SpecError, match="expected an array of numbers, got str"):
        to_numpy("no array")


class OnlyDlpack:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def test_arrays_of_any_library_by_dlpack() -> None:
    assert_close(OnlyDlpack(np.arange(3.0)), np.arange(3.0))


@pytest.fixture
def no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would bring an array to the host, where NumPy sees it, fails."""
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an array was copied to the host")

    for name in ("cpu", "numpy", "__array__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(type(jax.numpy.ones(1)), "__array__", refuse)
    monkeypatch.setattr("revcore.parity.to_numpy", refuse)  # NumPy sees JAX's memory on a CPU without asking it


@pytest.mark.usefixtures("no_host")
@pytest.mark.parametrize("order", [1, -1], ids=["torch against JAX", "JAX against torch"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "complex64", "int32", "bool"])
def test_arrays_on_one_device_are_measured_there(dtype: str, order: int) -> None:
    import jax
    import torch

    with jax.enable_x64(True):
        right = jax.numpy.asarray([[1, 0, 1], [1, 1, 0]]).astype(dtype)
    kind = getattr(torch, dtype)
    left = torch.tensor([[1, 0, 1], [1, 1, 1]]).to(kind).requires_grad_(kind.is_floating_point or kind.is_complex)
    report = compare(*(gradients({"w": x}) for x in (left, right)[::order]))
    assert report.gradient_error == pytest.approx(1 / math.sqrt(4 if order == 1 else 5))
    assert not report.problems


@pytest.mark.usefixtures("no_host")
def test_the_test_above_would_notice() -> None:
    import jax
    import torch

    for array in (jax.numpy.ones(2), torch.ones(2)):
        with pytest.raises(AssertionError, match="copied to the host"):
            compare(gradients({"w": array}), gradients({"w": np.ones(2)}))


def test_float64_is_not_halved_on_its_way() -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    assert not jax.config.jax_enable_x64
    left, right = torch.full((3,), 1 + 1e-12, dtype=torch.float64), jax.numpy.ones(3)
    for a, b in ((left, right), (right, left)):
        error = compare(gradients({"w": a}), gradients({"w": b})).gradient_error
        assert error == pytest.approx(1e-12, rel=1e-3)


@pytest.mark.usefixtures("no_host")
def test_two_arrays_of_jax_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which is made believe: in float64 though x64 is off, and on the device."""
    import jax

    monkeypatch.setattr("revcore.dlpack._is_on_cpu", lambda array: False)
    big = jax.numpy.full(4, 1e30)  # whose squares float32 cannot hold
    report = compare(gradients({"w": big * 2}), gradients({"w": big}))
    assert report.gradient_error == pytest.approx(1)
    bad = compare(gradients({"w": big * np.float32(np.nan)}), gradients({"w": big}))
    assert bad.problems == ("gradient w is not finite in a",)


def test_arrays_without_a_common_device() -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    from revcore.dlpack import is_carried, on_one_device

    eight = jax.numpy.asarray([1.0, 2.0]).astype("float8_e4m3fn")  # which DLPack does not carry everywhere
    assert on_one_device(eight, torch.ones(2)) is None
    assert compare(gradients({"w": eight}), gradients({"w": torch.tensor([1.0, 2.0])})).ok
    assert on_one_device(torch.ones(2, device="meta"), jax.numpy.ones(2)) is None
    assert not is_carried(eight, cuda=False)

    class OnCuda(OnlyDlpack):
        dtype = np.dtype("float32")

        def __dlpack_device__(self) -> Any:
            return 2, 0

    assert is_carried(OnCuda(np.ones(2)), cuda=True)
    assert not is_carried(OnCuda(np.ones(2)), cuda=False)


@pytest.mark.gpu
def test_a_gpu_measures_what_lies_on_it(no_host: None) -> None:
    import jax
    import torch

    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        pytest.skip("needs a GPU that both torch and JAX see")
    left, right = torch.full((1000,), 1 + 2.0**-20, device="cuda"), jax.numpy.ones(1000)
    for a, b in ((left, right), (right, left), (left, torch.ones_like(left)), (right * left.mean().item(), right)):
        assert compare(gradients({"w": a}), gradients({"w": b})).gradient_error == pytest.approx(2.0**-20, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Record(), "nothing to compare"),
        (lambda: Record([1.0]), "values came as list"),  # type: ignore[arg-type]
        (lambda: Record({}, depth=0), "depth came as 0"),
        (lambda: Record({}, depth=True), "depth came as True"),
        (lambda: Record({}, dtype="float8"), "dtype came as 'float8', expected one of 'float64'"),
        (lambda: compare(TREE, gradients(TREE)), "expected a Record"),  # type: ignore[arg-type]
        (lambda: compare(gradients(TREE), gradients(TREE, depth=5)), "depth 4 and 5: say which counts"),
        (lambda: compare(gradients(TREE), gradients(TREE), dtype="int8"), "dtype came as 'int8'"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(revcore.SpecError, match=message):
        make()


def test_flat() -> None:
    assert flat((1, {"a": [2, None]})) == {"0": 1, "1.a.0": 2}
    assert flat(3.0) == {"array": 3.0}


def test_parity_needs_no_framework() -> None:
    code = "import sys, revcore.parity, revcore.weights; assert not {'torch', 'jax', 'ml_dtypes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the old library's mistake ----------------------------------------------------------------------------------------


def momentum_gradients(weights: list[np.ndarray], x: tuple[np.ndarray, np.ndarray], *, wrong: bool) -> Any:
    """Gradients of ``sum(y0² + y1²)`` of a momentum network in half-residual form, by hand.

    ``y = β·x0 + (1−β)·f(x1)`` has the adjoint ``gx0 = β·gy, gf = (1−β)·gy, gx1 += fᵀ(gf)``; the old library merged the
    gradients with the coupling's *forward*: ``gx1 = β·gx1 + (1−β)·fᵀ(gy)``.
    """
    coupling, streams, tape = revcore.Momentum(0.9), list(x), []
    for i, w in enumerate(weights):
        f = np.tanh(w @ streams[1 - i % 2])
        tape.append((streams[1 - i % 2], f))
        streams[i % 2] = coupling.forward(streams[i % 2], f)
    grads, result = [2 * s for s in streams], {}
    for i, w in reversed(list(enumerate(weights))):
        (source, f), gy, other = tape[i], grads[i % 2], grads[1 - i % 2]
        gx, gf = coupling.vjp(None, f, gy)
        through = w.T @ ((1 - f**2) * gf)
        result[f"{i}.weight"] = np.outer((1 - f**2) * gf, source)
        grads[i % 2] = gx
        grads[1 - i % 2] = coupling.forward(other, through / (1 - coupling.beta)) if wrong else other + through
    return {"x0": grads[0], "x1": grads[1], **result}


@pytest.mark.parametrize("depth", [2, 3, 8])
def test_the_old_librarys_adjoint_is_found(depth: int) -> None:
    rng = np.random.default_rng(depth)
    arrays = [rng.standard_normal((4, 4)) / 2 for _ in range(depth)] + [rng.standard_normal(4) for _ in range(2)]

    def loss(arrays: list[np.ndarray]) -> Any:
        blocks = [lambda x, w=w: np.tanh(w @ x) for w in arrays[:depth]]
        y = revcore.reference.forward(revcore.revnet(depth, revcore.Momentum(0.9)), blocks, tuple(arrays[depth:]))
        return sum((stream**2).sum() for stream in y)

    exact = revcore.reference.gradient(loss, arrays)
    names = [f"{i}.weight" for i in range(depth)] + ["x0", "x1"]
    truth = gradients(dict(zip(names, exact, strict=True)), depth=depth)
    right, wrong = (
        compare(gradients(momentum_gradients(arrays[:depth], (arrays[-2], arrays[-1]), wrong=w), depth=depth), truth)
        for w in (False, True)
    )
    assert right.ok, f"\n{right}"
    assert not wrong.ok
    assert wrong.gradient_error is not None
    assert wrong.gradient_error > 0.05
    assert "do NOT agree" in wrong.verdict
