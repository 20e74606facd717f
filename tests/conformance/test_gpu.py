"""The GPU suite: what the CPU tests hold, on a card. ``scripts/gpu_suite.sh`` runs it, and all else marked ``gpu``.

A test stands here twice: for the card, marked ``gpu``, which skips where there is none; and as a rehearsal on the CPU.
"""

from __future__ import annotations

import dataclasses
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from revcore import Checkpoint, Coupling, Reverse, StoreAll, revnet
from tests.conformance.backends import TorchBackend, load_backend
from tests.conformance.cards import BFLOAT16, FLOAT32, FLOAT64, PRECISIONS, TF32, Card, Precision, examine
from tests.conformance.cases import STRUCTURES, Case, case_of, plain

ROOT = Path(__file__).parent.parent.parent


# On the CPU other tests show the same: the rehearsal is of the suite itself, and in the long tier.
@pytest.fixture(
    params=[
        pytest.param("gpu", marks=pytest.mark.gpu),
        pytest.param("cpu", id="rehearsal", marks=pytest.mark.long),
    ],
    scope="module",
)
def card(request: pytest.FixtureRequest) -> Card:
    """A GPU, and the CPU to rehearse on."""
    return usable(Card(request.param))


def usable(card: Card) -> Card:
    for name in ("torch", "jax"):
        load_backend(name)
    if reason := card.missing():
        pytest.skip(reason)
    return card


# --- every conformance case -------------------------------------------------------------------------------------------


def check_case(card: Card, case: Case, precision: Precision, note: Callable[[str, object], None]) -> None:
    note("precision", str(precision))  # text, for pytest-xdist hands on nothing else
    note("case", str(case))
    found = examine(card, case, precision)
    for name, figure in found.figures.items():
        note(name, str(figure))
    assert not found.problems, "\n".join(found.problems)


EVERYTHING = [pytest.param(p, case, id=f"{p}-{case}") for p in PRECISIONS for case in p.cases]
REHEARSED = [
    (FLOAT64, plain("momentum", 2, 2)),
    (FLOAT32, next(case for case in STRUCTURES if case.name == "unused-output")),
    (TF32, plain("affine", 1, 2, wide=True)),
    (BFLOAT16, plain("additive", 2, 2, wide=True)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "case"), EVERYTHING)
def test_torch_and_jax_on_one_card(precision: Precision, case: Case, record_property: Any) -> None:
    check_case(usable(Card("gpu")), case, precision, record_property)


@pytest.mark.parametrize(
    ("precision", "case"),
    [pytest.param(*pair, marks=() if pair[0] is FLOAT32 else pytest.mark.long) for pair in REHEARSED],
    ids=str,
)
def test_rehearsal_of_torch_and_jax_on_one_card(precision: Precision, case: Case, record_property: Any) -> None:
    check_case(usable(Card("cpu")), case, precision, record_property)


