"""The demo: either framework goes on where the other stopped, gradients agree, memory is flat, Ctrl-C loses nothing."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import revcore.demo.run as run_module
from revcore.demo import Config, demo, measure
from revcore.demo.backend import Model, load_backend
from revcore.demo.checkpoint import Checkpoint, History
from revcore.demo.config import first_weights, shapes
from revcore.demo.interrupt import listening
from revcore.demo.run import NEXT_LOSS_TOLERANCE, start
from revcore.demo.text import Corpus
from revcore.policy import Reverse

pytestmark = pytest.mark.usefixtures("quickly_compiled_module")
OPTIONS: dict[str, Any] = {"depth": 4, "steps": 6, "width": 16, "context": 16, "batch": 2}
CONFIG = Config(**OPTIONS)
TEXT = b"The quick brown fox jumps over the lazy dog.\nHow vexingly quick daft zebras jump!\n" * 20
BACKENDS = {name: load_backend(name) for name in ("torch", "jax")}


@pytest.fixture
def corpus() -> Corpus:
    return Corpus(TEXT, CONFIG)


def fresh(name: str, state: dict[str, np.ndarray]) -> Model:
    model = BACKENDS[name](CONFIG, "cpu")
    model.load(state)
    return model


def losses(model: Model, corpus: Corpus, steps: range) -> list[float]:
    return [model.train_step(corpus.batch(step), CONFIG.rate_at(step)) for step in steps]


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", BACKENDS)
def test_weights_are_as_the_config_says(name: str, dtype: str) -> None:
    model = BACKENDS[name](CONFIG, "cpu", dtype)  # type: ignore[arg-type]
    model.load(start(CONFIG, TEXT).state)
    state = model.state()
    assert {key: array.shape for key, array in state.items() if key.startswith("weights.")} == {
        f"weights.{key}": shape for key, shape in shapes(CONFIG).items()
    }
    assert {str(array.dtype) for key, array in state.items() if key != "step"} == {dtype}


@pytest.mark.parametrize(("first", "second"), [("torch", "jax"), ("jax", "torch")])
def test_the_other_framework_resumes_with_the_same_losses(
    first: str, second: str, corpus: Corpus, tmp_path: Path
) -> None:
    model = fresh(first, start(CONFIG, TEXT).state)
    before = losses(model, corpus, range(3))
    path = tmp_path / "checkpoint.safetensors"
    Checkpoint(CONFIG, corpus.fingerprint, 3, model.state(), History(before)).save(path)
    loaded = Checkpoint.load(path)
    assert (loaded.config, loaded.step, loaded.history.loss) == (CONFIG, 3, before)
    expected = losses(model, corpus, range(3, 6))
    np.testing.assert_allclose(losses(fresh(second, loaded.state), corpus, range(3, 6)), expected, NEXT_LOSS_TOLERANCE)


@pytest.mark.parametrize("name", BACKENDS)
def test_resuming_without_moments_would_be_seen(name: str, corpus: Corpus) -> None:
    model = fresh(name, start(CONFIG, TEXT).state)
    losses(model, corpus, range(3))
    weights = {key: array for key, array in model.state().items() if key.startswith("weights.")}
    ahead, behind = losses(model, corpus, range(3, 5)), losses(fresh(name, weights), corpus, range(3, 5))
    assert abs(ahead[0] - behind[0]) <= NEXT_LOSS_TOLERANCE * ahead[0]
    assert abs(ahead[1] - behind[1]) > 10 * NEXT_LOSS_TOLERANCE * ahead[1]


def test_both_frameworks_train_alike(corpus: Corpus) -> None:
    curves = [losses(fresh(name, start(CONFIG, TEXT).state), corpus, range(6)) for name in BACKENDS]
    found = measure.agreement(curves, 1e-4)
    assert found.ok, found
    assert curves[0][-1] < curves[0][0]


def test_curves_that_part_or_break_are_no_agreement() -> None:
    assert not measure.agreement([[1.0, 1.0], [1.0, 1.1]], 0.02).ok
    assert not measure.agreement([[1.0, 1.0], [1.0, float("nan")]], 0.02).ok
    assert not measure.agreement([[1.0, 1.0], [1.0]], 0.02).ok


@pytest.mark.long  # the demo below does the same at four steps
def test_gradients_of_torch_and_jax_agree(corpus: Corpus) -> None:
    run = start(replace(CONFIG, depth=24), TEXT)
    float64, float32 = measure.parity(BACKENDS, run, corpus.batch(0), "cpu").values()
    assert float64.ok, f"\n{float64}"
    assert float64.gradient_error is not None
    assert float64.gradient_error <= 1e-12
    assert float32.ok, f"\n{float32}"
    assert float32.limit == 16


def test_gradients_of_other_weights_do_not_agree(corpus: Corpus) -> None:
    run = start(CONFIG, TEXT)
    other = replace(
        run, state=run.state | {"weights.head.weight": run.state["weights.head.weight"] * np.float32(1.001)}
    )
    records = [
        measure.gradients(BACKENDS[name], which, corpus.batch(0), "cpu", "float32", Reverse())
        for name, which in (("torch", run), ("jax", other))
    ]
    assert not measure.compare(*records).ok


def test_batches_go_by_the_step_and_never_touch_the_held_out_text(corpus: Corpus) -> None:
    assert (corpus.batch(3) == Corpus(TEXT, CONFIG).batch(3)).all()
    assert (corpus.batch(3) != corpus.batch(4)).any()
    text = b"".join(bytes([i]) * 50 for i in range(100))  # a number for each piece; every tenth is held out
    numbered = Corpus(text, replace(CONFIG, batch=64))
    trained_on = {byte for step in range(20) for byte in numbered.batch(step).ravel().tolist()}
    held_out = {byte for batch in numbered.held_out() for byte in batch.ravel().tolist()}
    assert held_out == set(range(9, 100, 10))
    assert trained_on == set(range(100)) - held_out


def test_the_same_seed_makes_the_same_weights() -> None:
    a, b, c = (first_weights(replace(CONFIG, seed=seed)) for seed in (1, 1, 2))
    assert all((a[name] == b[name]).all() for name in a)
    assert (a["head.weight"] != c["head.weight"]).any()


@dataclass(frozen=True)
class Finished:
    """What the whole demo left: its exit code, its folder, what it printed, and the bytes that it measured."""

    code: int
    folder: Path
    printed: str
    memory: dict[str, dict[str, list[int]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, console, memory = tmp_path_factory.mktemp("demo") / "new" / "folder", silent(), {}
    with pytest.MonkeyPatch.context() as patch:
        plain = measure.memory
        patch.setattr(measure, "memory", lambda *given: memory.update(plain(*given)) or memory)
        code = demo(("torch", "jax"), folder, text=TEXT, depths=(4, 8), console=console, **OPTIONS)
    return Finished(code, folder, output(console), memory)


def test_the_demo_ends_well_and_writes_its_files(finished: Finished) -> None:
    folder, printed = finished.folder, finished.printed
    assert finished.code == 0, printed
    for name in ("curves.png", "memory.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for words in (
        "PyTorch against JAX, float64",
        "PyTorch and JAX agree",
        "the next loss is",
        "held out",
        "writes: The",
    ):
        assert words in printed


@pytest.mark.parametrize("name", BACKENDS)
def test_reversible_memory_is_flat_and_the_others_grow(name: str, finished: Finished) -> None:
    by_policy = finished.memory[name]
    assert len(set(by_policy["reversible"])) == 1, by_policy
    stream = CONFIG.batch * CONFIG.context * CONFIG.width * 4
    for policy in ("store-all", "checkpointing"):
        assert by_policy[policy][1] - by_policy[policy][0] >= 4 * stream, by_policy
    assert by_policy["store-all"][-1] > by_policy["checkpointing"][-1] > by_policy["reversible"][-1]


@pytest.mark.parametrize("name", ["torch", pytest.param("jax", marks=pytest.mark.long)])
def test_the_demo_goes_on_in_one_framework(name: str, finished: Finished, tmp_path: Path) -> None:
    path, console = finished.folder / "checkpoint.safetensors", silent()
    code = demo((name,), tmp_path, resume=path, text=TEXT, depths=(4,), console=console, steps=8)
    printed = output(console)
    assert code == 0, printed
    assert "reversible against store-all" in printed
    after = Checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert (after.step, len(after.history.loss)) == (8, 8)
    assert after.history.loss[:6] == Checkpoint.load(path).history.loss


def test_the_demo_fails_with_the_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grown = {"store-all": [1, 2], "checkpointing": [1, 2], "reversible": [100, 102]}
    parted = measure.agreement([[1.0], [2.0]], 0.5)
    unlike = measure.compare(*(measure.Record(gradients={"w": x}) for x in (1.0, 2.0)))
    monkeypatch.setattr(measure, "memory", lambda *_: {"torch": grown, "jax": grown})
    monkeypatch.setattr(measure, "agreement", lambda *_: parted)
    monkeypatch.setattr(measure, "parity", lambda *_: {"here": unlike})
    monkeypatch.setattr(run_module, "NEXT_LOSS_TOLERANCE", -1.0)
    console = silent()
    code = demo(("torch", "jax"), tmp_path, text=TEXT, depths=(4, 8), console=console, **OPTIONS)
    printed = output(console)
    assert code == 1
    for words in ("the next loss", "a and b do NOT agree", "reversible memory in JAX grows", "the loss curves lie"):
        assert f"FAILED: {words}" in printed
    assert (tmp_path / "curves.png").exists()


def test_signals_are_handled_as_before_when_training_has_ended() -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with listening():
        assert all(a != b for a, b in zip(handlers(), before, strict=True))
    assert handlers() == before


WORK = b"All work and no play. " * 100


def check_stopped(folder: Path, name: str) -> None:
    """What is left of a run that was told to stop in its fourth step, of very many."""
    path = folder / "checkpoint.safetensors"
    stopped = Checkpoint.load(path)
    assert 3 < stopped.step == len(stopped.history.loss) < 1_000_000
    assert [file.name for file in folder.iterdir()] == [path.name]  # nothing half-written beside it
    resumed = fresh(name, stopped.state).loss(Corpus(WORK, CONFIG).batch(stopped.step))
    assert resumed < stopped.history.loss[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_that_resumes(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, console = Corpus.batch, silent()
    many: Any = {**OPTIONS, "steps": 1_000_000}

    def signalled(self: Corpus, step: int) -> np.ndarray:
        if step == 3:
            signal.raise_signal(number)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "batch", signalled)
        code = demo(("torch", "jax"), tmp_path, text=WORK, console=console, **many)
    assert code == run_module.INTERRUPTED
    assert "Stopped PyTorch after step 4 of 1000000." in output(console)
    assert "--resume" in output(console)
    check_stopped(tmp_path, "torch")


_LONG_RUN = """
import sys
from revcore.demo import demo
from revcore.demo.text import Corpus

batch = Corpus.batch
Corpus.batch = lambda self, step: (print(step, file=sys.stderr, flush=True), batch(self, step))[1]
sys.exit(demo((sys.argv[1],), sys.argv[2], text=b"All work and no play. " * 100,
              depth=4, steps=1_000_000, width=16, context=16, batch=2))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "number"), [("torch", signal.SIGINT), ("jax", signal.SIGINT), ("torch", signal.SIGTERM)]
)
def test_a_process_that_is_stopped_leaves_a_checkpoint(name: str, number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LONG_RUN, name, str(tmp_path)]
    root = str(Path(run_module.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip() == "3":  # it is in the midst of that step, or soon will be
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == run_module.INTERRUPTED, err
    assert "--resume" in out
    check_stopped(tmp_path, name)
