"""Hooks of every kind see what they see on the plain network, as often, and in the same order.

A hook's events go into a list: name and place as text, tensors as they are. Blocks run twice, and so do their forward
hooks; ``is_recomputing()`` tells the second time, as under ``torch.utils.checkpoint``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore_torch
from revcore_torch import Checkpoint, Reverse, ReversibleSequential
from revcore_torch.memory import LiveBytes
from tests.torch.harness import EVERYTHING, KEPT, WIDTH, block, make_input, train
from tests.torch.registry import Section

hooks = Section("Hooks")
WITHOUT_KEPT = {name: setting for name, setting in EVERYTHING.items() if name not in KEPT}


class Log:
    """Events in order; a gradient is copied, for the optimizer may overwrite it."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def add(self, name: str, *tensors: Any) -> None:
        self.events.append((name, [t.detach().clone() for t in tensors if isinstance(t, Tensor)]))

    def add_first(self, name: str, *tensors: Any) -> None:
        if not revcore_torch.is_recomputing():
            self.add(name, *tensors)


@hooks.same("forward pre-hooks and forward hooks of blocks, first run", settings=WITHOUT_KEPT)
def test_forward_hooks(model):
    return first_run_hooks(model)


@hooks.same(
    "forward hooks that compute something in the first run only, with operations kept (`Reverse(recompute=[…])`)",
    settings=KEPT,
)
def test_forward_hooks_with_operations_kept(model):
    return first_run_hooks(model)


def first_run_hooks(model: Any) -> Any:
    log = Log()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: log.add_first(f"before {name}", *args))
        module.register_forward_hook(lambda _, args, out, name=name: log.add_first(f"after {name}", out))
    train(model)
    return log.events


@hooks.works(
    "the same, second run",
    note="blocks run twice, so their forward hooks do (`is_recomputing()` tells), but for those that come when a "
    "`Checkpoint` has what it needs",
)
@pytest.mark.parametrize(
    ("policy", "runs"),
    [(Reverse(), [False, True]), (Checkpoint(every=2), [False, True]), (Checkpoint(), [False])],
    ids=str,
)
def test_forward_hooks_run_twice(policy, runs):
    seen = []
    model = ReversibleSequential(block(), block(), policy=policy).double()
    model[0].register_forward_hook(lambda *_: seen.append(revcore_torch.is_recomputing()))
    train(model)
    assert seen == runs
    assert not revcore_torch.is_recomputing()


@hooks.same("forward hooks of the model itself: once")
def test_forward_hooks_of_the_model(model):
    log = Log()
    model.register_forward_pre_hook(lambda _, args: log.add("before", *args))
    model.register_forward_hook(lambda _, args, out: log.add("after", out))
    return train(model), log.events


@hooks.same("a forward hook that replaces a block's output")
def test_forward_hook_replaces_the_output(model):
    model[1].register_forward_hook(lambda _, __, out: 2 * out.sin())
    model[3][1].register_forward_hook(lambda _, __, out: out * out.abs().mean())
    return train(model)


@hooks.same("a forward pre-hook that replaces a block's input")
def test_forward_pre_hook_replaces_the_input(model):
    model[1].register_forward_pre_hook(lambda _, args: (args[0].cos(),))
    return train(model)


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, *, gate: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * gate


@hooks.same("forward hooks with keyword arguments, and `always_call`", make=Gated)
def test_forward_hooks_with_kwargs(model):
    log = Log()
    model[1].register_forward_pre_hook(lambda _, args, kwargs: (args, {"gate": 2 * kwargs["gate"]}), with_kwargs=True)
    for i, b in enumerate(model):
        b.register_forward_hook(
            lambda _, args, kwargs, out, i=i: log.add_first(f"{i}", kwargs["gate"]), with_kwargs=True, always_call=True
        )
    return train(model, gate=torch.linspace(0, 1, WIDTH, dtype=torch.float64)), log.events


@hooks.same("full backward pre-hooks and full backward hooks of blocks", settings=EVERYTHING)
def test_full_backward_hooks(model):
    log = Log()
    for i, b in enumerate(model):
        b.register_full_backward_pre_hook(lambda _, grads, i=i: log.add(f"before {i}", *grads))
        b.register_full_backward_hook(lambda _, ins, outs, i=i: log.add(f"after {i}", *ins, *outs))
    train(model)
    return log.events


@hooks.same("full backward hooks of every module inside the blocks")
def test_full_backward_hooks_inside(model):
    log = Log()
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda _, ins, outs, name=name: log.add(name, *ins, *outs))
    train(model)
    return log.events


