"""``torch.compile`` of a whole model: one graph where blocks only compute, two around the tape where they do more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

import revcore
from revcore_torch import Checkpoint, MemoryBudget, Reverse, ReversibleSequential, StoreAll, compiled, reversible
from revcore_torch.tape import Tape
from tests.tiers import product
from tests.torch.harness import EVERYTHING, POLICIES, REVERSE, WIDTH, Setting, block, check, make_input
from tests.torch.registry import Section

pytestmark = [
    # what dynamo and inductor do themselves: instantiate a Function that is traced, ask for the gradient of what
    # crosses a graph break, use torch.jit
    pytest.mark.filterwarnings(
        "ignore:.*should not be instantiated. Methods on autograd functions",
        "ignore:The .grad attribute of a Tensor that is not a leaf",
        "ignore:`torch.jit.script",
    ),
]
SETTINGS = {
    **POLICIES,
    "three streams": Setting(num_streams=3),
    "momentum": Setting(coupling=revcore.Momentum(0.9), update=lambda x, f: 0.9 * x + (1 - 0.9) * f),
    "a policy for each step": Setting([Reverse(), StoreAll(), Checkpoint()], num_streams=3),
}
SHORT = 3  # a first block, one between and a last: what compiling takes grows with depth
TWO = 2  # where depth is not the point


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


class Graphs(CompileCounterWithBackend):
    """A backend that counts the graphs it is given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        super().__init__(backend)

    @property
    def count(self) -> int:
        return self.frame_count


def is_ours(model: Any) -> bool:
    """Whether it is what the case is about; the networks that it is compared with run as they are."""
    return isinstance(model, ReversibleSequential) and model.policy != StoreAll()


def compile_whole(model: Any, backend: str = "eager", stored: bool = False, **options: Any) -> Any:
    """Compile ours; with ``stored``, a store-all network as well. Dynamo's graph is the subject: ``eager`` runs it.

    What is made of it beyond is seen once (``aot_eager``).
    """
    compiles = isinstance(model, ReversibleSequential) if stored else is_ours(model)
    return torch.compile(model, backend=backend, fullgraph=True, **options) if compiles else model


def compile_around(model: Any) -> Any:
    return torch.compile(model, backend="eager") if is_ours(model) else model


def train_compiled(model: Any, *args: Any, **options: Any) -> list[Any]:
    x = make_input()
    y = compile_whole(model, **options)(x, *args)
    y.pow(2).sum().backward()
    return [y, x.grad]


def small_block(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def small_dropout_block(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.4))


def batch_norm_block(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh())


one = Section("torch.compile, in one graph (fullgraph=True)")


# A coupling that is not additive, and segments of each kind, are traced otherwise; other settings are parts of these.
@one.same(
    "a network whose blocks only compute",
    make=block,
    settings=SETTINGS,
    fast=("momentum", "a policy for each step"),
    depth=SHORT,
)
def test_one_graph(model):
    by_step = isinstance(getattr(model, "policy", None), list)
    return train_compiled(model, backend="eager" if by_step else "aot_eager")


def test_affine_in_one_graph() -> None:
    check(train_compiled, small_block, EVERYTHING["affine"], 1)


@one.same("with dropout, in evaluation mode", settings=REVERSE, depth=SHORT)
@pytest.mark.long
def test_evaluation(model):
    return train_compiled(model.eval())


@one.same(
    "with batch statistics, in evaluation mode",
    make=lambda width: nn.Sequential(batch_norm_block(width), nn.Dropout(0.4)),
    settings=REVERSE,
    depth=TWO,
)
def test_evaluation_statistics(model):
    return train_compiled(model.eval())


@one.works("dropout, under a policy that reverses nothing", note="`StoreAll()` and `Checkpoint()`")
@pytest.mark.parametrize("policy", [pytest.param(StoreAll(), marks=pytest.mark.long), Checkpoint(2)], ids=str)
def test_dropout_without_reversing(policy):
    # the operation that dynamo makes of a checkpoint draws alike only in what is made of the graph ahead of time
    check(partial(train_compiled, backend="aot_eager", stored=True), small_dropout_block, Setting(policy), SHORT)


