"""The PyTorch examples train, their gradients are the stored network's, and what they hold does not grow with depth."""

from __future__ import annotations

import importlib
import re
import signal
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if find_spec("sklearn") is None:
    pytest.skip("scikit-learn is not installed", allow_module_level=True)

from torch import Tensor, nn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from examples import __main__ as catalogue  # noqa: E402
from examples import irevnet, leapfrog_transformer, reformer, revgnn, torch_memory, torch_training  # noqa: E402
from examples.command_line import INTERRUPTED, POLICIES, PolicyName  # noqa: E402
from examples.tasks import nodes  # noqa: E402
from examples.torch_memory import BY_TORCH, Figures, count, loss_of, measure, set_policy, ways  # noqa: E402
from revcore import Coupling, Reverse, SpecError, StoreAll  # noqa: E402
from revcore_torch import ReversibleSequential  # noqa: E402
from tests.helpers import tree_error  # noqa: E402


@dataclass(frozen=True)
class Case:
    """How small an example is made here.

    Attributes:
        steps: training steps, over which its loss goes down.
        depth: at which it trains, and its gradients are compared.
        depths: between which all that it holds stays the same.
        rows: of a batch, where it does not train.
        needs: an optional package.
    """

    steps: int = 20
    depth: int = 2
    depths: tuple[int, int] = (4, 6)
    rows: int = 4
    needs: str = "torch"

    def of(self, name: str) -> tuple[torch_training.Example, Any, tuple[Tensor, Tensor]]:
        """Return the example, its task, and a batch of it cut to a few rows."""
        pytest.importorskip(self.needs)
        example = importlib.import_module(f"examples.{name}").example
        task = example.task(0)
        inputs, targets = torch_training.tensors(task.batch(0))
        return example, task, (inputs[: self.rows], targets[: self.rows])


CASES = {
    "revnet_cnn": Case(),
    "momentum_cnn": Case(steps=40),
    "irevnet": Case(depth=1),
    "revvit": Case(),
    "revcol": Case(depth=1),
    "reformer": Case(steps=3, depths=(2, 3), rows=1, needs="reformer_pytorch"),
    "leapfrog_transformer": Case(steps=10, rows=2),
    "revgnn": Case(steps=10, depths=(2, 3), rows=1797),  # the whole graph
}
every_example = pytest.mark.parametrize("name", CASES)


def run(name: str, *options: Any) -> Any:
    return CliRunner().invoke(importlib.import_module(f"examples.{name}").app, list(map(str, options)))


def test_every_example_is_tested() -> None:
    assert tuple(CASES) == catalogue.TORCH


# --- each example -----------------------------------------------------------------------------------------------------


@every_example
def test_it_learns(name: str) -> None:
    case = CASES[name]
    pytest.importorskip(case.needs)
    result = run(name, "--steps", case.steps, "--depth", case.depth, "--no-compare")
    assert result.exit_code == 0, result.output or result.exception
    losses = [float(loss) for loss in re.findall(r"^step \d+, loss (\S+),", result.output, re.MULTILINE)]
    assert losses[-1] < losses[0]
    assert "Held-out" in result.output
    assert f"| {name} | [" in result.output


def gradients(model: nn.Module, policy: Any, inputs: Tensor, targets: Tensor, seed: int = 1) -> dict[str, Any]:
    """Return the gradients of one training step, dropout and all, in float64; the same draws each time."""
    set_policy(model.double().train(), policy)
    model.zero_grad()
    torch.manual_seed(seed)
    loss_of(model, inputs.double() if inputs.is_floating_point() else inputs, targets).backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


@every_example
def test_its_gradients_are_those_of_the_stored_network(name: str) -> None:
    example, task, batch = CASES[name].of(name)
    model = example.make(task, CASES[name].depth)
    assert tree_error(gradients(model, Reverse(), *batch), gradients(model, StoreAll(), *batch)) <= 1e-9


