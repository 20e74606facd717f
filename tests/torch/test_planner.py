"""The planner: what it says is what a real run takes, byte for byte, and it leaves no trace."""

from __future__ import annotations

import copy
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from revcore import Checkpoint, Couple, Momentum, Policy, Program, Reverse, SpecError, StoreAll
from revcore_torch import ReversibleSequential, planner, zoo
from revcore_torch.memory import LiveBytes
from revcore_torch.planner import Plan, Row, plan
from tests.tiers import product

WIDTH = 8
POLICIES = (StoreAll, Checkpoint, Reverse)
DOCS = Path(__file__).parents[2] / "docs" / "planning.md"


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, WIDTH))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Dropout(0.1))


class Classifier(nn.Module):
    """A reversible network in the middle of an ordinary one."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * WIDTH, 3, padding=1)
        self.body = ReversibleSequential(*[conv() for _ in range(depth)])
        self.head = nn.Linear(2 * WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.relu(self.stem(x))).mean((2, 3)))


def perceptron(depth: int) -> tuple[nn.Module, Tensor]:
    return ReversibleSequential(*[mlp() for _ in range(depth)]), torch.randn(64, 2 * WIDTH)


def transformer(depth: int) -> tuple[nn.Module, Tensor]:
    blocks = [mlp() if i % 2 else SelfAttention() for i in range(depth)]
    return ReversibleSequential(*blocks, split_dim=-1), torch.randn(4, 6, 2 * WIDTH, requires_grad=True)


def classifier(depth: int) -> tuple[nn.Module, Tensor]:
    return Classifier(depth), torch.randn(4, 3, 6, 6)


def momentum(depth: int) -> tuple[nn.Module, Tensor]:
    program = Program((Couple(0, (1,), Momentum(0.9)), Couple(1, (0,))) * (depth // 2))
    return ReversibleSequential(*[mlp() for _ in range(depth)], program=program), torch.randn(32, 2 * WIDTH)


def real(model: nn.Module, x: Tensor, policy: Policy) -> tuple[int, int]:
    """Return the bytes held after a real forward pass, and the peak of both passes."""
    given = list(model.parameters())
    model, x = copy.deepcopy((model, x))
    for copied, parameter in zip(model.parameters(), given, strict=True):  # which deepcopy leaves out
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    for module in model.modules():
        if isinstance(module, ReversibleSequential):
            module.policy = policy
    with LiveBytes() as memory:
        loss = model(x).sum()
        held = memory.live
        loss.backward()
    return held, memory.peak


def differences(found: Plan, model: nn.Module, x: Tensor) -> list[str]:
    """Return what of the plan a real run contradicts."""
    runs = [(row, real(model, x, row.policy)) for row in found.rows]
    return [f"{row} but really {run}" for row, run in runs if (row.held, row.peak) != run]


@pytest.mark.parametrize(
    ("make", "depth"),
    product(
        [perceptron, transformer, classifier, momentum],
        [2, 8, 16],
        # a policy and a kind of block may meet (buffers, dropout), each with a depth does not
        fast=lambda make, depth: depth == 2 or (make is perceptron and depth == 8),
        name=lambda value: getattr(value, "__name__", str(value)),
    ),
)
def test_the_plan_is_what_a_real_run_takes(make: Callable[[int], tuple[nn.Module, Tensor]], depth: int) -> None:
    """Not within 5 %: equal."""
    model, x = make(depth)
    policies = [*planner.default_policies(depth), Reverse(anchor_every=3), (StoreAll(), *[Reverse()] * (depth - 1))]
    found = plan(model, x, policies={2: policies, 8: policies[::3], 16: policies[1::3]}[depth])
    assert not differences(found, model, x)


def test_a_policy_is_planned_for_every_network_of_a_model() -> None:
    (first, x), (second, _) = perceptron(2), perceptron(4)
    model = nn.Sequential(first, second)
    assert not differences(plan(model, x, policies=[StoreAll(), Reverse()]), model, x)


def test_kept_operations_and_offload_are_planned_too() -> None:
    operators = [torch.ops.aten.addmm.default]
    policies = [Reverse(recompute=operators), Checkpoint(recompute=operators), *(p(offload=True) for p in POLICIES)]
    model, x = transformer(2)
    assert not differences(plan(model, x, policies=policies), model, x)
    assert planner.name_of(policies[0]) == "Reverse(recompute=[aten.addmm.default])"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")  # by mkldnn.flags itself
def test_a_kernel_that_hides_what_it_keeps_is_refused() -> None:
    model, x = ReversibleSequential(Recurrent(), Recurrent(), split_dim=-1), torch.randn(2, 5, 2 * WIDTH)
    if torch.backends.mkldnn.is_available():
        with pytest.raises(SpecError, match=r"mkldnn_rnn_layer.default hides .*mkldnn.flags\(enabled=False\)"):
            plan(model, x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not differences(plan(model, x, policies=[StoreAll(), Reverse()]), model, x)


def test_gradients_that_are_there_are_not_made() -> None:
    model, x = classifier(2)
    policies = [StoreAll(), Checkpoint(), Reverse()]
    made = plan(model, x, policies=policies)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    found = plan(model, x, policies=policies)
    assert not differences(found, model, x)
    assert all(a.peak <= b.peak for a, b in zip(found.rows, made.rows, strict=True))
    assert found.rows[-1].peak < made.rows[-1].peak
    assert plan(model, x, policies=policies, gradients=False).rows == made.rows


def test_a_plan_that_lies_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = perceptron(8)
    honest = LiveBytes._see

    def blind(self: LiveBytes, leaf: Any, counts: bool) -> None:
        honest(self, leaf, counts and not (isinstance(leaf, Tensor) and leaf.shape == (64, 32)))

    with monkeypatch.context() as patch:
        patch.setattr(LiveBytes, "_see", blind)
        found = plan(model, x, policies=[StoreAll(), Reverse()])
    assert len(differences(found, model, x)) == 2


def test_a_plan_leaves_no_trace() -> None:
    calls = []
    model, x = classifier(4)
    model.register_forward_hook(lambda *_: calls.append(1))
    body = model.get_submodule("body")
    assert isinstance(body, ReversibleSequential)
    body.policy = Checkpoint(every=2)
    model(x).sum().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [(p.grad, p.grad._version, p._version) for p in model.parameters() if p.grad is not None]
    before = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()
    with torch.no_grad():
        plan(model, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.is_grad_enabled()) == before[1:]
    after = [(p.grad, p.grad._version, p._version) for p in model.parameters() if p.grad is not None]
    assert all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(grads, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert body.policy == Checkpoint(every=2)
    assert not hasattr(x.grad, "shape")
    assert len(model._forward_hooks) == 1


def test_a_failing_plan_leaves_no_trace() -> None:
    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("late")

    model = nn.Sequential(ReversibleSequential(mlp(), mlp()), Late())
    with pytest.raises(KeyError, match="late"):
        plan(model, torch.randn(4, 2 * WIDTH))
    assert torch.ones(2).sum().item() == 2  # no mode is left on
    assert all(p.grad is None for p in model.parameters())


def test_tensors_that_blocks_close_over_get_no_gradient() -> None:
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    class Closing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            function = lambda x: torch.tanh(x @ weight)  # noqa: E731
            self.functions = [function]

        def forward(self, x: Tensor) -> Tensor:
            return self.functions[0](x)

    model = ReversibleSequential(Closing(), Closing())
    plan(model, torch.randn(4, 2 * WIDTH))
    assert weight.grad is None
    weight.grad = given = torch.ones_like(weight)
    plan(model, torch.randn(4, 2 * WIDTH))
    assert weight.grad is given
    assert torch.equal(given, torch.ones_like(weight))


def test_models_without_data_are_planned_alike() -> None:
    policies = [StoreAll(), Reverse()]
    torch.manual_seed(0)
    found = plan(*transformer(2), policies=policies)
    with torch.device("meta"):
        assert plan(*transformer(2), policies=policies) == found
    with FakeTensorMode():
        assert plan(*transformer(2), policies=policies) == found
    with LiveBytes() as outside:
        assert plan(*transformer(2), policies=policies) == found
    assert outside.peak < 100_000  # the model and its input, and nothing that was planned


def test_reversible_stays_flat_at_sizes_that_this_machine_does_not_have() -> None:
    """The prototype's figures: checkpointing takes 1,339 MiB, and 50 more a step; reversible the same at any depth."""
    mib = {}
    for depth, policies in (12, [StoreAll(), Checkpoint(), Reverse()]), (14, [Checkpoint(), Reverse()]):
        with torch.device("meta"):
            model, inputs = zoo.transformer(depth)
        rows = plan(model, *inputs, policies=policies, gradients=True).rows
        mib[depth] = [row.peak / 2**20 for row in rows]
    assert [round(m) for m in mib[12][:2]] == [4995, 1339]
    assert round(mib[14][0]) == 1439
    assert mib[12][-1] == mib[14][-1] < 900


