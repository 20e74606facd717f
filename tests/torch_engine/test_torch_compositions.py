"""Whatever a user does around and inside a reversible network, the numbers are the plain network's.

Each case is a function of a model that returns tensors. It runs once on the reversible model and once on a copy under
``StoreAll``, from the same random state, and must give the same tensors (float64, 1e-12) and leave the same random
state behind.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revcore
import revcore_torch
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll, reversible
from revcore_torch.memory import LiveBytes

WIDTH = 6
Case = Callable[[ReversibleSequential], Iterable[Any]]


def block(width: int = WIDTH, p: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(p), nn.Linear(width, width))


def dropout_block() -> nn.Module:
    return block(p=0.4)


def make_input() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 2 * WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def gradients(model: nn.Module, *more: Tensor) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None] + [t.grad for t in more if t.grad is not None]


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree.detach().clone()]
    if isinstance(tree, dict):
        tree = tree.values()
    return [t for item in tree if item is not None for t in tensors(item)]


def norm(parts: Iterable[Tensor]) -> Tensor:
    return sum((p.to(torch.complex128).abs().pow(2).sum() for p in parts), torch.zeros((), dtype=torch.float64)).sqrt()


def check(case: Case, make: Callable[[], nn.Module] = block, depth: int = 5, tolerance: float = 1e-12, **settings: Any):
    torch.manual_seed(0)
    model = ReversibleSequential(*[make() for _ in range(depth)], **settings).double()
    plain = copy.deepcopy(model)
    plain.policy = StoreAll()
    results = []
    for m in (model, plain):
        torch.manual_seed(7)
        results.append((tensors(case(m)), torch.get_rng_state(), [b.clone() for b in m.buffers()]))
    (ours, our_state, our_buffers), (theirs, their_state, their_buffers) = results
    assert len(ours) == len(theirs) > 0
    for got, expected in ((ours, theirs), (our_buffers, their_buffers)):
        # the whole tree at once: a gradient that is zero but for rounding (a bias before a batch norm) has none alone
        error = norm([a - b for a, b in zip(got, expected, strict=True)])
        assert error <= tolerance * norm(expected), (error, norm(expected))
    assert norm(ours) > 0
    assert torch.equal(our_state, their_state)


def train(model: ReversibleSequential, *args: Any, **kwargs: Any) -> list[Tensor]:
    x = make_input()
    y = model(x, *args, **kwargs)
    y.pow(2).sum().backward()
    return [y, *gradients(model, x)]


POLICIES = [
    Reverse(),
    Reverse(anchor_every=1),
    Reverse(anchor_every=2, keep_last=1),
    Reverse(keep_last=9),
    Checkpoint(),
    Checkpoint(every=3),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("coupling", [revcore.Additive(), revcore.Momentum(0.9)], ids=str)
def test_policies_change_no_value(policy: revcore.Policy, coupling: revcore.Coupling) -> None:
    check(train, dropout_block, policy=policy, coupling=coupling)


# --- ways to ask for gradients ----------------------------------------------------------------------------------------


def autograd_grad_on_everything(model):
    x = make_input()
    return torch.autograd.grad(model(x).pow(2).sum(), [x, *model.parameters()])


def autograd_grad_on_one_layer(model):
    return torch.autograd.grad(model(make_input()).pow(2).sum(), list(model[2].parameters()))


def autograd_grad_on_the_input(model):
    x = make_input()
    return torch.autograd.grad(model(x).pow(2).sum(), [x])


def backward_twice_with_retain_graph(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model, x)


def two_losses(model):
    x = make_input()
    y = model(x)
    y.pow(2).sum().backward(retain_graph=True)
    y.sin().sum().backward()
    return gradients(model, x)


def two_forwards_before_backward(model):
    x = make_input()
    first, second = model(x).pow(2).sum(), model(2 * x).pow(3).sum()
    first.backward()
    second.backward()
    return gradients(model, x)


def two_forwards_one_backward(model):
    x = make_input()
    (model(x).pow(2).sum() + model(model(x)).sin().sum()).backward()
    return gradients(model, x)


def double_backward(model):
    x = make_input()
    (g,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    (g**2).sum().backward()
    return gradients(model, x)


def gradient_penalty(model):
    x = make_input()
    y = model(x)
    (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    ((g.norm() - 1) ** 2 + y.sum()).backward()
    return gradients(model, x)


def no_input_gradient(model):
    model(make_input().detach()).pow(2).sum().backward()
    return gradients(model)


def frozen_layers(model):
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    model(make_input().detach()).pow(2).sum().backward()
    return gradients(model)


def only_the_last_layer_trains(model):
    model[:-1].requires_grad_(False)
    model(make_input().detach()).pow(2).sum().backward()
    return gradients(model)


def only_biases_train(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return train(model)


def tied_layers(model):
    model.append(model[0])
    return train(model)


def gradient_accumulation(model):
    for scale in (1.0, 2.0, 3.0):
        (scale * model(make_input())).pow(2).sum().backward()
    return gradients(model)


def captured_activations(model):
    caught: list[Tensor] = []
    handles = [b[1].register_forward_hook(lambda _, __, out: caught.append(out)) for b in model]
    x = make_input()
    y = model(x)
    loss = sum(c.pow(2).sum() for c in caught[: len(model)]) + y.sum()
    for handle in handles:
        handle.remove()
    loss.backward()
    return gradients(model, x)


def output_changed_in_place(model):
    y = model(make_input())
    y.relu_()
    y.pow(2).sum().backward()
    return gradients(model)


def pickled(model):
    return train(pickle.loads(pickle.dumps(model)))


def deep_copied_with_a_graph_alive(model):
    y = model(make_input())
    clone = copy.deepcopy(model)
    y.sum().backward()
    return [*gradients(model), *train(clone)]


def sliced(model):
    return train(model[1:4])


def trained_by_an_optimizer_inside_backward(model):
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        model(make_input()).pow(2).mean().backward()
    return list(model.parameters())


def hooks_in_order(model):
    log: list[Tensor] = []
    for i, b in enumerate(model):
        b.register_full_backward_hook(lambda _, __, ___, i=i: log.append(torch.tensor(float(i))))
    for p in model.parameters():
        p.register_hook(lambda g: log.append(g.clone()) or None)
        p.register_post_accumulate_grad_hook(lambda p: log.append(p.grad.clone()))
    train(model)
    return log


def backward_in_another_thread(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return gradients(model, x)


def saved_on_cpu(model):
    x = make_input()
    with torch.autograd.graph.save_on_cpu():
        loss = model(x).pow(2).sum()
    loss.backward()
    return gradients(model, x)


def checkpointed_from_outside(model):
    x = make_input()
    checkpoint(model, x, use_reentrant=False).pow(2).sum().backward()
    return gradients(model, x)


def checkpointed_from_outside_reentrant(model):
    x = make_input()
    checkpoint(model, x, use_reentrant=True).pow(2).sum().backward()
    return gradients(model, x)


def func_grad(model):
    params = dict(model.named_parameters())
    return torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x,)).pow(2).sum())(
        params, make_input()
    ).values()


def func_jvp(model):
    x = make_input().detach()
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))


def forward_mode(model):
    import torch.autograd.forward_ad as fw

    x = make_input().detach()
    with fw.dual_level():
        return [fw.unpack_dual(model(fw.make_dual(x, torch.ones_like(x)))).tangent]


def complex_streams(model):
    model.to(torch.complex128)
    x = torch.complex(make_input(), 0.5 * make_input()).detach().requires_grad_()
    model(x).abs().pow(2).sum().backward()
    return gradients(model, x)


def empty_batch(model):
    x = make_input()[:0].detach().requires_grad_()
    y = model(x)
    y.sum().backward()
    return [torch.ones(1), y, *gradients(model, x)]


def expanded_input(model):
    x = make_input()[:1]
    model(x.expand(4, -1)).pow(2).sum().backward()
    return gradients(model)


def transposed_input(model):
    x = make_input().detach().t().contiguous().t().requires_grad_()
    model(x).pow(2).sum().backward()
    return gradients(model, x)


def compiled_blocks(model):
    for b in model:
        b.compile(backend="aot_eager")
    return train(model)


def compiled_whole(model):
    x = make_input()
    torch.compile(model, backend="aot_eager")(x).pow(2).sum().backward()
    return gradients(model, x)


PLAIN_CASES = [
    autograd_grad_on_everything,
    autograd_grad_on_one_layer,
    autograd_grad_on_the_input,
    backward_twice_with_retain_graph,
    two_losses,
    two_forwards_before_backward,
    two_forwards_one_backward,
    double_backward,
    gradient_penalty,
    no_input_gradient,
    frozen_layers,
    only_the_last_layer_trains,
    only_biases_train,
    tied_layers,
    gradient_accumulation,
    captured_activations,
    output_changed_in_place,
    pickled,
    deep_copied_with_a_graph_alive,
    sliced,
    trained_by_an_optimizer_inside_backward,
    hooks_in_order,
    backward_in_another_thread,
    saved_on_cpu,
    checkpointed_from_outside,
    checkpointed_from_outside_reentrant,
    expanded_input,
    transposed_input,
]


@pytest.mark.parametrize("make", [block, dropout_block])
@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: case.__name__)
def test_composition(case: Case, make: Callable[[], nn.Module]) -> None:
    check(case, make)


# dynamo looks at .grad of what crosses a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("make", [block, dropout_block])
@pytest.mark.parametrize("case", [compiled_blocks, compiled_whole], ids=lambda case: case.__name__)
def test_compiled(case: Case, make: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    check(case, make)


# torch.func.jvp compiles decompositions with the deprecated torch.jit.script; complex modules call themselves new
@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    "case", [func_grad, func_jvp, forward_mode, complex_streams, empty_batch], ids=lambda case: case.__name__
)
def test_composition_without_dropout(case: Case) -> None:
    check(case, block)


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_functional_call_with_the_backward_outside_is_refused(policy: revcore.Policy) -> None:
    model = ReversibleSequential(block(), block(), policy=policy).double()
    params = {k: (v.detach() * 1.1).requires_grad_() for k, v in model.named_parameters()}
    loss = torch.func.functional_call(model, params, (make_input(),)).pow(2).sum()
    with pytest.raises(revcore.InversionError, match="functional_call"):
        loss.backward()


# --- what blocks do ---------------------------------------------------------------------------------------------------


class WithContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context, scale=None, *, gate=None):
        h = torch.tanh(self.linear(x) * context)
        h = h if gate is None else h * gate
        return h if scale is None else h * scale


def test_shared_context_gets_its_gradient() -> None:
    def case(model):
        leaf = torch.full((WIDTH,), 0.3, dtype=torch.float64, requires_grad=True)
        scale = torch.full((1,), 1.5, dtype=torch.float64, requires_grad=True)
        return [*train(model, leaf.exp(), scale=scale), *gradients(nn.Module(), leaf, scale)]

    check(case, WithContext)


def test_layerwise_arguments_reach_their_block() -> None:
    def case(model):
        leaves = [torch.full((WIDTH,), 0.3 + i, dtype=torch.float64, requires_grad=True) for i in range(len(model))]
        pairs = [((), {"gate": leaf.exp()}) for leaf in leaves]
        ones = torch.ones(WIDTH, dtype=torch.float64)
        # tanh saturates under a gate of e^4, so rounding of its rebuilt input shows more
        return [*train(model, ones, layerwise_args_kwargs=pairs), *gradients(nn.Module(), *leaves)]

    check(case, WithContext, tolerance=1e-11)


def test_closure_over_a_tensor_with_a_graph() -> None:
    def case(model):
        leaf = torch.full((WIDTH,), 0.3, dtype=torch.float64, requires_grad=True)
        gate, linear = leaf.exp(), model[0][0]
        x = make_input()
        streams = reversible(
            revcore.revnet(4), [lambda h: torch.tanh(linear(h)) * gate] * 4, x.chunk(2, 1), policy=model.policy
        )
        torch.cat(streams).pow(2).sum().backward()
        return [leaf.grad, *gradients(linear, x)]

    check(case)


class WithAux(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = torch.tanh(self.linear(x))
        return h, {"loss": (h**2).mean(), "name": "layer", "seen": [h.detach()]}, None


def test_auxiliary_outputs_carry_gradients() -> None:
    def case(model):
        x = make_input()
        y, aux = model(x)
        assert [len(a) for a in aux] == [2] * len(model)
        assert aux[0][0]["name"] == "layer"
        (y.pow(2).sum() + sum(a[0]["loss"] * (i + 1) for i, a in enumerate(aux))).backward()
        return [*gradients(model, x), *(a[0]["seen"] for a in aux)]

    check(case, WithAux)


def test_auxiliary_outputs_alone() -> None:
    def case(model):
        x = make_input()
        aux = model(x)[1]  # the streams are dropped before the backward pass
        (aux[3][0]["loss"] + aux[1][0]["loss"]).backward()
        return gradients(model, x)

    check(case, WithAux)


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_stream_used(which: int) -> None:
    def case(model):
        x = make_input()
        streams = reversible(model.program, list(model), x.chunk(2, 1), policy=model.policy)
        grads = torch.autograd.grad(streams[which].pow(2).sum(), [x, *model.parameters()], allow_unused=True)
        return [torch.zeros(1) if g is None else g for g in grads]

    check(case, dropout_block)


class Statistics(nn.Module):
    """Everything that moves a buffer: batch norm, spectral norm (a power iteration), and dropout."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.dropout(torch.tanh(self.norm(self.linear(x))))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_buffers_move_once(policy: revcore.Policy) -> None:
    check(train, Statistics, policy=policy)