@every_example
def test_what_it_holds_does_not_grow_with_depth(name: str) -> None:
    example, task, batch = CASES[name].of(name)
    found: dict[PolicyName, list[tuple[int, int]]] = {"reverse": [], "checkpoint": [], "store-all": []}
    for depth in CASES[name].depths:
        model = example.make(task, depth)
        for way, counts in found.items():
            set_policy(model, POLICIES[way])
            counts.append(count(model, *batch))
    shallow, deep = found["reverse"]
    assert shallow == deep
    assert shallow[0] > 0
    for way in ("checkpoint", "store-all"):  # so what is counted can grow
        assert found[way][0] < found[way][1], way
        assert min(found[way]) > shallow, way


# --- what the examples are measured by, and how it would tell ---------------------------------------------------------


def momentum_inverse_as_printed(y: Any, f: Any) -> Any:
    return y / 0.9 - f * (1 - 0.9)


def momentum(x: Any, f: Any) -> Any:
    return 0.9 * x + (1 - 0.9) * f


def test_a_wrong_inverse_shows_in_the_gradients() -> None:
    """It is that of a well-known page about MomentumNet."""
    blocks = [nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)]
    coupling = Coupling.from_functions(momentum, momentum_inverse_as_printed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), ReversibleSequential(*blocks, coupling=coupling), nn.Flatten())
    batch = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert tree_error(gradients(model, Reverse(), *batch), gradients(model, StoreAll(), *batch)) > 1e-4
    with pytest.raises(SpecError, match="inverse"):
        ReversibleSequential(*blocks, coupling_forward=momentum, coupling_inverse=momentum_inverse_as_printed)


