"""``python -m revcore check``: figures for a coupling that inverts, the law that one breaks, and readable errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import call

COUPLINGS = """
import numpy as np
import revcore
import torch

halved = revcore.Coupling.from_functions(lambda x, f: 0.5 * x + f, lambda y, f: (y - f) / 0.5, name="halved")
wrong = revcore.Coupling.from_functions(lambda x, f: 0.5 * x + f, lambda y, f: 2 * y - f)
theirs = revcore.Coupling.from_functions(lambda x, f: x + torch.relu(f), lambda y, f: y - torch.relu(f))
scales = np.linspace(1, 2, 3)
scaled = lambda f: f * scales.astype(f.dtype)
held = revcore.Coupling.from_functions(lambda x, f: x + scaled(f), lambda y, f: y - scaled(f))
exact = revcore.Exact(revcore.Momentum(0.5))

class WrongGradient(revcore.Additive):
    def vjp(self, x, f, gy): return gy, 2 * gy
"""


@pytest.fixture
def couplings(tmp_path: Path) -> str:
    path = tmp_path / "couplings.py"
    path.write_text(COUPLINGS)
    return str(path)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("revcore:Affine", [], ["Affine", "float64", "float32", "float16", "relative error of vjp"]),
        (
            "FILE:halved",
            [],
            ["coupling 'halved'", "left to autodiff", "grows in inverse by 2", "revcore.amplification"],
        ),
        ("FILE:halved", ["--arrays", "jax"], ["float32", "grows in inverse by 2"]),
        ("FILE:theirs", ["--arrays", "torch"], ["float64", "keeps the laws"]),
        ("FILE:held", ["--shape", "4,3"], ["keeps the laws"]),
        ("FILE:exact", [], ["Exact", "float32", "keeps the laws"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_shows_the_figures_of_a_coupling(
    name: str,
    options: list[str],
    words: list[str],
    couplings: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "check", name.replace("FILE", couplings), *options) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(word in out for word in words), out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FILE:wrong", ["breaks a law", "is off by", "whose inverse is x = (y - 1·f) / 0.5"]),
        ("FILE:WrongGradient", ["breaks a law", "vjp's gradient of f[0]"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_names_a_law_that_does_not_hold(
    name: str,
    words: list[str],
    couplings: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "check", name.replace("FILE", couplings)) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert all(word in out for word in words), out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["revcore:Momentum"], ["a class that takes arguments", "mine = Momentum(…)"]),
        (["revcore:revnet"], ["which is function", "expected a revcore.Coupling"]),
        (["FILE"], ["expected a revcore.Coupling or its class, as package.module:name"]),
        (["FILE:nothing"], ["has no attribute 'nothing'"]),
        (["FILE:theirs"], ["could not be tried on numpy arrays", "--arrays torch"]),
        (["FILE:held"], ["could not be tried on numpy arrays of shape (64,)", "--shape"]),
        (["revcore:Coupling"], ["could not be tried", "Coupling has no forward(x, f)"]),
        (["revcore:Affine", "--shape", "0"], ["--shape came as '0'", "--shape 8,64"]),
        (["revcore:Affine", "--seed", "-1"], ["--seed came as -1", "at least 0"]),
        (["revcore:Affine", "--arrays", "cupy"], ["cupy", "numpy", "torch", "jax"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_check_errors_say_what_to_write(
    arguments: list[str],
    words: list[str],
    couplings: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "check", *(argument.replace("FILE", couplings) for argument in arguments)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_help_of_check_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "check", "--help") == 0
    out = capsys.readouterr().out
    for word in ("--shape", "--arrays", "its inverse", "Exit code", "Examples", "two_frameworks:COUPLING"):
        assert word in out
