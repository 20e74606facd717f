"""What surrounds a reversible network: checkpointing, saved-tensor hooks, modes."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll
from revcore_torch.memory import LiveBytes
from tests.torch.harness import EVERYTHING, WIDTH, block, dropout_block, make_input, train
from tests.torch.registry import Section

POLICIES = pytest.mark.parametrize(
    "policy", [Reverse(), pytest.param(Reverse(anchor_every=2), marks=pytest.mark.long), Checkpoint()], ids=str
)

# --- checkpointing ----------------------------------------------------------------------------------------------------

around = Section("Checkpointing and saved-tensor hooks")


@around.same("inside `checkpoint(model, x, use_reentrant=False)`", settings=EVERYTHING)
def test_inside_checkpoint(model):
    x = make_input()
    checkpoint(model, x, use_reentrant=False).pow(2).sum().backward()
    return x.grad


@around.same("inside `checkpoint(model, x, use_reentrant=True)`", settings=EVERYTHING)
def test_inside_reentrant_checkpoint(model):
    x = make_input()
    checkpoint(model, x, use_reentrant=True).pow(2).sum().backward()
    return x.grad


class Checkpointed(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.inner, self.settings = dropout_block(), settings

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, **self.settings)


@around.same("`checkpoint` inside a block", make=lambda _: Checkpointed(use_reentrant=False))
def test_checkpoint_in_a_block(model):
    return train(model)


@around.same("`checkpoint(use_reentrant=True)` inside a block", make=lambda _: Checkpointed(use_reentrant=True))
def test_reentrant_checkpoint_in_a_block(model):
    return train(model)


@around.same("`checkpoint` inside blocks and around the model", make=lambda _: Checkpointed(use_reentrant=False))
def test_checkpoint_in_and_around(model):
    x = make_input()
    checkpoint(model, x, use_reentrant=False).pow(2).sum().backward()
    return x.grad


def selective() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])


def selective_function() -> Any:
    def policy(ctx, op, *args, **kwargs):
        wanted = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@around.same(
    "a selective policy inside a block (operators to keep)",
    make=lambda _: Checkpointed(use_reentrant=False, context_fn=selective),
)
def test_selective_in_a_block(model):
    return train(model)


@around.same(
    "a selective policy inside a block (a function)",
    make=lambda _: Checkpointed(use_reentrant=False, context_fn=selective_function),
)
def test_selective_function_in_a_block(model):
    return train(model)


@around.same("a selective policy around the model", make=block)
def test_selective_around(model):
    x = make_input()
    checkpoint(model, x, use_reentrant=False, context_fn=selective).pow(2).sum().backward()
    return x.grad


@around.same("`checkpoint_sequential` over parts of the model")
def test_checkpoint_sequential(model):
    x = make_input()
    y = checkpointing.checkpoint_sequential([model[:2], model[2:4], model[4:]], 2, x, use_reentrant=False)
    y.pow(2).sum().backward()
    return x.grad


@around.same("`save_on_cpu()` around the forward pass", settings=EVERYTHING)
def test_save_on_cpu(model):
    x = make_input()
    with save_on_cpu():
        loss = model(x).pow(2).sum()
    loss.backward()
    return x.grad


@around.works("`save_on_cpu()` around it: what is kept goes through it, and nothing else", note="the last streams")
def test_save_on_cpu_gets_the_kept_streams():
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(tuple(t.shape))
        return t.cpu()

    model = ReversibleSequential(*[block() for _ in range(8)]).double()
    x = make_input()
    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).sum()
    assert packed == [(4, WIDTH)] * 2
    loss.backward()


class SavesOnCpu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = dropout_block(width)

    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu():
            return self.inner(x)


@around.same("`save_on_cpu()` inside a block", make=SavesOnCpu, note="what the block keeps itself stays kept")
def test_save_on_cpu_in_a_block(model):
    return train(model)


@around.same("saved-tensor hooks that quantise around it (to float32 and back)")
def test_quantising_hooks(model):
    x = make_input().detach().float().double().requires_grad_()
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        loss = model(x).pow(2).sum()
    loss.backward()
    return x.grad


@around.same("`disable_saved_tensors_hooks` around it", note="everything is stored")
def test_disabled_saved_tensors_hooks(model):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return train(model)


@around.same("`allow_mutation_on_saved_tensors` around it")
def test_allow_mutation(model):
    x = make_input()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = model(x.sin())
        loss = y.pow(2).sum()
        loss.backward()
    return x.grad


# --- modes ------------------------------------------------------------------------------------------------------------

modes = Section("Modes")


@modes.same("`no_grad`: nothing is kept, each block runs once")
def test_no_grad(model):
    calls = []
    for b in model:
        b.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        y = model(make_input())
    return y, y.requires_grad, len(calls)


@modes.same("`inference_mode`")
def test_inference_mode(model):
    calls = []
    for b in model:
        b.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        y = model(make_input().detach())
        return y.clone(), y.is_inference(), len(calls)


@modes.works("an input made in inference mode, with gradients on", note="the plain network raises: it would save it")
def test_inference_tensor():
    torch.manual_seed(0)
    model = ReversibleSequential(block(), block()).double()
    with torch.inference_mode():
        x = make_input().detach() * 2
    grads = [torch.autograd.grad(model(t).pow(2).sum(), list(model.parameters())) for t in (x, x.clone())]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@modes.refuses(
    "the same under `Checkpoint()`",
    RuntimeError,
    "Inference tensors cannot be saved for backward",
    note="as for the plain network: `clone()` it",
)
def test_inference_tensor_under_checkpoint(refused):
    with torch.inference_mode():
        x = make_input().detach() * 2
    with refused:
        ReversibleSequential(block(), block(), policy=Checkpoint()).double()(x)


@modes.same("a region with gradients inside `no_grad`")
def test_enable_grad_inside(model):
    with torch.no_grad():
        y = model(make_input())
        with torch.enable_grad():
            return y, train(model)


@modes.same("the backward pass under `no_grad`")
def test_backward_under_no_grad(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    with torch.no_grad():
        loss.backward()
    return x.grad


@modes.same("anomaly mode around both passes")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode(model):
    with torch.autograd.detect_anomaly():
        return train(model)


@modes.same("anomaly mode around the backward pass only")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_in_backward(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    with torch.autograd.detect_anomaly():
        loss.backward()
    return x.grad


@modes.refuses("anomaly mode, and a gradient is NaN", RuntimeError, "returned nan values in its 1th output")
@POLICIES
def test_anomaly_mode_finds(refused, policy):
    model = ReversibleSequential(block(), block(), policy=policy).double()
    x = make_input()
    with warnings.catch_warnings(), refused:
        warnings.simplefilter("ignore")  # anomaly mode says that it is on, and prints the forward pass
        with torch.autograd.detect_anomaly():
            model[1].register_forward_hook(lambda _, __, out: (out - out.detach()).sqrt())
            model(x).sum().backward()


@modes.same("`torch.autograd.set_multithreading_enabled(False)`")
def test_without_multithreading(model):
    with torch.autograd.set_multithreading_enabled(False):
        return train(model)


@modes.same("deterministic algorithms")
def test_deterministic(model):
    torch.use_deterministic_algorithms(True)
    try:
        return train(model)
    finally:
        torch.use_deterministic_algorithms(False)


@modes.works("a dispatch mode around it (counting bytes or FLOPs)")
@POLICIES
def test_dispatch_mode(policy):
    model = ReversibleSequential(*[dropout_block() for _ in range(3)], policy=policy).double()
    results = []
    for mode in (contextlib.nullcontext(), LiveBytes(), FlopCounterMode(display=False)):
        torch.manual_seed(0)
        model.zero_grad()
        with mode:
            results.append([*train(model), *(p.grad for p in model.parameters())])
    for got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[0], strict=True))


class MakesTensors(nn.Module):
    """Makes a tensor where and as torch does by default. (Not by ``linspace``: a model that transformers 5 has loaded
    before in this process may leave it without a default device.)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * torch.eye(x.shape[1])[0].sub(1 / 3).cos())