def test_work_is_counted_in_forward_passes() -> None:
    model, x = perceptron(8)
    policies = [StoreAll(), Reverse(), Reverse(keep_last=1), Reverse(keep_last=4), Checkpoint(every=3)]
    work = [row.work for row in plan(model, x, policies=policies).rows]
    # the input has no gradient, so the first block takes less than 2 F
    # and the last of each three checkpointed steps stops before its last product
    assert work == pytest.approx([3, 4, 3.875, 3.5, 4 - 3 / 16], abs=0.2)
    assert work[1] - work[0] == pytest.approx(1)
    model = ReversibleSequential(nn.Tanh(), nn.Tanh())
    assert "–" in str(plan(model, x.requires_grad_()))


def test_totals() -> None:
    model, x = classifier(4)
    size, buffers = (sum(t.nbytes for t in tensors) for tensors in (model.parameters(), model.buffers()))
    found = plan(model, x, optimizer="adamw", gradients=True, policies=[Reverse()])
    assert (found.parameters, found.gradients, found.optimizer, found.depth) == (size + buffers, size, 2 * size, 4)
    assert found.total(found.rows[0]) == 4 * size + buffers + found.rows[0].peak


def test_a_loss_of_ones_own_and_inputs_of_any_kind() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = ReversibleSequential(mlp(), mlp())

        def forward(self, batch: dict[str, Tensor], *, scale: float) -> dict[str, Any]:
            y = self.body(batch["x"]) * scale
            return {"y": y, "count": torch.ones(3, dtype=torch.long), "name": "out", "z": y.to(torch.complex64)}

    batch = {"x": torch.randn(4, 2 * WIDTH)}
    policies = [Reverse()]
    assert plan(TwoOutputs(), batch, scale=2.0, policies=policies).rows[0].peak > 0
    square = plan(TwoOutputs(), batch, scale=2.0, policies=policies, loss=lambda out: out["y"].square().mean()).rows[0]
    assert square.peak > 0
    with pytest.raises(SpecError, match=r"scalar loss that has a gradient.*shape \(4, 16\)"):
        plan(TwoOutputs(), batch, scale=2.0, loss=lambda out: out["y"])