def test_four_ways_to_one_loss() -> None:
    example, task, batch = CASES["revnet_cnn"].of("revnet_cnn")
    model = example.make(task, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    figures = measure(model, *batch, rounds=1)
    assert list(figures) == ["reverse", "checkpoint", BY_TORCH, "store-all"]
    assert {of.loss for of in figures.values()} == {figures["store-all"].loss}
    assert figures["store-all"].ratio == 1
    assert figures["reverse"].peak < figures[BY_TORCH].peak < figures["store-all"].peak
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert next(model.parameters()).grad is None


def test_pytorchs_checkpointing_is_around_each_block() -> None:
    calls: list[str] = []

    class Block(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            calls.append("call")
            return super().forward(input)

    model = nn.Sequential(ReversibleSequential(Block(2, 2), Block(2, 2)))
    for way, calls_expected in {"reverse": 4, "checkpoint": 4, BY_TORCH: 4, "store-all": 2}.items():
        calls.clear()
        loss_of(dict(ways(model))[way], torch.randn(3, 4), torch.arange(3)).backward()
        assert len(calls) == calls_expected, way


def test_a_table_and_a_row_of_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"reverse": 1, "checkpoint": 2, BY_TORCH: 3, "store-all": 8}
    figures = {name: Figures(2**19, size * 2**20, 1.25, 2.5) for name, size in sizes.items()}
    cells = [list(column.cells) for column in torch_memory.table(figures).columns]
    peaks = ["1.00 MiB", "2.00 MiB", "3.00 MiB", "8.00 MiB"]
    assert cells == [list(sizes), ["0.50 MiB"] * 4, peaks, ["1.25 ×"] * 4, ["2.500000"] * 4]
    monkeypatch.setattr(torch_memory, "measure", lambda *_: figures)
    result = run("revnet_cnn", "--steps", 1, "--depth", 1)
    assert f"accuracy | {' | '.join(peaks)} |" in result.output


def test_a_model_without_a_policy_is_told() -> None:
    with pytest.raises(SpecError, match="Linear holds no module with a policy"):
        set_policy(nn.Linear(1, 1), Reverse())


def test_ctrl_c_stops_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch_training.Learner.train_step

    def interrupted(*given: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return step(*given)

    monkeypatch.setattr(torch_training.Learner, "train_step", interrupted)
    result = run("revnet_cnn", "--steps", 5, "--depth", 1)
    assert result.exit_code == INTERRUPTED
    assert "Stopped after step 1 of 5." in result.output


def test_the_learning_rate_goes_up_and_down() -> None:
    rates = [torch_training.warm_up_cosine(300, step) for step in range(300)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[160] == pytest.approx(0.55)  # half of the way from step 20 to the end
    assert max(rates) == rates[20] == 1
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert torch_training.warm_up_cosine(1, 0) == 1


# --- i-RevNet's inverse -----------------------------------------------------------------------------------------------


def test_images_come_back_from_their_features() -> None:
    _, task, _ = CASES["irevnet"].of("irevnet")
    model = irevnet.IRevNet(2).eval()
    error = re.compile(r"off by (\S+) at most")
    told = error.search(irevnet.reconstruction(model, task))
    assert told is not None
    assert float(told[1]) < 1e-5
    features = model.features(torch.zeros(2, 1, 8, 8))
    assert features.shape == (2, 64, 1, 1)
    assert (model.images(features + 1) - torch.zeros(2, 1, 8, 8)).abs().max() > 0.1


# --- Reformer's hashes ------------------------------------------------------------------------------------------------


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list of the buckets that each hashing comes to, in both runs."""
    lsh = pytest.importorskip("reformer_pytorch.reformer_pytorch").LSHAttention
    plain, found = lsh.hash_vectors, []

    def hash_vectors(*args: Any, **kwargs: Any) -> Tensor:
        found.append(plain(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(lsh, "hash_vectors", hash_vectors)
    return found


@pytest.mark.parametrize("seed", [1, 2])
def test_the_second_run_draws_the_same_hash(hashes: list[Tensor], seed: int) -> None:
    _, _, batch = CASES["reformer"].of("reformer")
    model = reformer.Reformer(2)
    gradients(model, Reverse(), *batch)
    first, second, again_second, again_first = hashes
    assert torch.equal(first, again_first)
    assert torch.equal(second, again_second)
    assert not torch.equal(first, second)
    gradients(model, StoreAll(), *batch, seed=seed)
    assert torch.equal(first, hashes[4]) == (seed == 1)  # it is drawn, and of the generator that the engine puts back


def test_what_hashes_came_to_is_kept(hashes: list[Tensor]) -> None:
    """In bfloat16, where what is rebuilt is far enough from what was there to tip many of them."""
    _, _, batch = CASES["reformer"].of("reformer")
    model = reformer.Reformer(2).bfloat16()

    def tipped(policy: Any) -> int:
        hashes.clear()
        set_policy(model, policy)
        loss_of(model, *batch).backward()
        first, second, again_second, again_first = hashes
        return int((first != again_first).sum() + (second != again_second).sum())

    assert tipped(Reverse()) > 0
    assert tipped(reformer.KEEP_BUCKETS) == 0


def test_a_bucket_is_eight_bytes_for_each_token_head_and_hash() -> None:
    _, _, batch = CASES["reformer"].of("reformer")
    for depth in (1, 2):
        model, held = reformer.Reformer(depth), {}
        for policy in (Reverse(), reformer.KEEP_BUCKETS):
            set_policy(model, policy)
            held[policy], _ = count(model, *batch)
        kept = held[reformer.KEEP_BUCKETS] - held[Reverse()]
        assert kept == depth * 8 * batch[0].numel() * reformer.HEADS * reformer.HASHES
        for module in model.modules():  # reformer-pytorch's own copies of them
            assert not getattr(module, "_cache", None)


def test_reformer_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"reformer_pytorch is not installed, which examples\.reformer needs: pip"):
        reformer.Reformer(1)


# --- the leapfrog rule ------------------------------------------------------------------------------------------------


def test_each_step_leaps_over_the_one_before() -> None:
    model, tokens = leapfrog_transformer.LeapfrogTransformer(3).double(), torch.randint(256, (2, 64))
    now = before = model.embedding(tokens) + model.position.weight
    blocks: Any = model.body
    for block in blocks:
        a = block.attention(now)
        change = a + block.mlp(now + a)
        before, now = now, before + 2 * leapfrog_transformer.H * change
    torch.testing.assert_close(model(tokens), model.head(model.norm(now)))
    later = tokens.clone()
    later[:, 40:] = (later[:, 40:] + 1) % 256
    torch.testing.assert_close(model(later)[:, :40], model(tokens)[:, :40])
    assert (model(later)[:, 40:] != model(tokens)[:, 40:]).any(-1).all()


# --- RevGNN's graph ---------------------------------------------------------------------------------------------------


def test_a_graph_layer_takes_the_mean_of_the_neighbours() -> None:
    features = np.random.default_rng(0).normal(size=(40, 5))
    edges = torch.from_numpy(revgnn.neighbours(features))
    adjacency = torch.zeros(40, 40).index_put_(tuple(edges), torch.tensor(1.0))
    assert torch.equal(adjacency, adjacency.T)
    assert adjacency.sum(1).min() >= revgnn.NEIGHBOURS
    assert adjacency.diagonal().sum() == 0
    layer, x, mask = revgnn.GraphConv(4), torch.randn(40, 4), torch.rand(40, 4)
    inner = layer.norm(x).relu() * mask
    means = adjacency / adjacency.sum(1, keepdim=True) @ inner
    torch.testing.assert_close(layer(x, edges, mask), layer.own(inner) + layer.others(means))


def test_each_layer_has_the_masks_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor] = []
    plain = revgnn.GraphConv.forward

    def forward(self: Any, x: Tensor, edges: Tensor, mask: Tensor) -> Tensor:
        masks.append(mask)
        return plain(self, x, edges, mask)

    monkeypatch.setattr(revgnn.GraphConv, "forward", forward)
    model = revgnn.RevGNN(torch.tensor([[0, 1], [1, 0]]), depth=3)
    model(torch.ones(2, 64))
    assert len(masks) == 6
    for mask, of_group in zip(masks, masks[: revgnn.GROUPS] * 3, strict=True):
        assert torch.equal(mask, of_group)
    assert not torch.equal(masks[0], masks[1])
    model.eval()(torch.ones(2, 64))
    assert all((mask == 1).all() for mask in masks[6:])


def test_a_node_is_either_labelled_or_held_out() -> None:
    task = nodes(0)
    (_, given), ((_, hidden),) = task.batch(0), task.held_out
    assert int((given >= 0).sum()) == 180
    assert ((given >= 0) != (hidden >= 0)).all()
    logits = np.eye(10)[np.maximum(hidden, 0)]
    assert task.score(logits, hidden) == 1
    assert task.score(logits, given) == (given == 0)[given >= 0].mean()  # it says 0 of what is labelled
    told = revgnn.compare(nn.Linear(1, 1), task)
    assert min(map(float, re.findall(r"0\.\d+", told))) > 0.9


# --- the list ---------------------------------------------------------------------------------------------------------


def test_the_list_has_all_examples() -> None:
    result = CliRunner().invoke(catalogue.app, [])
    assert result.exit_code == 0, result.exception
    listed = {*catalogue.TORCH, *catalogue.FLAX, *catalogue.PRETRAINED}
    for name in listed:
        assert f"python -m examples.{name} " in result.output
    folder = Path(catalogue.__file__).parent
    runnable = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()}
    assert runnable == {*listed, "__main__"}


def test_all_at_once_leave_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(catalogue, "HERE", tmp_path / "examples")
    monkeypatch.setattr(catalogue, "TORCH", ("irevnet", "revcol"))
    figures = {name: Figures(0, 2**20, 1.0, 1.0) for name in ("reverse", "checkpoint", BY_TORCH, "store-all")}
    monkeypatch.setattr(torch_memory, "measure", lambda *_: figures)
    result = CliRunner().invoke(catalogue.app, ["all", "--steps", "1", "--write"])
    assert result.exit_code == 0, result.exception
    (path,) = (tmp_path / "benchmarks" / "results").glob("*-examples.md")
    report = path.read_text()
    assert report in result.output
    assert "python -m examples all --steps 1\n" in report
    rows = [line.split("|")[1:-1] for line in report.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in rows[0]] == list(torch_training.COLUMNS)
    assert [row[0].strip() for row in rows[2:]] == ["irevnet", "revcol"]
    assert np.unique([len(row) for row in rows]).tolist() == [len(torch_training.COLUMNS)]