@modes.works(
    "`torch.set_default_dtype` is another in the backward pass",
)
@POLICIES
def test_default_dtype(policy):
    torch.manual_seed(0)
    model = ReversibleSequential(MakesTensors(WIDTH), MakesTensors(WIDTH)).double()
    grads = []
    for p in (StoreAll(), policy):
        model.policy = p
        x = make_input()
        torch.set_default_dtype(torch.float64)
        try:
            loss = model(x).pow(2).sum()
        finally:
            torch.set_default_dtype(torch.float32)
        loss.backward()
        assert torch.get_default_dtype() == torch.float32
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@modes.works(
    "`with torch.device(…)` around the forward pass only",
)
@POLICIES
def test_default_device(policy):
    with torch.device("meta"):
        model = ReversibleSequential(MakesTensors(WIDTH), MakesTensors(WIDTH), policy=policy)
        loss = model(torch.empty(4, 2 * WIDTH)).pow(2).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


class Attends(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.linear(x).view(1, 1, len(x), -1).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)[0, 0]


@modes.works(
    "`sdpa_kernel(…)` around the forward pass only",
)
@POLICIES
def test_sdpa_kernel(policy):
    torch.manual_seed(0)
    model = ReversibleSequential(Attends(WIDTH), Attends(WIDTH)).double()
    grads = []
    for p in (StoreAll(), policy):
        model.policy = p
        x = make_input()
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(x).pow(2).sum()
        loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