def test_batch_norm_counts_one_batch_a_step() -> None:
    model = ReversibleSequential(*[nn.BatchNorm1d(WIDTH) for _ in range(3)]).double()
    for step in (1, 2):
        train(model)
        assert [b.state_dict()["num_batches_tracked"] for b in model] == [step] * 3


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x):
        return self.lstm(x[None])[0][0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, 0.1, batch_first=True)

    def forward(self, x):
        return self.attention(x[None], x[None], x[None])[0][0]


class Forces(nn.Module):
    """Differentiates inside itself, in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = block()

    def forward(self, x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).pow(2).sum(), x, create_graph=True)[0]


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = block(p=0.3), use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def nested() -> nn.Module:
    inner = ReversibleSequential(block(WIDTH // 2, 0.2), block(WIDTH // 2), block(WIDTH // 2))
    return nn.Sequential(inner, nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def convolution() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 1, 3, padding=1), nn.InstanceNorm1d(1), nn.Flatten())


BLOCKS = {
    "lstm": Recurrent,
    "attention": Attention,
    "forces": Forces,
    "checkpoint inside": lambda: Checkpointed(use_reentrant=False),
    "reentrant checkpoint inside": lambda: Checkpointed(use_reentrant=True),
    "nested": nested,
    "convolution": convolution,
    "bilinear": lambda: nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GLU(), nn.LayerNorm(WIDTH)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
}


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(every=2)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_kind_of_block(name: str, policy: revcore.Policy) -> None:
    check(train, BLOCKS[name], policy=policy)
    check(two_forwards_one_backward, BLOCKS[name], policy=policy)


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ReversibleSequential(*[block(p=0.2) for _ in range(6)])
    plain = copy.deepcopy(model)
    plain.policy = StoreAll()
    grads = []
    for m in (model, plain):
        torch.manual_seed(1)
        x = make_input().detach().float().requires_grad_()
        with torch.autocast("cpu", dtype):
            loss = m(x).pow(2).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append(torch.cat([g.flatten() for g in gradients(m, x)]))
    # float32 streams under narrow blocks: a rebuilt input is off by float32 rounding, and a narrow cast may flip on it
    assert (grads[0] - grads[1]).norm() <= 1e-3 * grads[1].norm()


# --- failures leave nothing behind ------------------------------------------------------------------------------------


def test_backward_a_second_time_without_retain_is_torchs_error() -> None:
    model = ReversibleSequential(block(), block()).double()
    loss = model(make_input()).pow(2).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_changed_parameters_are_refused_and_nothing_moves() -> None:
    model = ReversibleSequential(Statistics(), Statistics()).double()
    loss = model(make_input()).pow(2).sum()
    with torch.no_grad():
        model[1].norm.bias.add_(1.0)
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    with pytest.raises(revcore.InversionError, match=r"step 1.*changed in place"):
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("argument", ["context", "stream"])
def test_changed_tensors_are_refused(argument: str) -> None:
    x = make_input()
    context = torch.ones(WIDTH, dtype=torch.float64)
    blocks = [WithContext().double(), WithContext().double()]
    streams = reversible(revcore.revnet(2), blocks, x.chunk(2, 1), context)
    loss = torch.cat(streams).pow(2).sum()
    with torch.no_grad():
        (context if argument == "context" else streams[0]).mul_(2.0)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()


class Moody(nn.Module):
    """Fails, or acts otherwise, at the time it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.fail_at, self.drift_at = Statistics(), 0, -1, -1

    def forward(self, x):
        self.calls += 1
        h = self.inner(x)
        if self.calls == self.fail_at:
            raise KeyError("told to")
        return h.sin() if self.calls == self.drift_at else h


