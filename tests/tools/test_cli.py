"""The command line: help that teaches, and errors that say what came, what was expected and what to write."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import safetensors.numpy

from revcore import cli, weights
from revcore.demo.backend import load_backend
from revcore.demo.config import Config
from revcore.demo.run import start
from tests.helpers import call

TEXT = b"The quick brown fox jumps over the lazy dog.\n" * 20
CONFIG = Config(depth=4, steps=5, width=16, context=16, batch=2)


def test_help_leads_to_the_demo_and_imports_no_framework() -> None:
    code = (
        "import sys; sys.argv = ['revcore', '--help']\n"
        "from revcore.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'jax', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("demo --steps", "plan transformer", "parity models:in_torch", "check couplings.py:mine"):
        assert f"python -m revcore {command}" in " ".join(done.stdout.split())
    assert done.stderr == ""


def test_help_of_the_demo_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "demo", "--help") == 0
    out = capsys.readouterr().out
    for word in ("--depth", "--steps", "--backend", "--device", "--seed", "--resume", "--out", "Examples", "Exit code"):
        assert word in out


def test_help_shows_the_defaults_that_are_used() -> None:
    """They are written out, so that help needs no NumPy."""
    options = get_type_hints(cli.demo, include_extras=True)
    named = [field for field in dataclasses.fields(Config) if field.name in options]
    assert len(named) >= 6
    for field in named:
        (option,) = options[field.name].__metadata__
        assert option.show_default == str(field.default), field.name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint after no step, of another text than Python's reference."""
    run, path = start(CONFIG, TEXT), tmp_path / "checkpoint.safetensors"
    model = load_backend("torch")(CONFIG, "cpu")
    model.load(run.state)
    run.__class__(CONFIG, run.text, 0, model.state(), run.history).save(path)
    return path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--depth", "7"], ["depth came as 7", "even", "--depth 8"]),
        (["--depth", "0"], ["depth came as 0", "at least 2", "--depth 2"]),
        (["--steps", "0"], ["steps came as 0", "at least 1"]),
        (["--seed", "-1"], ["seed came as -1", "at least 0"]),
        (["--width", "40"], ["width came as 40", "multiple of 16", "--width 48"]),
        (["--backend", "tensorflow"], ["tensorflow", "torch", "jax", "both"]),
        (["--device", "tpu"], ["tpu", "cpu", "gpu"]),
        (["--context", "60000"], ["context came as 60000", "held-out text", "--context 64"]),
        (["--resume", "nowhere"], ["there is no file nowhere", "demo/checkpoint.safetensors"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_errors_say_what_to_write(
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert call(monkeypatch, "demo", *arguments, "--out", str(tmp_path / "out")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(word in error for word in words), error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["torch", "jax", "optax", "matplotlib"])
def test_a_missing_package_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    assert call(monkeypatch, "demo", "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert f"{missing} is not installed" in error
    assert "pip install 'revcore-nn[" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "words"), [("torch", ["PyTorch", "--device cpu"]), ("jax", ["JAX", "--device cpu"])])
def test_a_device_that_is_not_there(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import jax
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def no_devices(platform: str) -> None:
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", no_devices)
    assert call(monkeypatch, "demo", "--device", "gpu", "--backend", name, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut", ["no whole safetensors file"]),
        ("other kind", ["no whole safetensors file"]),
        ("foreign", ["holds format", "revcore.weights"]),
        ("weights alone", ["none of a demo run", "python -m revcore demo"]),
        ("tensor lost", ["missing first.head.weight"]),
        ("tensor of another shape", ["weights.head.weight came with shape (2, 2)"]),
        ("optimizer ahead", ["contradicts itself", "its optimizer stands at step 1, its data at 0"]),
        ("config of another version", ["expected what Config.to_json() wrote"]),
        ("another depth", ["made with --depth 4, but --depth 8 came"]),
        ("another text", ["another text"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_that_will_not_do(
    damage: str, words: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    tensors, metadata = weights.load(checkpoint)
    options = ["--depth", "8"] if damage == "another depth" else []
    if damage == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    elif damage == "other kind":
        checkpoint.write_text("PK\x03\x04 this is something else")
    elif damage == "foreign":
        safetensors.numpy.save_file({"w": np.ones(2)}, checkpoint)
    elif damage == "weights alone":
        weights.save(checkpoint, {"w": np.ones(2)})
    elif damage == "tensor lost":
        del tensors["first.head.weight"]
        weights.save(checkpoint, tensors, metadata)
    elif damage == "tensor of another shape":
        weights.save(checkpoint, tensors | {"weights.head.weight": np.ones((2, 2), np.float32)}, metadata)
    elif damage == "optimizer ahead":
        weights.save(checkpoint, tensors | {"step": tensors["step"] + 1}, metadata)
    elif damage == "config of another version":
        weights.save(checkpoint, tensors, metadata | {"config": '{"layers": 3}'})
    out = checkpoint.parent / "out"
    assert call(monkeypatch, "demo", "--resume", str(checkpoint), "--out", str(out), *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not out.exists()


def test_a_finished_checkpoint_says_how_to_train_on(checkpoint: Path) -> None:
    from revcore import SpecError
    from revcore.demo.checkpoint import Checkpoint

    done = Checkpoint(CONFIG, "abc", 5, {}, Checkpoint.load(checkpoint).history)
    with pytest.raises(SpecError, match="after 5 of 5 steps, so none is left: write --steps 105"):
        done.resumed("abc")
    assert done.resumed("abc", steps=9).config.steps == 9


def test_a_folder_that_is_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert call(monkeypatch, "demo", "--out", str(tmp_path / "file")) == 2
    assert "expected a folder to write to" in capsys.readouterr().err


def test_parity_of_two_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a, b = (str(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    weights.save(a, {"0.weight": np.eye(3)})
    weights.save(b, {"0.weight": np.eye(3) * (1 + 1e-9)})
    assert call(monkeypatch, "parity", a, a) == 0
    assert "agree" in capsys.readouterr().out
    assert call(monkeypatch, "parity", a, b) == 1  # judged in float64, which it is
    assert "do NOT agree" in capsys.readouterr().out
    assert call(monkeypatch, "parity", a, str(tmp_path / "c.safetensors")) == 2
    assert "c.safetensors" in capsys.readouterr().err


def test_plan_prints_a_table_for_each_depth_and_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = ("--width", "64", "--sequence", "16", "--batch", "2", "--vocabulary", "100", "--dtype", "bfloat16")
    options = ("--depth", "2,4", *sizes, "--picture", str(tmp_path / "plan.png"))
    assert call(monkeypatch, "plan", "transformer", *options) == 0
    out = capsys.readouterr().out
    assert "transformer, batch 2, width 64, sequence 16, vocabulary 100, bfloat16" in out
    assert "depth 2: parameters" in out
    assert "depth 4: parameters" in out
    assert out.count("StoreAll()") == out.count("Reverse()") == 2
    assert (tmp_path / "plan.png").exists()


def test_plan_tells_what_a_budget_leads_to(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("mlp", "--depth", "4", "--width", "16", "--batch", "64")
    assert call(monkeypatch, "plan", *sizes, "--budget", "0.8") == 0
    assert "MemoryBudget(fraction=0.8)" in capsys.readouterr().out
    assert call(monkeypatch, "plan", *sizes, "--budget", "1kB") == 0  # the other policies are of use still
    assert "MemoryBudget(1000 B): MemoryBudget: the budget is 1,000 bytes, but the least" in capsys.readouterr().out


def test_plan_takes_a_function_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "own_model.py").write_text(
        "import torch, revcore_torch\n"
        "def make(depth, features=4, name='x'):\n"
        "    assert name == 'y'\n"
        "    return revcore_torch.ReversibleSequential(*[torch.nn.Linear(features, features) for _ in range(depth)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = ("--set", "features=8", "--set", "name=y", "--shape", "16", "--batch", "3", "--depth", "3")
    assert call(monkeypatch, "plan", "own_model:make", *settings) == 0
    assert "depth 3: parameters 864 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["perceiver"], ["MODEL came as 'perceiver'", "transformer, mlp, conv", "package.module:function"]),
        (["nowhere:make"], ["MODEL came as 'nowhere:make'", "No module named 'nowhere'"]),
        (["revcore_torch.zoo:LanguageModel"], ["takes body, width, sequence, vocabulary", "but depth is given"]),
        (["mlp", "--depth", "0"], ["--depth came as '0'", "--depth 12,24,48"]),
        (["mlp", "--heads", "2"], ["mlp takes depth, width, batch", "heads is given"]),
        (["mlp", "--set", "width"], ["--set came as 'width'", "KEY=VALUE"]),
        (["mlp", "--dtype", "int8"], ["--dtype came as 'int8'", "bfloat16"]),
        (["mlp", "--budget", "lots"], ["--budget came as 'lots'", "8GiB", "0.3"]),
        (["mlp", "--shape", "a"], ["--shape came as 'a'", "--shape 1024,1600"]),
        (["mlp", "--optimizer", "lion"], ["optimizer came as 'lion'", "'adamw'"]),
        (["transformer", "--width", "64", "--heads", "5"], ["heads came as 5", "width 64"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_plan_errors_say_what_to_write(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", *arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(word in error for word in words), error
    assert "Traceback" not in error


def test_help_of_plan_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "plan", "--help") == 0
    out = capsys.readouterr().out
    for word in ("--depth", "--batch", "--budget", "--picture", "held", "peak", "Examples", "plan transformer"):
        assert word in out


def test_help_of_parity_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "parity", "--help") == 0
    out = capsys.readouterr().out
    for word in ("--shape", "--own-weights", "--dtype", "the first step", "Exit code", "Examples", "two_frameworks"):
        assert word in out