@hooks.same("a full backward hook that replaces the gradient")
def test_full_backward_hook_replaces_the_gradient(model):
    model[2].register_full_backward_hook(lambda _, ins, __: tuple(0.5 * g for g in ins))
    model[1][0].register_full_backward_pre_hook(lambda _, outs: tuple(2 * g for g in outs))
    return train(model)


@hooks.same("full backward hooks of the model itself")
def test_full_backward_hooks_of_the_model(model):
    log = Log()
    model.register_full_backward_pre_hook(lambda _, grads: log.add("before", *grads))
    model.register_full_backward_hook(lambda _, ins, outs: log.add("after", *ins, *outs))
    return train(model), log.events


@hooks.same("parameter hooks (`p.register_hook`)", settings=EVERYTHING)
def test_parameter_hooks(model):
    log = Log()
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: log.add(name, g))
    train(model)
    return log.events


@hooks.same("a parameter hook that replaces the gradient")
def test_parameter_hook_replaces_the_gradient(model):
    for p in model.parameters():
        p.register_hook(lambda g: g / (1 + g.norm()))
    return train(model)


@hooks.same("post-accumulate hooks", settings=EVERYTHING)
def test_post_accumulate_hooks(model):
    log = Log()
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: log.add(name, p.grad))
    train(model)
    return log.events


@hooks.same("tensor hooks on input and output")
def test_tensor_hooks(model):
    log = Log()
    x = make_input()
    x.register_hook(lambda g: log.add("input", g))
    y = model(x)
    y.register_hook(lambda g: log.add("output", g))
    y.register_hook(lambda g: 2 * g)
    y.pow(2).sum().backward()
    return x.grad, log.events


@hooks.same("tensor hooks set inside a block, on an activation")
def test_tensor_hooks_inside(model):
    log = Log()

    def watch(_, __, out, name):
        out.register_hook(lambda g: log.add(name, g))

    for i, b in enumerate(model):
        b[1].register_forward_hook(lambda *args, i=i: watch(*args, name=f"{i}"))
    train(model)
    return log.events


@hooks.same("a tensor hook inside a block that replaces the gradient (gradient reversal, clipping)")
def test_tensor_hook_inside_replaces_the_gradient(model):
    for b in model:
        b[1].register_forward_hook(lambda _, __, out: out.register_hook(lambda g: -0.5 * g.clamp(-1, 1)) and None)
    return train(model)


@hooks.same("hooks and pre-hooks on the output's `grad_fn`")
def test_node_hooks(model):
    log = Log()
    x = make_input()
    y = model(x)
    y.grad_fn.register_prehook(lambda grads: log.add("before", *grads))
    y.grad_fn.register_hook(lambda ins, outs: log.add("after", *ins, *outs))
    y.pow(2).sum().backward()
    return x.grad, log.events


@hooks.same("`register_multi_grad_hook` over all parameters, any and all")
def test_multi_grad_hook(model):
    log = Log()
    register = torch.autograd.graph.register_multi_grad_hook
    params = list(model.parameters())
    handles = [
        register(params, lambda grads: log.add("all", *grads)),
        register(params, lambda grad: log.add("any", grad), mode="any"),
    ]
    train(model)
    for handle in handles:
        handle.remove()
    return log.events


@hooks.same("global module hooks (`register_module_full_backward_hook` and its kin)")
def test_global_hooks(model):
    log = Log()
    names = {module: name for name, module in model.named_modules()}
    module_hooks = nn.modules.module
    handles = [
        module_hooks.register_module_forward_pre_hook(lambda m, args: log.add_first(f"before {names[m]}")),
        module_hooks.register_module_forward_hook(lambda m, _, out: log.add_first(f"after {names[m]}", out)),
        module_hooks.register_module_full_backward_pre_hook(lambda m, gs: log.add(f"back before {names[m]}", *gs)),
        module_hooks.register_module_full_backward_hook(lambda m, ins, outs: log.add(f"back {names[m]}", *ins, *outs)),
    ]
    try:
        train(model)
    finally:
        for handle in handles:
            handle.remove()
    return log.events


@hooks.same("all kinds of backward hooks together, in one order", settings=EVERYTHING)
def test_all_hooks_in_order(model):
    log = Log()
    x = make_input()
    x.register_hook(lambda g: log.add("x", g))
    for i, b in enumerate(model):
        b.register_full_backward_pre_hook(lambda _, grads, i=i: log.add(f"before {i}", *grads))
        b.register_full_backward_hook(lambda _, ins, outs, i=i: log.add(f"after {i}", *ins, *outs))
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: log.add(f"hook {name}", g))
        p.register_post_accumulate_grad_hook(lambda p, name=name: log.add(f"accumulated {name}", p.grad))
    y = model(x)
    y.register_hook(lambda g: log.add("y", g))
    y.pow(2).sum().backward()
    return log.events