def retry_equals_clean(model: ReversibleSequential, clean: ReversibleSequential) -> None:
    model.zero_grad()
    model.load_state_dict(clean.state_dict())
    torch.manual_seed(5)
    ours = train(model)
    torch.manual_seed(5)
    theirs = train(clean)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_exception_in_the_forward_pass_then_a_clean_retry() -> None:
    model = ReversibleSequential(Moody(), Moody(), Moody()).double()
    clean = copy.deepcopy(model)
    model[1].fail_at = 1
    with pytest.raises(KeyError, match="told to"):
        model(make_input())
    retry_equals_clean(model, clean)


@pytest.mark.parametrize("policy", [Reverse(), Reverse(anchor_every=1), Checkpoint()], ids=str)
def test_a_failed_forward_pass_takes_back_what_earlier_blocks_did(policy: revcore.Policy) -> None:
    model = ReversibleSequential(Statistics(), Statistics(), nn.Linear(WIDTH, 1), policy=policy).double()
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    with pytest.raises(revcore.SpecError, match="block 2 returned shape"):
        model(make_input())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_an_exception_in_the_backward_pass_leaves_no_trace() -> None:
    model = ReversibleSequential(Moody(), Moody(), Moody()).double()
    clean = copy.deepcopy(model)
    model[1].fail_at = 2
    loss = model(make_input()).pow(2).sum()
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    with pytest.raises(KeyError, match="told to"):
        loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    retry_equals_clean(model, clean)


