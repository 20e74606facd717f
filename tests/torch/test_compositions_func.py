"""``torch.func``, forward mode, export and tracing: there nothing is rebuilt, and the values are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential
from tests.torch.harness import EVERYTHING, REVERSE, block, make_input, train
from tests.torch.registry import Section

func = Section("torch.func and forward mode")
# Everything is stored there, whatever the policy (T9), so the fast tier has one where nothing else is run.
# torch.func.jvp compiles decompositions with the deprecated torch.jit.script
scripted = pytest.mark.filterwarnings("ignore:.*torch.jit.script")
# parameters become constants of the traced function, which fx says of any network
constants = pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")


def parameters(model: nn.Module) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def loss_of(model: Any) -> Any:
    return lambda params, x: functional_call(model, params, (x,)).pow(2).sum()


@func.same("`torch.func.grad` over `functional_call`", make=block, settings=EVERYTHING, fast=REVERSE)
def test_func_grad(model):
    return torch.func.grad(loss_of(model))(parameters(model), make_input().detach())


@func.same("`torch.func.grad_and_value`, on the input", make=block, fast=REVERSE)
def test_func_grad_and_value(model):
    return torch.func.grad_and_value(lambda x: model(x).pow(2).sum())(make_input().detach())


@func.same("`torch.func.vjp`", make=block, fast=REVERSE)
def test_func_vjp(model):
    y, pull, *_ = torch.func.vjp(model, make_input().detach())
    return y, pull(y.cos())


@func.same("`torch.func.jvp`", make=block, settings=EVERYTHING, fast=REVERSE)
@scripted
def test_func_jvp(model):
    x = make_input().detach()
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))


@func.same("`torch.func.linearize`", settings=REVERSE, make=block, depth=2)
@scripted
@constants
def test_func_linearize(model):
    x = make_input().detach()
    y, push = torch.func.linearize(model, x)
    return y, push(x.sin())


@func.same("`torch.func.jacrev`", make=block, fast=REVERSE)
def test_func_jacrev(model):
    return torch.func.jacrev(model)(make_input(rows=2).detach())


@func.same("`torch.func.jacfwd`", settings=REVERSE, make=block, depth=2)
@scripted
def test_func_jacfwd(model):
    return torch.func.jacfwd(model)(make_input(rows=2).detach())


@func.same("`torch.func.hessian`", settings=REVERSE, make=block, depth=2, tolerance=1e-11)
@scripted
def test_func_hessian(model):
    return torch.func.hessian(lambda x: model(x).pow(2).sum())(make_input(rows=1).detach())


@func.same("`torch.func.vmap` over the batch", make=block, fast=REVERSE)
def test_func_vmap(model):
    return torch.func.vmap(lambda x: model(x[None])[0])(make_input().detach())


@func.same("`torch.func.vmap`, then `backward()` through it", make=block, settings=EVERYTHING, fast=REVERSE)
def test_func_vmap_then_backward(model):
    x = make_input()
    torch.func.vmap(lambda row: model(row[None])[0])(x).pow(2).sum().backward()
    return x.grad


@func.same("`torch.func.vmap` with dropout (`randomness='different'`)")
def test_func_vmap_with_dropout(model):
    return torch.func.vmap(lambda x: model(x[None])[0], randomness="different")(make_input().detach())


@func.same("gradients of each sample (`vmap` of `grad`)", make=block, fast=REVERSE)
def test_func_gradients_of_samples(model):
    one = lambda params, row: loss_of(model)(params, row[None])  # noqa: E731
    return torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(parameters(model), make_input().detach())


@func.same("an ensemble (`stack_module_state`, `vmap`)", make=block, fast=REVERSE)
def test_func_ensemble(model):
    members = [parameters(model), {name: 1.1 * p for name, p in parameters(model).items()}]
    stacked = {name: torch.stack([m[name] for m in members]) for name in members[0]}
    x = make_input().detach()
    grads = torch.func.vmap(torch.func.grad(loss_of(model)), in_dims=(0, None))(stacked, x)
    return torch.func.vmap(loss_of(model), in_dims=(0, None))(stacked, x), grads


@func.same("`torch.func.grad` of `torch.func.grad`", make=block, tolerance=1e-11, fast=REVERSE)
def test_func_grad_of_grad(model):
    inner = torch.func.grad(lambda x: model(x).pow(2).sum())
    return torch.func.grad(lambda x: inner(x).pow(2).sum())(make_input().detach())


@func.same("meta-learning: a step inside the loss (MAML)", settings=REVERSE, make=block, depth=2, tolerance=1e-11)
def test_func_maml(model):
    x, loss = make_input().detach(), loss_of(model)

    def outer(params):
        grads = torch.func.grad(loss)(params, x)
        return loss({name: p - 0.01 * grads[name] for name, p in params.items()}, 2 * x)

    return torch.func.grad(outer)(parameters(model))


@func.same("forward mode (`forward_ad.make_dual`)", make=block, fast=REVERSE)
@scripted
def test_forward_mode(model):
    x = make_input().detach()
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@func.same("`functional_call` under `no_grad`")
def test_functional_call_no_grad(model):
    with torch.no_grad():
        return functional_call(model, {k: 2 * v for k, v in parameters(model).items()}, (make_input(),))


@func.same("`functional_call` with the model's own parameters, backward outside")
def test_functional_call_own_parameters(model):
    x = make_input()
    functional_call(model, dict(model.named_parameters()), (x,)).pow(2).sum().backward()
    return x.grad


@func.refuses(
    "`functional_call` with other parameters, backward outside",
    revcore.InversionError,
    "Under torch.func.functional_call, take the gradient inside it",
    note="the swapped parameters are gone when the block runs again",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_functional_call_backward_outside(refused, policy):
    model = ReversibleSequential(block(), block(), policy=policy).double()
    params = {name: p.requires_grad_() for name, p in parameters(model).items()}
    loss = functional_call(model, params, (make_input(),)).pow(2).sum()
    with refused:
        loss.backward()


# --- graphs made of the model -----------------------------------------------------------------------------------------

graphs = Section("Export and tracing")


@graphs.same("`torch.export`, and the exported module trained", make=block, fast=REVERSE, depth=2)
def test_export(model):
    exported = torch.export.export(model, (make_input().detach(),)).module()
    x = make_input()
    y = exported(x)
    y.pow(2).sum().backward()
    return y, x.grad, {name: p.grad for name, p in exported.named_parameters()}


@graphs.same(
    "`torch.export` with a free batch size",
    settings=REVERSE,
    make=block,
    depth=2,
)
def test_export_with_a_free_batch(model):
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, (make_input().detach(),), dynamic_shapes=({0: batch},)).module()
    return exported(make_input(rows=7).detach())


@graphs.same("`make_fx` of the forward pass", settings=REVERSE, make=block, depth=2)
def test_make_fx(model):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model)(make_input().detach())(2 * make_input().detach())


@graphs.same("`make_fx` of a training step", settings=REVERSE, make=block, depth=2)
@constants
def test_make_fx_of_a_step(model):
    from torch.fx.experimental.proxy_tensor import make_fx

    step = lambda x: torch.autograd.grad(model(x).pow(2).sum(), [x, *model.parameters()])  # noqa: E731
    x = make_input()
    return make_fx(step)(x)((2 * x).detach().requires_grad_())


@graphs.same(
    "`torch.jit.trace`",
    settings=REVERSE,
    make=block,
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore:Converting a tensor to a Python")
def test_jit_trace(model):
    traced: Any = torch.jit.trace(model, make_input().detach(), check_trace=False)
    x = make_input()
    y = traced(x)
    y.pow(2).sum().backward()
    return y, x.grad


@graphs.refuses(
    "`torch.fx.symbolic_trace`",
    revcore.SpecError,
    "the input came as Proxy, expected a tensor",
    note="fx follows no checks of what comes: use `torch.export`",
)
def test_symbolic_trace(refused):
    with refused:
        torch.fx.symbolic_trace(ReversibleSequential(block(), block()))


# --- torch.compile; more of it in its own file ------------------------------------------------------------------------

compiled = Section("torch.compile")
# dynamo looks at .grad of what crosses a graph break
crossing = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@compiled.same("compiled blocks (`block.compile()`)", settings=REVERSE, depth=2)
@crossing
def test_compiled_blocks(model):
    torch._dynamo.reset()
    for b in model:
        b.compile(backend="eager")
    return train(model)


@compiled.same("`torch.compile` of the whole model", settings=REVERSE)
@crossing
@pytest.mark.long  # test_compositions_compile.py has it in two graphs, and in one
def test_compiled_whole(model):
    torch._dynamo.reset()
    x = make_input()
    torch.compile(model, backend="aot_eager")(x).pow(2).sum().backward()
    return x.grad