@hooks.same("a hook that removes itself after its first call")
def test_hook_removes_itself(model):
    log = Log()

    def once(_, ins, outs):
        log.add("once", *ins, *outs)
        handle.remove()

    handle = model[2].register_full_backward_hook(once)
    train(model)
    train(model)
    return log.events


@hooks.same("a backward hook that looks at what a node of a later layer saved (`retain_graph`)")
def test_hook_reads_a_saved_tensor(model):
    nodes, seen = [], []
    model[3][1].register_forward_hook(lambda _, __, out: nodes.append(out.grad_fn))
    model[1].register_full_backward_hook(lambda *_: seen.append(nodes[0]._saved_result))
    x = make_input()
    model(x).pow(2).sum().backward(retain_graph=True)
    return x.grad, seen


@hooks.same("forward hooks that cache a statistic on the module", note="ask `is_recomputing()`, or it counts twice")
def test_forward_hook_with_a_counter(model):
    counts = dict.fromkeys(range(len(model)), 0)

    def count(i):
        counts[i] += not revcore_torch.is_recomputing()

    for i, b in enumerate(model):
        b.register_forward_hook(lambda *_, i=i: count(i))
    return train(model), counts


# --- an optimizer inside the backward pass ----------------------------------------------------------------------------


def fuse_optimizer(model: nn.Module, make_optimizer: Any) -> None:
    optimizers: dict[Tensor, Any] = {p: make_optimizer([p]) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)


@hooks.same("an optimizer step inside the backward pass (post-accumulate hook), 3 steps", settings=EVERYTHING)
def test_optimizer_in_backward(model):
    fuse_optimizer(model, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9))
    for _ in range(3):
        model(make_input()).pow(2).mean().backward()
    return list(model.parameters())


@hooks.same("the same, by layer: steps once a layer's gradients are all there", settings=EVERYTHING)
def test_optimizer_in_backward_by_layer(model):
    optimizers = {b: torch.optim.SGD(b.parameters(), lr=0.01) for b in model}
    alive: list[int] = []

    def step(b):
        alive.append(sum(any(p.grad is not None for p in other.parameters()) for other in model))
        if all(p.grad is not None for p in b.parameters()):
            optimizers[b].step()
            optimizers[b].zero_grad()

    for b in model:
        for p in b.parameters():
            p.register_post_accumulate_grad_hook(lambda _, b=b: step(b))
    for _ in range(2):
        model(make_input()).pow(2).mean().backward()
    assert set(alive) == {1}, "gradients of more than one layer were alive"
    return list(model.parameters()), alive


@hooks.works("the same, measured: bytes of gradients do not grow with depth", note="at most one layer's at a time")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_optimizer_in_backward_holds_one_layers_gradients(policy):
    width = 128
    layer = 8 * width * width

    def peak(depth: int) -> int:
        model = ReversibleSequential(*[nn.Linear(width, width) for _ in range(depth)], policy=policy).double()
        fuse_optimizer(model, lambda p: torch.optim.SGD(p, lr=0.01, foreach=False))
        loss = model(torch.ones(1, 2 * width, dtype=torch.float64)).pow(2).mean()
        with LiveBytes() as memory:
            loss.backward()
        return memory.peak

    assert peak(2) < 2 * layer
    assert peak(12) - peak(2) < 0.5 * layer


# --- hooks that fail --------------------------------------------------------------------------------------------------


@hooks.refuses("a backward hook raises", KeyError, "told to", note="buffers and random state stay; a retry is clean")
@pytest.mark.parametrize(
    "policy", [Reverse(), pytest.param(Reverse(anchor_every=1), marks=pytest.mark.long), Checkpoint()], ids=str
)
def test_a_hook_that_raises(refused, policy):
    model = ReversibleSequential(*[nn.Sequential(block(p=0.3), nn.BatchNorm1d(WIDTH)) for _ in range(3)]).double()
    model.policy = policy

    def fail(*_):
        raise KeyError("told to")

    torch.manual_seed(1)
    expected = [t.clone() for t in [*train(model), *(p.grad for p in model.parameters())] if t is not None]
    model.zero_grad()
    torch.manual_seed(1)
    handle = model[1].register_full_backward_hook(fail)
    x = make_input()
    loss = model(x).pow(2).sum()
    buffers, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    with refused:
        loss.backward(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    handle.remove()
    model.zero_grad()
    torch.manual_seed(1)
    results: list[Any] = [*train(model), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