def test_a_block_that_acts_otherwise_the_second_time_is_refused() -> None:
    model = ReversibleSequential(Moody(), Moody()).double()
    model[1].drift_at = 2
    loss = model(make_input()).pow(2).sum()
    with pytest.raises(revcore.InversionError, match="ran differently the second time"):
        loss.backward()


def test_a_block_that_writes_into_its_input_is_refused() -> None:
    x = make_input()
    streams = tuple(2 * s for s in x.chunk(2, 1))
    blocks = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)).double()]
    with pytest.raises(revcore.SpecError, match=r"in place.*nn\.ReLU\(\)"):
        reversible(revcore.revnet(1), blocks, streams)


def test_a_block_that_writes_into_its_argument_is_refused() -> None:
    def count(x, counter):
        counter += 1
        return x

    with pytest.raises(revcore.SpecError, match="arguments in place"):
        reversible(revcore.revnet(1), [count], make_input().chunk(2, 1), torch.zeros(1))


def test_gradient_of_the_inside_after_the_outputs_are_gone_is_refused() -> None:
    caught = []
    model = ReversibleSequential(block(), block()).double()
    model[0][1].register_forward_hook(lambda _, __, out: caught.append(out))
    model(make_input())
    with pytest.raises(revcore.InversionError, match="outputs are gone"):
        caught[0].sum().backward()


