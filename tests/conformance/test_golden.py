"""The golden files: complete, made again, reproduced by both engines and by an interpreter of what their page says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from revcore import Reverse
from revcore.parity import EPS, Record, Report, compare
from revcore.weights import load, save
from tests.conformance.backends import Backend
from tests.conformance.cases import Case
from tests.conformance.golden import CASES, FOLDER, KINDS, path_of, read, write
from tests.conformance.test_conformance_checker import adjoint_by_hand
from tests.conformance.test_random_programs import eagerly
from tests.tiers import product

PATHS = sorted(FOLDER.glob("*.safetensors"))


def against(record: Record, expected: Record, names: tuple[str, str] = ("engine", "golden")) -> Report:
    if record.dtype == "float64":
        return compare(record, expected, limit=1e-12 / EPS["float64"], depth=1, names=names)
    return compare(record, expected, names=names)


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_set_is_complete_and_small() -> None:
    assert {path.name for path in PATHS} == {path_of(case).name for case in CASES}
    assert len(PATHS) >= 12
    assert sum(path.stat().st_size for path in PATHS) < 200_000


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_made_again_is_the_same(case: Case, tmp_path: Path) -> None:
    """What is given exactly; what came of it to rounding, since another machine's tanh may be another."""
    stored, metadata = load(path_of(case))
    made, again = load(write(case, tmp_path))
    assert again == metadata
    assert made.keys() == stored.keys()
    for name in stored:
        assert made[name].dtype == stored[name].dtype
        assert not name.startswith("given.") or np.array_equal(made[name], stored[name]), name
    computed = [{n: a for n, a in tensors.items() if not n.startswith("given.")} for tensors in (made, stored)]
    left, right = (Record(tensors, dtype="float64") for tensors in computed)
    report = compare(left, right, limit=1e-15 / EPS["float64"], names=("made again", "stored"))
    assert report.ok, str(report)
    once = path_of(case, tmp_path).read_bytes()
    assert write(case, tmp_path).read_bytes() == once


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_number_has_a_gradient_and_every_dtype_holds_what_is_given(path: Path) -> None:
    case, record = read(path)
    gradients = record.gradients or {}
    assert gradients.keys() == case.inputs.keys()
    assert all(np.linalg.norm(array) > 1e-4 for array in gradients.values())
    for name, array in case.arrays.items():
        assert array.dtype == (bool if name.startswith("mask.") else np.float64)
        if array.dtype != bool:
            assert np.array_equal(array, np.clip(np.round(array * 64), -255, 255) / 64), name


# --- the engines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "dtype"),
    product(
        PATHS,
        ("float64", "float32"),
        fast=lambda path, dtype: dtype == "float64" or path.stem == "momentum",
        name=lambda value: getattr(value, "stem", value),
    ),
)
def test_an_engine_reproduces_it(backend: Backend, path: Path, dtype: str) -> None:
    """JAX operation by operation, which is quicker; compiled it is held against the oracle."""
    case, expected = read(path)
    if dtype == "float32" and case.program.lattice is not None:
        pytest.skip("float32 has no room for 24 bits after the point")
    with eagerly(backend):
        report = against(backend.run(case, Reverse(), dtype), expected)
    assert report.ok, str(report)


# --- what must fail ---------------------------------------------------------------------------------------------------


def corrupted(path: Path, name: str, tmp_path: Path) -> Path:
    """Return a copy with the first number of one tensor changed by a part in a million."""
    tensors, metadata = load(path)
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] += 1e-6 * max(1.0, float(np.linalg.norm(tensors[name])))
    save(tmp_path / path.name, tensors, metadata)
    return tmp_path / path.name


@pytest.mark.parametrize("name", ["value.output.0", "gradient.2.V", "gradient.context", "given.stream.1", "given.0.W0"])
def test_a_corrupted_number_fails(backend: Backend, name: str, tmp_path: Path) -> None:
    path = FOLDER / "momentum.safetensors"
    case, expected = read(path)
    run = type(backend).run.__wrapped__  # type: ignore[attr-defined] # its cache takes the two cases for one
    with eagerly(backend):
        assert against(run(backend, case, Reverse()), expected).ok
        case, expected = read(corrupted(path, name, tmp_path))
        assert not against(run(backend, case, Reverse()), expected).ok


def test_the_old_librarys_adjoint_fails() -> None:
    case, expected = read(FOLDER / "momentum.safetensors")
    right, wrong = (dataclasses.replace(expected, gradients=adjoint_by_hand(case, old)) for old in (False, True))
    assert against(right, expected).ok
    for dtype in ("float64", "float32"):
        assert not against(dataclasses.replace(wrong, dtype=dtype), expected).ok


# --- a third backend --------------------------------------------------------------------------------------------------


