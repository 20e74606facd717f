"""``torch.compile`` of a whole model: one graph where blocks only compute, two around the tape where they do more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

import revcore
from revcore_torch import Checkpoint, MemoryBudget, Reverse, ReversibleSequential, StoreAll, compiled, reversible
from revcore_torch.tape import Tape
from tests.torch.harness import POLICIES, REVERSE, WIDTH, Setting, block, check, dropout_block, make_input
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
    "a policy for each step": Setting([Reverse(), Reverse(), StoreAll(), Checkpoint(), Reverse()]),
}
SHORT = 3  # a first block, one between and a last: what compiling takes grows with depth


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


class Graphs(CompileCounterWithBackend):
    """A backend that counts the graphs it is given, and differentiates them ahead of time."""

    def __init__(self) -> None:
        super().__init__("aot_eager")

    @property
    def count(self) -> int:
        return self.frame_count


def compile_whole(model: Any, **options: Any) -> Any:
    """Compile ours; the networks that it is compared with run as they are."""
    if not isinstance(model, ReversibleSequential):
        return model
    return torch.compile(model, backend="aot_eager", fullgraph=True, **options)


def train_compiled(model: Any, *args: Any, **options: Any) -> list[Any]:
    x = make_input()
    y = compile_whole(model, **options)(x, *args)
    y.pow(2).sum().backward()
    return [y, x.grad]


def batch_norm_block(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh())


one = Section("torch.compile, in one graph (fullgraph=True)")


@one.same("a network whose blocks only compute", make=block, settings=SETTINGS)
def test_one_graph(model):
    return train_compiled(model)


def test_affine_in_one_graph() -> None:
    from tests.torch.harness import EVERYTHING

    check(train_compiled, block, EVERYTHING["affine"], SHORT)


@one.same("with dropout, in evaluation mode", settings=REVERSE, depth=SHORT)
def test_evaluation(model):
    return train_compiled(model.eval())


@one.same("with batch statistics, in evaluation mode", make=batch_norm_block, settings=REVERSE, depth=SHORT)
def test_evaluation_statistics(model):
    return train_compiled(model.eval())


@one.works("dropout, under a policy that reverses nothing", note="`StoreAll()` and `Checkpoint()`")
@pytest.mark.parametrize("policy", [StoreAll(), Checkpoint(2)], ids=str)
def test_dropout_without_reversing(policy):
    check(train_compiled, dropout_block, Setting(policy))


@one.same("under `torch.no_grad`, dropout too", settings=REVERSE)
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
def test_arguments(model):
    a, b = torch.full((WIDTH,), 0.5, dtype=torch.float64, requires_grad=True), make_input(width=WIDTH)
    x = make_input()
    scale = (a.exp(), 2.0)
    compile_whole(model)(x, scale, shift={"by": b}).pow(2).sum().backward()
    return [x.grad, a.grad, b.grad]


@one.same("arguments for each block", make=Scaled, settings=REVERSE, depth=SHORT)
def test_compiled_layerwise(model):
    each = [torch.full((WIDTH,), float(i), dtype=torch.float64, requires_grad=True) for i in range(len(model))]
    x = make_input()
    y = compile_whole(model)(x, layerwise_args_kwargs=[(((e, 1.0),), {}) for e in each])
    y.pow(2).sum().backward()
    return [x.grad, *(e.grad for e in each)]


@one.same("tied blocks and frozen parameters", make=block, settings=REVERSE)
def test_tied_and_frozen(model):
    model[3] = model[0]
    model[1].requires_grad_(False)
    model[2][0].weight = model[0][0].weight
    return train_compiled(model)


@one.same("autocast around it", make=block, settings={"reverse": Setting(tolerance=3e-2)}, depth=SHORT)
def test_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compile_whole(model.float())(make_input().detach().float())
    y.pow(2).sum().backward()
    return [y]


@one.same("the batch as a dynamic size", make=block, settings=REVERSE, depth=SHORT)
def test_dynamic(model):
    run = compile_whole(model, dynamic=True)
    found = []
    for rows in (3, 4, 7):
        x = make_input(rows)
        run(x).pow(2).sum().backward()
        found.append(x.grad)
    return found


@one.works("a reversible network inside a model, and the functional form")
def test_inside():
    torch.manual_seed(0)
    blocks = [block().double() for _ in range(4)]
    program = revcore.revnet(4)

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


@one.works("the mode, the policy and the blocks changed between calls")
def test_changes_between_calls():
    torch.manual_seed(0)
    model = ReversibleSequential(*[dropout_block() for _ in range(3)]).double()
    run = torch.compile(model, backend="aot_eager")
    changes: list[Callable[[], Any]] = [
        model.train,
        model.eval,
        lambda: setattr(model, "policy", Reverse(anchor_every=1)),
        lambda: model.append(block().double()),
        model.train,
        lambda: setattr(model, "policy", StoreAll()),
    ]
    for change in changes:
        change()
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


def test_what_one_graph_keeps_does_not_grow_with_depth() -> None:
    def kept(depth: int, policy: Any) -> int:
        torch._dynamo.reset()
        model = ReversibleSequential(*[block() for _ in range(depth)], policy=policy).double()
        return saved_elements(torch.compile(model, backend="aot_eager", fullgraph=True), model)

    stream = make_input().numel() // 2
    ours = {depth: kept(depth, Reverse()) for depth in (2, 4, 8)}
    assert len(set(ours.values())) == 1, ours
    # the two streams; beside them, what the compiler finds that both the last block's runs compute
    assert 2 * stream <= ours[8] <= 4 * stream
    assert kept(8, StoreAll()) > 2 * ours[8]


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
    settings={name: SETTINGS[name] for name in ("reverse", "a policy for each step")},
)
def test_compiled_dropout(model):
    x = make_input()
    run = torch.compile(model, backend="aot_eager") if isinstance(model, ReversibleSequential) else model
    run(x).pow(2).sum().backward()
    return [x.grad]


@two.same("batch statistics", make=batch_norm_block, settings=REVERSE)
def test_compiled_statistics(model):
    x = make_input()
    run = torch.compile(model, backend="aot_eager") if isinstance(model, ReversibleSequential) else model
    run(x).pow(2).sum().backward()
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
    depth=SHORT,
)
def test_compiled_function(model):
    x = make_input()
    run = torch.compile(model, backend="aot_eager") if isinstance(model, ReversibleSequential) else model
    run(x).pow(2).sum().backward()
    return [x.grad]


@two.same("a whole training step: forward, backward and optimizer", settings=REVERSE, depth=SHORT)
def test_training_step(model):
    return _steps(model)


@two.same("a whole training step of blocks that only compute", make=block, settings=REVERSE, depth=SHORT)
def test_training_step_in_a_graph(model):
    return _steps(model)


def _steps(model: nn.Module) -> list[Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss

    run = torch.compile(step, backend="aot_eager") if isinstance(model, ReversibleSequential) else step
    return [run(make_input().detach()) for _ in range(3)] + list(model.parameters())


@two.refuses("dropout, with `fullgraph=True`", Unsupported, OUTSIDE + "a block draws random numbers")
def test_dropout_in_one_graph(refused):
    with refused:
        train_compiled(ReversibleSequential(*[dropout_block() for _ in range(2)]).double())


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
@pytest.mark.parametrize("make", [batch_norm_block, Counts])
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
    model = ReversibleSequential(block(), block()).double()
    model[0][0].register_full_backward_hook(lambda *_: None)
    with refused:
        train_compiled(model)


@two.refuses("`recompute=`, `offload=`, a budget, with `fullgraph=True`", Unsupported, OUTSIDE + "recompute=, offload=")
@pytest.mark.parametrize(
    "policy", [Reverse(recompute=[torch.ops.aten.addmm.default]), Reverse(offload=True), MemoryBudget(fraction=0.9)]
)
def test_policies_in_one_graph(refused, policy):
    with refused:
        train_compiled(ReversibleSequential(block(), block(), policy=policy).double())


@pytest.mark.parametrize("depth", [2, 6])
@pytest.mark.parametrize("make", [dropout_block, batch_norm_block])
def test_graphs_outside_are_counted_and_do_not_grow_with_depth(make: Any, depth: int) -> None:
    graphs = Graphs()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 1)
            self.body = ReversibleSequential(*[make() for _ in range(depth)])

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.body(self.first(x)))

    model = Model().double()
    torch.compile(model, backend=graphs)(make_input()).sum().backward()
    # before the network, the block (one for all of its likes), the joining of the streams, and after the network
    assert graphs.count == 4


@pytest.mark.parametrize("depth", [2, 8])
def test_what_is_kept_outside_of_the_graph_does_not_grow_with_depth(depth: int) -> None:
    model = ReversibleSequential(*[dropout_block() for _ in range(depth)]).double()
    run = torch.compile(model, backend="aot_eager")
    tapes: list[Tape] = []
    record = Tape.record

    def watched(self: Tape, *args: Any) -> Any:
        tapes.append(self)
        return record(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tape, "record", watched)
        y = run(make_input())
    node = tapes[0].node() if tapes[0].node else None
    assert node is not None
    assert y.requires_grad
    assert sum(t.numel() for t in node.saved_tensors) == make_input().numel()


def test_the_trial_before_tracing_is_what_keeps_dropout_right() -> None:
    """Without it, the backward pass in the graph draws another mask, and nobody says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_obstacle", lambda *_: None)
        with pytest.raises(AssertionError, match="off by"):
            check(train_compiled, dropout_block)


def test_drift_is_warned_of_while_it_compiles() -> None:
    model = ReversibleSequential(*[nn.Linear(4, 4) for _ in range(40)], coupling=revcore.Momentum(0.4))
    with pytest.warns(revcore.DriftWarning, match="40 steps, run back in float32"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.ones(2, 8))