WRONG = case_of("wrong-inverse", revnet(6, Coupling.from_functions(lambda x, f: x + f, lambda y, f: y - f / 2)))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_wrong_inverse_is_found_in_every_precision(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    """In torch alone; JAX gives what torch gives stored, which saves its compilations."""
    usable(Card("cpu"))
    backend = TorchBackend()

    def run(self: Card, framework: str, case: Case, policy: Any, precision: Precision) -> Any:
        policy = policy if framework == "torch" else StoreAll()
        return backend.run(case, policy, precision.dtype, precision.block_dtype)

    monkeypatch.setattr(Card, "run", run)
    case = dataclasses.replace(WRONG, uses_anchors=True)  # is not inverted
    problems = examine(Card("cpu"), case, precision).problems
    assert any("torch" in problem and "rebuil" in problem for problem in problems), problems
    assert not any("jax, rebuilt" in problem or "jax: the rebuild" in problem for problem in problems), problems


# --- dropout and other policies ---------------------------------------------------------------------------------------


def test_dropout_in_torch(card: Card) -> None:
    import torch

    from revcore_torch import ReversibleSequential

    def run(policy: Any) -> list[Any]:
        with card.torch():
            torch.manual_seed(0)
            blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.4)) for _ in range(6)]
            model = ReversibleSequential(*blocks, policy=policy).double()
            x = torch.randn(4, 16, dtype=torch.float64).requires_grad_()
            model(x).square().sum().backward()
            state = torch.cuda.get_rng_state() if card.kind == "gpu" else torch.get_rng_state()
            return [x.grad, *(p.grad for p in model.parameters()), state.double()]

    expected = run(StoreAll())
    assert (expected[0] == 0).any() or len({float(v) for v in expected[0].flatten()}) > 1
    for policy in (Reverse(), Reverse(anchor_every=2), Checkpoint(3)):
        for a, b in zip(run(policy), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_dropout_in_jax(card: Card) -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from revcore_jax.nnx import ReversibleSequential

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear, self.dropout = nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.4, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dropout(self.linear(x))

    def run(policy: Any) -> tuple[list[Any], list[int]]:
        model = ReversibleSequential(*[Block(nnx.Rngs(i)) for i in range(2)], policy=policy)
        x = jax.random.normal(jax.random.key(0), (4, 16))
        gradients = nnx.jit(nnx.grad(lambda model, x: (model(x) ** 2).sum(), argnums=(0, 1)))(model, x)
        counts = jax.tree.leaves(nnx.state(model, nnx.RngCount))
        return jax.tree.leaves(gradients), [int(c) for c in counts]

    with card.jax():
        (expected, counts), (got, ours) = run(StoreAll()), run(Reverse())
        assert counts == ours
        assert sum(counts) > 0, "nothing was drawn"
        for a, b in zip(got, expected, strict=True):
            assert float(jnp.linalg.norm(a - b)) <= 16 * 2 * 2**-23 * float(jnp.linalg.norm(b))


# --- memory -----------------------------------------------------------------------------------------------------------


def torch_peak(card: Card, depth: int, policy: Any) -> int:
    """Return the bytes that a training step takes at its peak, beyond parameters and their gradients."""
    import torch

    from revcore_torch import ReversibleSequential
    from revcore_torch.memory import LiveBytes

    with card.torch():
        blocks = [torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Tanh()) for _ in range(depth)]
        model = ReversibleSequential(*blocks, policy=policy)
        x = torch.ones(512, 256)

    def step() -> None:
        model(x).sum().backward()

    step()  # gradients are there from now on, and so is cuBLAS's workspace
    if card.kind == "cpu":
        with LiveBytes() as count:
            step()
        return count.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_peak_bytes_are_flat_in_depth_in_torch(card: Card) -> None:
    shallow, deep = (torch_peak(card, depth, Reverse()) for depth in (8, 32))
    assert 0 < deep <= 1.02 * shallow
    stored = torch_peak(card, 32, StoreAll())
    assert stored > 2 * deep, "storing everything takes no more, so that the line above shows nothing"


