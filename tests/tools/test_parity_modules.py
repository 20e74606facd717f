"""Two models held against each other: they agree where they should, and what is wrong is found, at its step."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import name_of
from tests.tools.test_cli import call

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402
from torch import nn  # noqa: E402

import revcore  # noqa: E402
import revcore_jax  # noqa: E402
import revcore_jax.linen  # noqa: E402
import revcore_jax.nnx  # noqa: E402
import revcore_jax.parity  # noqa: E402
import revcore_torch  # noqa: E402
import revcore_torch.parity  # noqa: E402
from revcore import Anchor, Chain, Couple, Momentum, Program, Repeat, weights  # noqa: E402
from revcore.named import load_function  # noqa: E402
from revcore.parity import Parting, Record, Report, Stage, compare  # noqa: E402

pytestmark = pytest.mark.usefixtures("quickly_compiled_module")
DEPTH = 6
X = np.random.default_rng(0).standard_normal((2, 8))


class TorchBlock(nn.Module):
    def __init__(self, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4, epsilon)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return torch.tanh(self.mix(self.norm(x)))


class Spare(nn.Linear):
    """Has a parameter that it does not use."""

    def __init__(self, value: float) -> None:
        torch.manual_seed(0)
        super().__init__(8, 8)
        self.spare = nn.Parameter(torch.full((8,), value))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, epsilon: float = 1e-5) -> None:
        self.norm = nnx.LayerNorm(4, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
        self.mix = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return jnp.tanh(self.mix(self.norm(x)))


class LinenBlock(linen.Module):
    def setup(self) -> None:
        self.norm = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False)
        self.mix = linen.Dense(4)

    def __call__(self, x: Any) -> Any:
        return jnp.tanh(self.mix(self.norm(x)))


def in_torch(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    epsilons = options.pop("epsilons", [1e-5] * DEPTH)
    return revcore_torch.ReversibleSequential(*map(TorchBlock, epsilons), **options)


def in_nnx(**options: Any) -> nnx.Module:
    rngs, epsilons = nnx.Rngs(0), options.pop("epsilons", [1e-5] * DEPTH)
    return revcore_jax.nnx.ReversibleSequential(*(NnxBlock(rngs, e) for e in epsilons), **options)


def held(a: Any, b: Any, inputs: Any = (X,), **options: Any) -> Report:
    """Carry the weights of ``a`` into ``b``, and compare."""
    halves = [revcore_torch.parity if isinstance(m, nn.Module) else revcore_jax.parity for m in (a, b)]
    options = {"dtype": "float64", **options}
    carried = halves[0].parameters(a, inputs)
    return compare(halves[0].record(a, inputs, **options), halves[1].record(b, inputs, carried, **options))


@pytest.fixture(scope="module")
def truth() -> tuple[Record, Any]:
    """What the torch network gives, and its weights."""
    model = in_torch(coupling=Momentum(0.9)).double()
    return revcore_torch.parity.record(model, [X]), revcore_torch.parity.parameters(model)


@pytest.mark.long  # networks that run alike below agree as well
@pytest.mark.parametrize("order", ["torch against JAX", "JAX against torch"])
def test_equal_models_agree(order: str) -> None:
    models = [in_torch(coupling=Momentum(0.9)), in_nnx(coupling=Momentum(0.9))]
    report = held(*(models if order.startswith("torch") else models[::-1]))
    assert report.ok, f"\n{report}"
    assert report.depth == DEPTH
    assert report.dtype == "float64"
    assert len(report.steps) == DEPTH + 1
    assert report.steps[3].name in (
        "step 2 (Couple) of TorchBlock / NnxBlock",
        "step 2 (Couple) of NnxBlock / TorchBlock",
    )
    assert all(row.backward is not None for row in report.steps)
    assert {row.name for row in report.rows} >= {"output", "loss", "5.mix.weight", "(input 0)"}
    assert max(report.value_error or 0, report.gradient_error or 0) > 0  # two frameworks did compute


def test_a_block_with_other_weights_is_found(truth: tuple[Record, Any]) -> None:
    for step in (0, 4):
        moved = {**truth[1], f"{step}.mix.bias": truth[1][f"{step}.mix.bias"] + 1e-9}
        found = revcore_jax.parity.record(in_nnx(coupling=Momentum(0.9)), [X], moved, dtype="float64")
        report = compare(found, truth[0])
        assert not report.ok
        assert report.first_apart is not None
        assert report.first_apart[:2] == (f"step {step} (Couple) of NnxBlock / TorchBlock", "forward")
        assert f"they part going forward at step {step}" in report.verdict


def test_another_epsilon_is_found() -> None:
    report = held(in_torch(), in_nnx(epsilons=[1e-6 if i == 2 else 1e-5 for i in range(DEPTH)]))
    assert not report.ok
    assert report.first_apart is not None
    assert report.first_apart.name.startswith("step 2 ")


@dataclasses.dataclass(frozen=True)
class Mistaken(Momentum):
    """Right forward and back, but its gradient forgets ``1 − β``: the kind of mistake that old libraries made."""

    def vjp(self, x: Any, f: Any, gy: Any) -> tuple[Any, Any]:
        return self.beta * gy, gy


def test_a_coupling_with_a_wrong_adjoint_is_found_at_its_step(truth: tuple[Record, Any]) -> None:
    couplings: Any = [Mistaken(0.9) if i == 3 else Momentum(0.9) for i in range(DEPTH)]
    model = in_nnx(coupling=couplings)
    report = compare(revcore_jax.parity.record(model, [X], truth[1], dtype="float64"), truth[0])
    assert not report.ok
    assert report.value_error is not None
    assert report.value_error < 1e-14  # the forward pass is right
    assert report.first_apart is not None
    assert report.first_apart[:2] == ("step 3 (Couple) of NnxBlock / TorchBlock", "backward")


def test_what_lies_outside_of_the_steps() -> None:
    class Model(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.body, self.scale = in_torch(), scale

        def forward(self, x: Any) -> Any:
            return self.body(x) * self.scale

    torch.manual_seed(0)
    report = held(Model(1.0), Model(1.0 + 1e-9))
    assert not report.ok
    assert report.first_apart is not None
    assert report.first_apart[:2] == ("what comes after step 5 (Couple) of TorchBlock", "backward")
    assert report.first_apart.error == pytest.approx(1e-9)
    report = compare(
        Record({"y": 1.0}, steps=[Stage("input", [1.0])]), Record({"y": 2.0}, steps=[Stage("input", [1.0])])
    )
    assert "look outside of the steps" in report.verdict


def product(a: Any, b: Any) -> Any:
    return a * b, b


class TorchProduct(nn.Module):
    def forward(self, a: Any, b: Any) -> Any:
        return product(a, b)


def test_stacked_blocks_and_anchors_run_alike() -> None:
    """A Repeat stands stacked in NNX and in Linen, and apart in torch; an Anchor is a step too."""
    program = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0, Momentum(0.9))]), 2), Anchor(), Couple(0, 1)])
    blocks = [TorchBlock(), TorchBlock(), TorchBlock(), TorchBlock(), TorchProduct(), TorchBlock()]
    one = revcore_torch.ReversibleSequential(*blocks, program=program)
    rngs = nnx.Rngs(1)
    stacked = [revcore_jax.nnx.stack([NnxBlock(rngs), NnxBlock(rngs)]) for _ in range(2)]
    other = revcore_jax.nnx.ReversibleSequential(*stacked, product, NnxBlock(rngs), program=program)
    report = held(one, other)
    assert report.ok, f"\n{report}"
    assert [row.name.split(" of ")[0] for row in report.steps][-2:] == ["step 4 (Anchor)", "step 5 (Couple)"]
    assert all(row.backward is not None for row in report.steps)
    assert {row.name for row in report.rows} >= {"output", "loss", "5.mix.weight", "(input 0)"}
    assert (report.depth, report.dtype) == (6, "float64")
    assert max(report.value_error or 0, report.gradient_error or 0) > 0  # two frameworks did compute
    module = revcore_jax.linen.ReversibleSequential(
        [LinenBlock(), LinenBlock(), product, LinenBlock()], program=program
    )
    report = held(one, module)
    assert report.ok, f"\n{report}"
    assert report.steps[1].name == "step 0 (Couple) of TorchBlock / LinenBlock"
    # and back, from variables that a bound module brings
    bound = module.bind(module.init(jax.random.key(0), jnp.ones((2, 8))))
    report = held(bound, one)
    assert report.ok, f"\n{report}"


class TorchNet(nn.Module):
    """Two reversible networks, one of images with batch statistics, and a token of aux."""

    def __init__(self) -> None:
        super().__init__()
        self.first = revcore_torch.ReversibleSequential(
            *(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)) for _ in range(2))
        )
        self.second = revcore_torch.ReversibleSequential(nn.PReLU(), nn.Conv2d(2, 2, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        x = self.second(self.first(x))
        return self.head(x.mean((2, 3))), x


class NnxNet(nnx.Module):
    def __init__(self) -> None:
        r = nnx.Rngs(0)
        norm: Any = {"epsilon": 1e-5, "use_fast_variance": False, "rngs": r}
        self.first = revcore_jax.nnx.ReversibleSequential(
            *(nnx.Sequential(nnx.Conv(2, 2, (3, 3), padding=1, rngs=r), nnx.BatchNorm(2, **norm)) for _ in range(2))
        )
        self.second = revcore_jax.nnx.ReversibleSequential(nnx.PReLU(), nnx.Conv(2, 2, (1, 1), rngs=r))
        self.head = nnx.Linear(4, 3, rngs=r)

    def __call__(self, x: Any) -> Any:
        x = self.second(self.first(x))
        return self.head(x.mean((1, 2))), x


def test_images_batch_statistics_and_two_networks() -> None:
    one, other, x = TorchNet(), NnxNet(), np.random.default_rng(1).standard_normal((3, 4, 5, 6))
    for p in one.second.parameters():
        p.requires_grad_(False)  # frozen, but it has a gradient to compare
    report = held(one, other, [x], images=True)
    assert report.ok, f"\n{report}"
    assert [row.name.split(" of ")[0] for row in report.steps][2:4] == [
        "network 0, step 1 (Couple)",
        "network 1, input",
    ]
    assert {row.name for row in report.rows} >= {"output 0", "output 1", "second.0.weight"}
    assert not any(p.requires_grad for p in one.second.parameters())
    assert one.first[0][1].num_batches_tracked == 0  # nothing has moved
    assert not one.first[0][1].running_mean.any()
    assert not np.asarray(other.first.layers[0].layers[1].mean[...]).any()


def test_complex_gradients_are_torchs() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))

        def forward(self, x: Any) -> Any:
            return self.w * self.w * x

    class Other(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.zeros(2, jnp.complex64))

        def __call__(self, x: Any) -> Any:
            return self.w[...] * self.w[...] * x

    report = held(One(), Other(), [np.ones(2, np.complex64)], dtype=None)
    assert report.ok, f"\n{report}"


def test_a_record_leaves_the_model_as_it_was() -> None:
    model = in_torch()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    revcore_torch.parity.record(model, [X])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert "forward" not in vars(model)
    own, hooked = in_nnx(), revcore_jax.engine.wide
    state = jax.tree.map(jnp.copy, nnx.state(own))
    revcore_jax.parity.record(own, [X])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(own), state)
    assert revcore_jax.engine.wide is hooked


class Jitted(nnx.Module):
    def __init__(self) -> None:
        self.body = in_nnx()

    @nnx.jit
    def __call__(self, x: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.body(x)


class JittedAnew(nnx.Module):
    """Traced once more where the streams are noted."""

    def __init__(self) -> None:
        self.body = revcore_jax.nnx.ReversibleSequential(NnxBlock(nnx.Rngs(0)))

    def __call__(self, x: Any) -> Any:
        return jax.jit(lambda x: self.body(x))(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: revcore_torch.ReversibleSequential(nn.Dropout(0.5)), "Sequential draws random numbers"),
        (lambda: revcore_jax.nnx.ReversibleSequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0))), "draws random numbers"),
        (lambda: linen.Sequential([linen.Dropout(0.5, deterministic=False)]), "draws random numbers"),
        (lambda: nn.Sequential(nn.Flatten(), ToTokens()), "no tensor of floating point"),
        (Jitted, "runs inside jax.jit"),
        (JittedAnew, "runs inside jax.jit"),
        (lambda: "a model", "the model came as str, expected a torch.nn.Module"),
    ],
)
def test_what_cannot_be_compared_is_refused(make: Any, message: str) -> None:
    model, hooked = make(), revcore_jax.engine.wide
    half = revcore_torch.parity if isinstance(model, (nn.Module, str)) else revcore_jax.parity
    with pytest.raises(revcore.SpecError, match=message):
        half.record(model, [X])
    assert revcore_jax.engine.wide is hooked


class ToTokens(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.argmax(1)


def test_stages_that_are_not_one_programs() -> None:
    stages = [Stage("input", [X]), Stage("step 0 (Couple)", [X])]
    short = compare(Record(steps=stages), Record(steps=stages[:1]))
    assert short.problems == ("a has 2 stages and b has 1: not the same program",)
    other = compare(Record(steps=stages), Record(steps=[stages[0], Stage("step 0 (Anchor)", [X])]))
    assert other.problems == ("a has step 0 (Couple) where b has step 0 (Anchor): not the same program",)
    for wrong in ([X[:1]], [X * np.nan], []):
        report = compare(Record(steps=stages), Record(steps=[stages[0], Stage("step 0 (Couple)", wrong)]))
        assert report.first_apart == Parting("step 0 (Couple)", "forward", np.inf)
        assert not report.ok
    assert compare(Record(steps=stages), Record(steps=stages)).ok
    with pytest.raises(revcore.SpecError, match="expected Stage"):
        Record(steps=[[X]])  # type: ignore[list-item]


def test_the_first_step_is_sought_with_the_rounding_so_far() -> None:
    """An error that grows to the limit only later began earlier."""
    unit, b = 2.0**-23, [Stage(f"step {i}", [np.ones(1)]) for i in range(9)]
    a = [Stage(f"step {i}", [np.ones(1) + unit * (0 if i < 3 else 60 * 1.3 ** (i - 3))]) for i in range(9)]
    report = compare(Record(steps=a, depth=8), Record(steps=b, depth=8))
    assert report.first_apart is not None
    assert report.first_apart.name == "step 3"
    assert report.steps[3].forward < 16 * report.unit < report.steps[8].forward
    assert len(report.trail().splitlines()) == 3  # eight in a line
    assert compare(Record(steps=a[:4], depth=8), Record(steps=b[:4], depth=8)).ok


# --- the command ------------------------------------------------------------------------------------------------------

MODELS = """
import numpy as np
from tests.tools.test_parity_modules import Spare, in_nnx, in_torch, nn, revcore_jax, revcore_torch