class Hoarder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 - ctx.x.tanh() ** 2)


def test_a_function_that_hides_tensors_from_hooks_is_named_once() -> None:
    x = make_input()
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH)).double() for _ in range(2)]
    blocks[1].register_forward_hook(lambda _, __, out: Hoarder.apply(out))
    with pytest.warns(UserWarning, match=r"step 1 keeps tensors on ctx \(Hoarder\.x\)"):
        reversible(revcore.revnet(2), blocks, x.chunk(2, 1))
    reversible(revcore.revnet(2), blocks, x.chunk(2, 1))  # a second warning would be an error


@pytest.mark.parametrize("policy", [Reverse(), Reverse(anchor_every=2), Checkpoint()], ids=str)
def test_a_graph_dropped_without_a_backward_pass_frees_everything_at_once(policy: revcore.Policy) -> None:
    """No cycle through C++ (T8): not even the collector of cycles is needed."""
    model = ReversibleSequential(*[WithContext() for _ in range(4)], policy=policy).double()
    leaf, x = torch.ones(WIDTH, dtype=torch.float64, requires_grad=True), make_input()
    pairs = [((), {"gate": leaf * i}) for i in range(1, 5)]
    gc.disable()
    try:
        with LiveBytes() as memory:
            context = leaf.exp()
            y = model(x, context, layerwise_args_kwargs=pairs)
            assert memory.live > 0
            del y, context
        assert memory.live == 0
    finally:
        gc.enable()