def jax_peak(card: Card, depth: int) -> tuple[int, int, int | None]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if card.kind == "gpu":  # trying out kernels takes memory, and the counter is never set back
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    command = [sys.executable, "-m", "tests.conformance.jax_peak", card.kind, str(depth)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    temp, own, peak = done.stdout.split()
    return int(temp), int(own), None if peak == "None" else int(peak)


@pytest.mark.long
def test_peak_bytes_are_flat_in_depth_in_jax(card: Card) -> None:
    (temp, own, peak), (deep_temp, deep_own, deep_peak) = (jax_peak(card, depth) for depth in (8, 32))
    assert 0 < deep_temp <= 1.02 * temp
    assert deep_own > own
    if card.kind == "cpu":
        assert peak is deep_peak is None, "the CPU counts by now: ask it for its peak too"
        return
    assert peak is not None
    assert deep_peak is not None
    gradients = (deep_own - own) // 2  # of the parameters that are more: results of the step
    stream = 512 * 256 * 4
    assert 0 < deep_peak - gradients <= peak + stream


# --- compiled blocks, wide streams ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # dynamo's and inductor's own
def test_a_compiled_model(card: Card) -> None:
    import torch

    from revcore_torch import ReversibleSequential

    torch._dynamo.reset()
    with card.torch():
        torch.manual_seed(0)
        blocks = [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8)) for _ in range(4)]
        model = ReversibleSequential(*blocks).double()
        x = torch.randn(4, 16, dtype=torch.float64)
    inputs = list(model.parameters())

    def gradients(run: Any) -> list[Any]:
        return list(torch.autograd.grad(run(x).square().sum(), inputs))

    model.policy = StoreAll()
    expected = gradients(model)
    model.policy = Reverse()
    backend = "inductor" if card.kind == "gpu" else "eager"
    for a, b in zip(gradients(torch.compile(model, backend=backend, fullgraph=True)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    model = ReversibleSequential(*[torch.compile(block, backend=backend) for block in blocks])
    for a, b in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_float32_streams_under_bfloat16_blocks(name: str) -> None:
    """``test_stream_dtype.py`` is the rehearsal."""
    card = usable(Card("gpu"))
    from tests.conformance.test_stream_dtype import Jax, Torch, drift

    with card.on(name):
        assert drift(Jax() if name == "jax" else Torch(), "float32") <= 5e-3


# --- what runs it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["torch_engine", "jax_engine"])
def test_benchmarks_take_a_gpu_or_say_that_there_is_none(
    engine: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words go to both, and what they say where there is none is a sentence."""
    import importlib

    usable(Card("cpu"))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main = importlib.import_module(f"benchmarks.{engine}.__main__")
    if Card("gpu").missing() is None:
        assert main.parse(["--device", "gpu", "--quick"]).device in ("gpu", "cuda")
        return
    with pytest.raises(SystemExit, match="2"):
        main.parse(["--device", "gpu", "--quick"])
    assert "--device gpu: " in capsys.readouterr().err.splitlines()[-1]


REPORT = """<testsuites><testsuite>
<testcase name="one"><properties>
<property name="precision" value="tf32" /><property name="case" value="a" /><property name="torch against JAX" value="1e-3" />
</properties></testcase>
<testcase name="two"><properties>
<property name="precision" value="tf32" /><property name="case" value="b" /><property name="torch against JAX" value="2e-3" />
</properties><failure message="no" /></testcase>
<testcase name="another test" />
</testsuite></testsuites>"""  # noqa: E501


def test_the_table_says_the_worst_of_each_precision_and_what_failed(tmp_path: Path) -> None:
    table = runpy.run_path(str(ROOT / "scripts" / "gpu_table.py"))["table"]
    report = tmp_path / "junit.xml"
    report.write_text(REPORT)
    lines = table(report, "a card").splitlines()
    assert "| tf32 | nan | nan | nan | nan | 2.0e-03 | 2 | 1 |" in lines
    assert "| tf32 | b | nan | nan | nan | nan | 2.0e-03 | FAILED |" in lines
    report.write_text("<testsuites><testsuite><testcase /></testsuite></testsuites>")
    with pytest.raises(SystemExit, match="holds no case"):
        table(report, "a card")


def test_the_script_refuses_without_a_gpu() -> None:
    if Card("gpu").missing() is None:
        pytest.skip("there is a GPU")
    script = [str(ROOT / "scripts" / "gpu_suite.sh")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([*script, "tests"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "torch sees no GPU here" in done.stderr) == (1, True)
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "rehearsal" in done.stderr) == (2, True)


def test_the_suite_skips_with_a_reason() -> None:
    class Nothing(Card):
        def missing(self) -> str | None:
            return "needs a GPU, and torch sees none"

    with pytest.raises(pytest.skip.Exception, match="needs a GPU"):
        usable(Nothing("gpu"))