X = np.random.default_rng(5).standard_normal((2, 8))
def one(): return in_torch()
def other(): return in_nnx()
def unlike(): return in_nnx(epsilons=[1e-5] * 5 + [1e-1])
def with_inputs(): return in_torch(), (X,)
def with_same_inputs(): return in_nnx(), X
def with_other_inputs(): return in_nnx(), X + 1
def larger(): return revcore_torch.ReversibleSequential(nn.Linear(5, 5))
def plain(): return nn.Sequential(nn.Linear(8, 8))
def spare(): return Spare(1.0)
def other_spare(): return Spare(2.0)
def needs(depth): return one()
def no_model(): return 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "models.py").write_text(MODELS)
    return str(tmp_path / "models.py")


def test_command(
    models: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(a: str, b: str, *options: str) -> tuple[int, str]:
        names = [name if name.endswith("safetensors") else f"{models}:{name}" for name in (a, b)]
        code = call(monkeypatch, "parity", *names, *options)
        return code, capsys.readouterr().out

    code, out = run("one", "other", "--shape", "2,8")
    assert code == 0
    assert "one and other agree" in out
    assert "all gradients" in out
    assert "error of the streams by step, in depth·eps:\n  0:  " in out
    code, out = run("one", "unlike", "--shape", "2,8", "--rows", "3")
    assert code == 1
    assert "one and unlike do NOT agree" in out
    assert "they part going forward at step 5 (Couple) of TorchBlock / NnxBlock" in out
    assert "the worst 3 of" in out
    assert "--dtype float64 tells" in out
    code, out = run("with_inputs", "with_same_inputs", "--dtype", "float64")
    assert code == 0
    assert "float64" in out
    code, out = run("one", "other", "--shape", "2,8", "--own-weights")
    assert code == 1
    assert out.count("do NOT agree") == 2  # the weights, and what they lead to
    code, out = run("plain", "plain", "--shape", "2,8")
    assert code == 0
    assert "No ReversibleSequential in plain (A) and plain (B)" in out

    file = str(tmp_path / "own.safetensors")
    weights.save(file, revcore_torch.to_neutral(in_torch()))
    assert run("one", file)[0] == 0
    assert run(file, "other")[0] == 1


def test_weights_that_differ_are_a_difference_though_nothing_shows_it(
    models: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{models}:{name}" for name in ("spare", "other_spare")]
    assert call(monkeypatch, "parity", *names, "--shape", "2,8", "--own-weights") == 1
    out = capsys.readouterr().out
    assert "do NOT agree" in out
    assert "agree: values differ" in out


def test_a_checkpoint_of_stacked_blocks_against_a_model_of_them(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stacked_models.py").write_text(
        "from tests.tools.test_parity_modules import *\n"
        "program = Program([Repeat(Couple(0, 1), 3)])\n"
        "def in_jax():\n"
        "    blocks = revcore_jax.nnx.stack([NnxBlock(nnx.Rngs(i)) for i in range(3)])\n"
        "    return revcore_jax.nnx.ReversibleSequential(blocks, program=program)\n"
    )
    make = load_function("stacked_models:in_jax", "A", "")
    stacked = revcore_jax.to_neutral(make())
    for name, tensors in {"stacked": stacked, "apart": revcore_jax.parity.parameters(make())}.items():
        weights.save(tmp_path / name, {key: np.asarray(value) for key, value in tensors.items()})
        assert call(monkeypatch, "parity", "stacked_models:in_jax", str(tmp_path / name)) == 0
        assert "agree" in capsys.readouterr().out
    assert weights.load(tmp_path / "stacked")[0].keys() != weights.load(tmp_path / "apart")[0].keys()


def test_the_commands_of_the_guide(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root)
    guide = (root / "docs" / "parity.md").read_text()
    commands = re.findall(r"^python -m revcore (parity examples\.\S+ .+)$", guide, re.MULTILINE)
    for command, code, words in zip(
        commands, (0, 1), ("agree: values differ", "forward at step 3 (Couple)"), strict=True
    ):
        assert call(monkeypatch, *command.split()) == code
        out = capsys.readouterr().out
        assert words in out
        assert out.splitlines()[0] in guide  # the table's header


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["one", "other"], ["no inputs came", "--shape 2,64", "model, inputs"]),
        (["one", "other", "--shape", "a"], ["--shape came as 'a'", "--shape 2,64"]),
        (["one", "other", "--tokens", "5"], ["--tokens came as 5", "--shape"]),
        (["one", "other", "--shape", "2,8", "--depth", "0"], ["--depth came as 0"]),
        (["one", "other", "--shape", "2,8", "--rows", "0"], ["--rows came as 0"]),
        (["one", "with_inputs", "--shape", "2,8"], ["--shape came, but a function brings inputs"]),
        (["with_inputs", "with_other_inputs"], ["both functions bring inputs, which differ", "Let one of them"]),
        (["one", "larger", "--shape", "2,8"], ["from_neutral: missing 0.weight", "unexpected 0.norm.weight"]),
        (["one", "needs", "--shape", "2,8"], ["B came as", "without arguments"]),
        (["one", "no_model", "--shape", "2,8"], ["B came as", "which returned int", "flax.nnx.Module"]),
        (["nothing", "one"], ["A came as", "has no attribute 'nothing'"]),
    ],
    ids=lambda value: name_of(" ".join(value)),
)
def test_errors_say_what_to_write(
    arguments: list[str],
    words: list[str],
    models: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [f"{models}:{name}" for name in arguments[:2]]
    assert call(monkeypatch, "parity", *names, *arguments[2:]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(word in error for word in words), error
    assert "Traceback" not in error