def test_is_recomputing_tells_the_second_run() -> None:
    seen = []
    model = ReversibleSequential(block(), block()).double()
    model[0].register_forward_hook(lambda *_: seen.append(revcore_torch.is_recomputing()))
    train(model)
    assert seen == [False, True]
    assert not revcore_torch.is_recomputing()


# --- the class --------------------------------------------------------------------------------------------------------


def test_state_dict_is_that_of_nn_sequential() -> None:
    blocks = [block() for _ in range(3)]
    sequential = nn.Sequential(*blocks)
    for policy in (Reverse(), StoreAll(), Checkpoint()):
        model = ReversibleSequential(*blocks, policy=policy)
        assert list(model.state_dict()) == list(sequential.state_dict())
    named = ReversibleSequential(OrderedDict(attention=blocks[0], mlp=blocks[1]))
    assert list(named._modules) == ["attention", "mlp"]
    model.load_state_dict(sequential.state_dict())


def test_the_seeds_sequence_of_streams() -> None:
    """Half residual and swap: y = (x1, x0 + f(x1)) a step, so n steps rotate by n."""
    f, g, h = torch.sin, torch.cos, torch.tanh
    x0, x1 = make_input().detach().chunk(2, 1)
    y0 = x0 + f(x1)
    y1 = x1 + g(y0)
    y2 = y0 + h(y1)

    class Apply(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    model = ReversibleSequential(Apply(f), Apply(g), Apply(h))
    assert torch.equal(model(torch.cat((x0, x1), 1)), torch.cat((y1, y2), 1))
    assert torch.equal(ReversibleSequential(Apply(f), Apply(g))(torch.cat((x0, x1), 1)), torch.cat((y0, y1), 1))


@pytest.mark.parametrize("split_dim", [1, -1, 0])
def test_inverse_returns_the_input(split_dim: int) -> None:
    x = make_input().detach()
    width = WIDTH if split_dim else 2 * WIDTH
    model = ReversibleSequential(*[block(width) for _ in range(5)], split_dim=split_dim).double().eval()
    assert (model.inverse(model(x)) - x).norm() <= 1e-14 * x.norm()


def test_inverse_changes_no_buffer() -> None:
    model = ReversibleSequential(*[Statistics(p=0.0) for _ in range(3)]).double()
    y = model(make_input().detach())
    buffers = [b.clone() for b in model.buffers()]
    model.inverse(y)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_inverse_refuses_dropout_and_draws_nothing() -> None:
    model = ReversibleSequential(*[Statistics() for _ in range(3)]).double()
    state = torch.get_rng_state()
    with pytest.raises(revcore.InversionError, match=r"eval\(\)"):
        model.inverse(make_input().detach())
    assert torch.equal(state, torch.get_rng_state())


def test_a_copied_input_gives_the_mean_of_the_streams() -> None:
    model = ReversibleSequential(block(), block(), block(), split_dim=None).double()
    x = make_input().detach()[:, :WIDTH]
    streams = reversible(model.program, list(model), (x, x))
    assert torch.allclose(model(x), (streams[0] + streams[1]) / 2)
    with pytest.raises(revcore.SpecError, match="mean"):
        model.inverse(x)


def test_no_grad_and_inference_mode_run_each_block_once() -> None:
    calls = []
    model = ReversibleSequential(block(), block()).double()
    for b in model:
        b.register_forward_hook(lambda *_: calls.append(1))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(make_input().detach())
    assert len(calls) == 4