class Interpreter:
    """Forward only, in NumPy, written from ``tests/golden/README.md``."""

    def __init__(self, metadata: Mapping[str, str], given: Mapping[str, np.ndarray]) -> None:
        self.program, self.described = json.loads(metadata["program"]), json.loads(metadata["blocks"])
        self.given, self.aux, self.next = given, 0.0, 0

    def loss(self) -> tuple[list[np.ndarray], Any]:
        x = [self.given[f"stream.{i}"] for i in range(self.program["num_streams"])]
        for step in self.program["steps"]:
            x = self.step(step, x)
        outputs = [x[i] for i in self.program["output"]]
        weights = [self.given[f"loss.{i}"] for i in range(len(outputs))]
        return outputs, sum((y * (w + y / 2)).sum() for y, w in zip(outputs, weights, strict=True)) + self.aux / 4

    def step(self, step: Any, x: list[Any]) -> list[Any]:
        kind = step["kind"]
        if kind == "Chain":
            for inner in step["steps"]:
                x = self.step(inner, x)
            return x
        if kind == "Repeat":
            for _ in range(step["n"]):
                x = self.step(step["step"], x)
            return x
        if kind == "Bijection" and step["forward"]:
            return self.move(step["forward"], x)
        if kind in ("Bijection", "Anchor"):
            return self.taken(self.block(x), len(x))
        seen = [x[i] for i in step["sources"]]
        seen = [sum(seen)] if step["combine"] == "sum" else seen
        coupling = step["coupling"]
        f = self.taken(self.block(seen), 2 if coupling["kind"] == "Affine" else 1) if step["block"] else seen
        t = step["target"]
        return [*x[:t], self.coupled(coupling, x[t], f, seen[0]), *x[t + 1 :]]

    def coupled(self, coupling: Any, x: Any, f: list[Any], seen: Any) -> Any:
        inner = coupling["coupling"] if coupling["kind"] == "Exact" else coupling
        if inner["kind"] == "Affine":
            return x * np.exp(f[0]) + f[1]
        if inner["kind"] == "Additive":
            a, p = 1, inner["scale"] * f[0]
        elif inner["kind"] == "Momentum":
            a, p = inner["beta"], (1 - inner["beta"]) * f[0]
        else:
            a, p = inner["gamma"], (1 - inner["gamma"]) * seen + (1 + inner["gamma"]) * f[0]
        if coupling["kind"] != "Exact":
            return a * x + p
        u, ratio = 2.0 ** -coupling["bits"], Fraction(a).limit_denominator(4096)
        n, d = abs(ratio.numerator), ratio.denominator
        product = np.sign(a) * np.floor((n * (x.real / u) + d // 2) / d) * u
        return product + np.round(p.real / u) * u + 1j * (a * x + p).imag

    def move(self, how: Any, x: list[Any]) -> list[Any]:
        if how["kind"] == "Permute":
            return [x[i] for i in how["order"]]
        assert (how["channel_axis"], how["inverse"]) == (1, False)
        k = how["factor"]
        (n, c, h, w), axes = x[0].shape, (0, 1, 3, 5, 2, 4)
        patches = [s.reshape(n, c, h // k, k, w // k, k).transpose(axes) for s in x]
        return [s.reshape(n, c * k * k, h // k, w // k) for s in patches]

    def taken(self, returned: list[Any], count: int) -> list[Any]:
        self.aux = self.aux + sum(a.sum() for a in returned[count:])
        return returned[:count]

    def block(self, x: list[Any]) -> list[Any]:
        i, block, c = self.next, self.described[self.next], self.given["context"]
        self.next += 1
        p = {name.removeprefix(f"{i}."): a for name, a in self.given.items() if name.startswith(f"{i}.")}
        if block["kind"] == "Mlp":
            h = np.tanh(p["b"] + c + sum(s @ p[f"W{j}"] for j, s in enumerate(x)))
            h = h * self.given.get(f"mask.{i}", 1)
            f = [np.tanh(h @ p["S"]) / 4, h @ p["V"]] if block["outputs"] == 2 else [h @ p["V"]]
            return [*f, (h**2).sum()] if block["aux"] else f
        if block["kind"] == "Pointwise":
            return [np.tanh(p["w"] * x[0] + c) * p["v"]]
        if block["kind"] == "Shear":
            a, *between, z = x
            a = a * np.exp(p["s"] / 4)
            return [a, *between, z + np.tanh(a @ p["W"] + c)]
        x = [np.tanh(s @ p["P"] + c) for s in x]
        return [*x, (x[0] * x[-1]).sum()]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_page_says_all_that_a_backend_needs(path: Path) -> None:
    with safetensors.safe_open(path, framework="np") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    given = {name.removeprefix("given."): a for name, a in tensors.items() if name.startswith("given.")}
    run = Interpreter(metadata, given)
    outputs, _ = run.loss()
    assert run.next == len(run.described)
    for i, y in enumerate(outputs):
        np.testing.assert_allclose(y, tensors[f"value.output.{i}"], rtol=1e-13)
    assert ("value.aux" in tensors) == (run.aux != 0)
    np.testing.assert_allclose(run.aux, tensors.get("value.aux", 0), rtol=1e-13)

    gradients = {name.removeprefix("gradient."): a for name, a in tensors.items() if name.startswith("gradient.")}
    rng = np.random.default_rng(0)
    along = {name: rng.standard_normal(a.shape) for name, a in gradients.items()}
    moved = given | {name: given[name] + 1e-20j * d for name, d in along.items()}
    slope = Interpreter(metadata, moved).loss()[1].imag / 1e-20
    expected = sum((gradients[name] * d).sum() for name, d in along.items())
    size = np.sqrt(sum((a**2).sum() for a in gradients.values()))
    assert abs(slope - expected) < 1e-13 * size


def test_the_page_names_all_that_occurs() -> None:
    page = (FOLDER / "README.md").read_text()

    def names(data: Any) -> Iterator[str]:
        if isinstance(data, dict):
            yield from [data["kind"]] if "kind" in data else []
            for value in data.values():
                yield from names(value)
        elif isinstance(data, list):
            for value in data:
                yield from names(value)

    found: set[str] = set()
    for path in PATHS:
        _, metadata = load(path)
        found |= {*names(json.loads(metadata["program"])), *names(json.loads(metadata["blocks"]))}
        found |= metadata.keys()
    assert found >= {*KINDS, "Couple", "Bijection", "Anchor", "Chain", "Repeat", "Additive", "Momentum", "Affine"}
    assert [name for name in sorted(found) if f"`{name}`" not in page] == []