@one.same("under `torch.no_grad`, dropout too", make=small_dropout_block, settings=REVERSE, depth=TWO)
def test_compiled_no_grad(model):
    with torch.no_grad():
        return compile_whole(model)(make_input())


class Scaled(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, scale: Any = (1.0, 0.0), *, shift: Any = None) -> Tensor:
        f = self.linear(x) * scale[0] + scale[1]
        return f if shift is None else f + shift["by"]


@one.same("nested arguments with gradients", make=Scaled, settings=REVERSE, depth=SHORT)
@pytest.mark.long  # the next test has them, too
def test_arguments(model):
    a, b = torch.full((WIDTH,), 0.5, dtype=torch.float64, requires_grad=True), make_input(width=WIDTH)
    x = make_input()
    scale = (a.exp(), 2.0)
    compile_whole(model)(x, scale, shift={"by": b}).pow(2).sum().backward()
    return [x.grad, a.grad, b.grad]


@one.same("arguments for each block", make=Scaled, settings=REVERSE, depth=TWO, note="beside common ones")
def test_compiled_layerwise(model):
    each = [torch.full((WIDTH,), float(i), dtype=torch.float64, requires_grad=True) for i in range(len(model))]
    a = torch.full((WIDTH,), 0.5, dtype=torch.float64, requires_grad=True)
    x = make_input()
    y = compile_whole(model)(x, (a.exp(), 2.0), layerwise_args_kwargs=[((), {"shift": {"by": e}}) for e in each])
    y.pow(2).sum().backward()
    return [x.grad, a.grad, *(e.grad for e in each)]


@one.same("tied blocks and frozen parameters", make=small_block, settings=REVERSE, depth=4)
def test_tied_and_frozen(model):
    model[3] = model[0]
    model[1].requires_grad_(False)
    model[2][0].weight = model[0][0].weight
    return train_compiled(model)


@one.same("autocast around it", make=small_block, settings={"reverse": Setting(tolerance=3e-2)}, depth=TWO)
def test_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compile_whole(model.float())(make_input().detach().float())
    y.pow(2).sum().backward()
    return [y]


@one.same("the batch as a dynamic size", make=small_block, settings=REVERSE, depth=TWO)
def test_dynamic(model):
    run = compile_whole(model, dynamic=True)
    found = []
    for rows in (3, 7):
        x = make_input(rows)
        run(x).pow(2).sum().backward()
        found.append(x.grad)
    return found


@one.works("a reversible network inside a model, and the functional form")
def test_inside():
    torch.manual_seed(0)
    blocks = [small_block().double() for _ in range(2)]
    program = revcore.revnet(2)

    def loss(x: Tensor, policy: Any) -> Tensor:
        a, b = reversible(program, blocks, (x.sin(), x), policy=policy)
        return (a * b).sum()

    graphs = Graphs()
    found = []
    for run, policy in ((torch.compile(loss, backend=graphs, fullgraph=True), Reverse()), (loss, StoreAll())):
        x = make_input(width=WIDTH)
        parameters = [p for b in blocks for p in b.parameters()]
        found.append(torch.autograd.grad(run(x, policy), [x, *parameters]))
    assert graphs.count == 1
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "train": lambda model: model.train(),
    "eval": lambda model: model.eval(),
    "anchors": lambda model: setattr(model, "policy", Reverse(anchor_every=1)),
    "append": lambda model: model.append(small_block().double()),
    "store": lambda model: setattr(model, "policy", StoreAll()),
}