class Sorted(nn.Module):
    """A block that looks at its data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.mean().item() > 0 else x


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(x.detach().numpy()).sin()


class Uncopyable(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.frame = sys._getframe()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(2 * WIDTH, 2), "no ReversibleSequential in the Linear"),
        (lambda: ReversibleSequential(Sorted(), mlp()), "_local_scalar_dense.* needs the data.*Reverse"),
        (lambda: ReversibleSequential(Numpy(), mlp()), "fake tensors.*did not go.*register_fake"),
        (lambda: ReversibleSequential(Uncopyable(), mlp()), "cannot be copied .*frame"),
        (lambda: ReversibleSequential(nn.Tanh(), nn.Tanh()), "requires_grad=False"),
        (lambda: ReversibleSequential(nn.LazyLinear(WIDTH), mlp()), "lazy parameters .* call it once"),
    ],
)
def test_what_cannot_be_planned_says_why(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        plan(make(), torch.randn(4, 2 * WIDTH))


def test_an_operator_without_a_fake_implementation_is_named() -> None:
    @torch.library.custom_op("revcore_test::opaque", mutates_args=())
    def opaque(x: Tensor) -> Tensor:
        return x.clone()

    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return opaque(x)

    with pytest.raises(SpecError, match=r"revcore_test[.:]+opaque.*register_fake"):
        plan(ReversibleSequential(Opaque(), mlp()), torch.randn(4, 2 * WIDTH))


def test_a_wrong_request_says_what_was_expected() -> None:
    model, x = perceptron(2)
    with pytest.raises(SpecError, match="optimizer came as 'lion', expected one of 'none', 'sgd'"):
        plan(model, x, optimizer="lion")
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="device came as 'cuda'"):
            plan(model, x, device="cuda")
    with pytest.raises(SpecError, match="policy came as 'reverse'"):
        plan(model, x, policies=["reverse"])  # type: ignore[list-item]


def test_compiled_blocks_are_planned_eagerly() -> None:
    model = ReversibleSequential(*[torch.compile(mlp(), backend="eager") for _ in range(2)])
    eager = ReversibleSequential(mlp(), mlp())
    x = torch.randn(4, 2 * WIDTH)
    policies = [StoreAll(), Reverse()]
    assert plan(model, x, policies=policies).rows == plan(eager, x, policies=policies).rows


def test_the_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(*perceptron(4))
    found.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    with pytest.raises(SpecError, match="cannot be written"):
        found.plot(tmp_path / "nowhere" / "plan.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SpecError, match=r"pip install 'revcore-nn\[demo\]'"):
        found.plot(tmp_path / "other.png")


def test_the_bars_of_the_picture_end_at_the_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, _: figures.append(figure))
    gib = 2**30
    rows = Row(StoreAll(), gib, 5 * gib, 1, 3.0), Row(Reverse(), gib, gib, 1, 4.0)
    Plan(parameters=2 * gib, gradients=0, optimizer=4 * gib, depth=4, rows=rows).plot("plan.png")
    assert [bar.get_x() + bar.get_width() for bar in figures[0].axes[0].patches[-2:]] == [11, 7]


def test_the_table() -> None:
    found = plan(*perceptron(4), policies=[StoreAll(), Reverse(keep_last=1)])
    lines = str(found).splitlines()
    assert lines[0].startswith("depth 4: parameters")
    assert lines[1].split() == ["policy", "held", "peak", "total", "work"]
    assert lines[3].startswith("Reverse(keep_last=1)")
    assert planner.in_bytes(found.rows[1].peak) in lines[3]


def test_the_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, DOCS.name, "exec"), names)
    assert (tmp_path / "plan.png").exists()