@one.works("the mode, the policy and the blocks changed between calls")
@pytest.mark.parametrize(
    "changes",
    ["eval train store append", pytest.param("train eval anchors append train store", marks=pytest.mark.long)],
)
def test_changes_between_calls(changes):
    torch.manual_seed(0)
    model = ReversibleSequential(*[small_dropout_block() for _ in range(2)]).double()
    run = torch.compile(model, backend="eager")
    for change in changes.split():
        CHANGES[change](model)
        found = []
        for call in (run, model):
            torch.manual_seed(7)
            x = make_input()
            found.append(torch.autograd.grad(call(x).pow(2).sum(), [x, *model.parameters()]))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def saved_elements(run: Any, model: nn.Module) -> int:
    """Return how many elements a compiled call keeps for the backward pass, beside the parameters."""
    x = make_input()
    run(x)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    return sum(size for place, size in kept.items() if place not in theirs)


@pytest.mark.parametrize("depths", [(2, 3), pytest.param((2, 4, 8), marks=pytest.mark.long)], ids=str)
def test_what_one_graph_keeps_does_not_grow_with_depth(depths: tuple[int, ...]) -> None:
    def kept(depth: int, policy: Any) -> int:
        torch._dynamo.reset()
        model = ReversibleSequential(*[small_block() for _ in range(depth)], policy=policy).double()
        return saved_elements(torch.compile(model, backend="aot_eager", fullgraph=True), model)

    stream = make_input().numel() // 2
    ours = {depth: kept(depth, Reverse()) for depth in depths}
    assert len(set(ours.values())) == 1, ours
    # the two streams; beside them, what the compiler finds that both the last block's runs compute
    assert 2 * stream <= ours[2] <= 4 * stream
    assert kept(depths[-1], StoreAll()) >= ours[2] + 2 * (depths[-1] - 2) * stream


@pytest.mark.long  # the graph is the one that `aot_eager` gets above
def test_one_graph_compiled_by_inductor() -> None:
    torch.manual_seed(0)
    model = ReversibleSequential(*[block() for _ in range(3)]).double()
    found = []
    for run in (torch.compile(model, fullgraph=True), model):
        x = make_input()
        found.append(torch.autograd.grad(run(x).pow(2).sum(), [x, *model.parameters()]))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


two = Section("torch.compile, where blocks do more than compute")
OUTSIDE = "runs outside of the graph: "


@two.same(
    "dropout",
    note="one graph break; blocks are compiled each by itself, as the model is, and memory is flat in depth",
    make=small_dropout_block,
    settings={name: SETTINGS[name] for name in ("reverse", "a policy for each step")},
    fast=("reverse",),
    depth=SHORT,
)
def test_compiled_dropout(model):
    x = make_input()
    compile_around(model)(x).pow(2).sum().backward()
    return [x.grad]


@two.same("batch statistics", make=batch_norm_block, settings=REVERSE, depth=TWO)
def test_compiled_statistics(model):
    x = make_input()
    compile_around(model)(x).pow(2).sum().backward()
    return [x.grad]


class Careful(torch.autograd.Function):
    """Tells only what somebody wants: as DeepSpeed's linear layer, which ZeRO-3 puts in the place of PyTorch's."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return grad @ weight if wanted[0] else None, grad.t() @ x if wanted[1] else None


class ByFunction(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return Careful.apply(input.tanh(), self.weight) + self.bias


@two.same(
    "a `torch.autograd.Function` that asks `ctx.needs_input_grad`",
    make=lambda width: ByFunction(width, width),
    settings=REVERSE,
    depth=TWO,
)
def test_compiled_function(model):
    x = make_input()
    compile_around(model)(x).pow(2).sum().backward()
    return [x.grad]


@two.same(
    "a whole training step: forward, backward and optimizer", make=small_dropout_block, settings=REVERSE, depth=TWO
)
def test_training_step(model):
    return _steps(model, 2)


@two.same("a whole training step of blocks that only compute", make=small_block, settings=REVERSE, depth=TWO)
def test_training_step_in_a_graph(model):
    return _steps(model, 1)


def _steps(model: nn.Module, number: int) -> list[Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss

    run = torch.compile(step, backend="eager") if isinstance(model, ReversibleSequential) else step
    return [run(make_input().detach()) for _ in range(number)] + list(model.parameters())


@two.refuses("dropout, with `fullgraph=True`", Unsupported, OUTSIDE + "a block draws random numbers")
def test_dropout_in_one_graph(refused):
    with refused:
        train_compiled(ReversibleSequential(small_dropout_block(), small_dropout_block()).double())


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.tanh() * self.calls


@two.refuses(
    "batch statistics or any other buffer that moves, with `fullgraph=True`",
    Unsupported,
    OUTSIDE + "a block changes its buffers",
)
@pytest.mark.parametrize("make", [pytest.param(batch_norm_block, marks=pytest.mark.long), Counts])
def test_statistics_in_one_graph(refused, make):
    with refused:
        train_compiled(ReversibleSequential(*[make() for _ in range(2)]).double())


@two.refuses("more outputs than `f`, with `fullgraph=True`", Unsupported, OUTSIDE + "a block returns more than its f")
def test_aux_in_one_graph(refused):
    class More(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.tanh(), x.mean()

    with refused:
        train_compiled(ReversibleSequential(More(), More()).double())


@two.refuses(
    "a closure over a tensor with a gradient, with `fullgraph=True`", Unsupported, OUTSIDE + "a block closes over"
)
def test_closure_in_one_graph(refused):
    weight = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)

    class Closing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() * weight

    with refused:
        train_compiled(ReversibleSequential(Closing(), Closing()).double())


@two.refuses("backward hooks on a block, with `fullgraph=True`", Unsupported, OUTSIDE + "a block has backward hooks")
def test_hooks_in_one_graph(refused):
    model = ReversibleSequential(small_block(), small_block()).double()
    model[0][0].register_full_backward_hook(lambda *_: None)
    with refused:
        train_compiled(model)


@two.refuses("`recompute=`, `offload=`, a budget, with `fullgraph=True`", Unsupported, OUTSIDE + "recompute=, offload=")
@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(Reverse(recompute=[torch.ops.aten.addmm.default]), marks=pytest.mark.long),
        Reverse(offload=True),
        MemoryBudget(fraction=0.9),
    ],
)
def test_policies_in_one_graph(refused, policy):
    with refused:
        train_compiled(ReversibleSequential(small_block(), small_block(), policy=policy).double())


@pytest.mark.parametrize(
    ("make", "depth"),
    product(
        [small_dropout_block, batch_norm_block],
        [2, 4, 8],
        fast=lambda make, depth: make is small_dropout_block and depth == 4,
        name=lambda value: getattr(value, "__name__", str(value)),
    ),
)
def test_graphs_outside_and_what_they_keep_do_not_grow_with_depth(
    make: Any, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = Graphs("eager")
    tapes: list[Tape] = []
    record = Tape.record

    def watched(self: Tape, *args: Any) -> Any:
        tapes.append(self)
        return record(self, *args)

    monkeypatch.setattr(Tape, "record", watched)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 1)
            self.body = ReversibleSequential(*[make() for _ in range(depth)])

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(self.first(x)))

    model = Model().double()
    y = torch.compile(model, backend=graphs)(make_input())
    node = tapes[0].node() if tapes[0].node else None
    assert node is not None
    assert sum(t.numel() for t in node.saved_tensors) == make_input().numel()
    y.sum().backward()
    # before the network, the block (one for all of its likes), the joining of the streams, and after the network
    assert graphs.count == 4


def test_the_trial_before_tracing_is_what_keeps_dropout_right() -> None:
    """Without it, the backward pass in the graph draws another mask, and nobody says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_obstacle", lambda *_: None)
        with pytest.raises(AssertionError, match="off by"):
            check(train_compiled, small_dropout_block, depth=TWO)


def test_drift_is_warned_of_while_it_compiles() -> None:
    model = ReversibleSequential(*[nn.Linear(4, 4) for _ in range(2)], coupling=revcore.Momentum(1e-6))
    with pytest.warns(revcore.DriftWarning, match="2 steps, run back in float32"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 8))
