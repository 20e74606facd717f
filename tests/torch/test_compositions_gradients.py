"""Every way to ask for gradients gives the plain network's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, reversible
from tests.plain.pytorch import Plain
from tests.torch.harness import EVERYTHING, WIDTH, Apply, block, dropout_block, make_input, run_streams, train
from tests.torch.registry import Section

ask = Section("Asking for gradients")


@ask.same("`loss.backward()`", settings=EVERYTHING, note="also 3 streams, momentum, affine, every policy")
def test_backward(model):
    return train(model)


@ask.same("the same without dropout", make=block, settings=EVERYTHING)
def test_backward_without_dropout(model):
    return train(model)


@ask.same("`autograd.grad` on the input", settings=EVERYTHING)
def test_grad_on_the_input(model):
    x = make_input()
    return torch.autograd.grad(model(x).pow(2).sum(), x)


@ask.same("`autograd.grad` on all parameters", settings=EVERYTHING)
def test_grad_on_the_parameters(model):
    return torch.autograd.grad(model(make_input()).pow(2).sum(), list(model.parameters()))


@ask.same("`autograd.grad` on input and parameters at once")
def test_grad_on_everything(model):
    x = make_input()
    return torch.autograd.grad(model(x).pow(2).sum(), [x, *model.parameters()])


@ask.same("`autograd.grad` on one layer only", settings=EVERYTHING)
def test_grad_on_one_layer(model):
    return torch.autograd.grad(model(make_input()).pow(2).sum(), list(model[2].parameters()))


@ask.same("`autograd.grad` on layer after layer of one graph, from the first to the last")
def test_grad_on_each_layer_in_turn(model):
    loss = model(make_input()).pow(2).sum()
    return [torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True) for layer in model]


@ask.same("`loss.backward(inputs=[…])`")
def test_backward_with_inputs(model):
    x = make_input()
    model(x).pow(2).sum().backward(inputs=[x, model[1][0].weight])
    return x.grad


@ask.same("`y.backward(gradient)`, without a loss")
def test_backward_with_a_gradient(model):
    x = make_input()
    model(x).backward(make_input().detach().cos())
    return x.grad


@ask.same("`torch.autograd.backward` of several outputs at once")
def test_backward_of_several_tensors(model):
    x = make_input()
    y = model(x)
    torch.autograd.backward([y[:, 0], y[:, 3:], y.norm()], [torch.ones(4), torch.ones(4, 9), None])
    return x.grad


@ask.same("`autograd.grad(…, is_grads_batched=True)`", make=block)
def test_batched_gradients(model):
    x = make_input()
    y = model(x)
    directions = torch.randn(3, *y.shape, dtype=y.dtype)
    return torch.autograd.grad(y, [x, model[0][0].weight], directions, is_grads_batched=True)


@ask.same("backward twice, with `retain_graph`", settings=EVERYTHING)
def test_backward_twice(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return x.grad


@ask.refuses(
    "backward twice, without `retain_graph`", RuntimeError, "Trying to backward through the graph a second time"
)
@pytest.mark.parametrize(
    "policy", [Reverse(), pytest.param(Reverse(anchor_every=1), marks=pytest.mark.long), Checkpoint()], ids=str
)
def test_backward_twice_without_retaining(refused, policy):
    loss = ReversibleSequential(block(), block(), policy=policy).double()(make_input()).pow(2).sum()
    loss.backward()
    with refused:
        loss.backward()


@ask.same("two losses of one output, one after the other", settings=EVERYTHING)
def test_two_losses(model):
    x = make_input()
    y = model(x)
    y.pow(2).sum().backward(retain_graph=True)
    y.sin().sum().backward()
    return x.grad


@ask.same("two losses, summed")
def test_two_losses_summed(model):
    x = make_input()
    y = model(x)
    (y.pow(2).sum() + 3 * y.sin().sum()).backward()
    return x.grad


@ask.same("double backward (`create_graph=True`)", settings=EVERYTHING, tolerance=1e-11)
def test_double_backward(model):
    x = make_input()
    (g,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
    (g**2).sum().backward()
    return x.grad


@ask.same("double backward through the gradients of parameters", tolerance=1e-11)
def test_double_backward_of_parameters(model):
    x = make_input()
    grads = torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters()), create_graph=True)
    torch.stack([g.pow(2).sum() for g in grads]).sum().backward()
    return x.grad


@ask.same("`backward(create_graph=True)`, then a backward of `x.grad`", tolerance=1e-11)
# PyTorch warns of the cycle between x and its gradient, which the case breaks
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_backward_with_create_graph(model):
    x = make_input()
    model(x).pow(2).sum().backward(create_graph=True)
    assert x.grad is not None
    (again,) = torch.autograd.grad(x.grad.pow(2).sum(), x)
    grads = [x.grad.detach(), *(p.grad.detach() for p in model.parameters())]
    x.grad = None
    model.zero_grad()
    return again, grads


@ask.same("three times differentiated", tolerance=1e-10)
def test_triple_backward(model):
    x = make_input()
    g = model(x).pow(3).sum()
    for _ in range(3):
        (g,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
    return g


@ask.same("a gradient penalty", tolerance=1e-11)
def test_gradient_penalty(model):
    x = make_input()
    y = model(x)
    (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    ((g.norm() - 1) ** 2 + y.sum()).backward()
    return x.grad


@ask.same("`autograd.functional`: jacobian, hessian, hvp, vjp", make=block, tolerance=1e-11)
def test_autograd_functional(model):
    from torch.autograd.functional import hessian, hvp, jacobian, vjp

    x = make_input(rows=2).detach()
    loss = lambda x: model(x).pow(2).sum()  # noqa: E731
    return (
        jacobian(model, x),
        jacobian(model, x, vectorize=True),
        hessian(loss, x),
        hvp(loss, x, x.cos()),
        vjp(model, x, x.sin()),
    )


@ask.same("double backward when only the gradient is still held, not the output", settings=EVERYTHING, tolerance=1e-10)
def test_double_backward_of_a_gradient_alone(model):
    x = make_input()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    g.pow(2).sum().backward()
    return x.grad


@ask.same("forces: the loss on the gradient alone, several passes of it", tolerance=1e-10)
def test_gradients_of_a_gradient_alone(model):
    x = make_input()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(g[i].pow(2).sum(), x, retain_graph=True, create_graph=i < 2)[0] for i in range(3)]
    rows[0].sum().backward()
    return rows, x.grad


@ask.refuses(
    "an argument is changed in place before a gradient of a gradient, only the latter held",
    revcore.InversionError,
    "an output or argument of a reversible network was changed in place",
    note="blocks run again with it",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_argument_changed_before_double_backward(refused, policy):
    model = ReversibleSequential(*[Apply(lambda h, scale: torch.tanh(h + scale))] * 2, policy=policy)
    x, scale = make_input(), torch.ones(WIDTH, dtype=torch.float64)
    (g,) = torch.autograd.grad(model(x, scale).sum(), x, create_graph=True)
    scale.mul_(2)
    with refused:
        g.pow(2).sum().backward()


@ask.works("`gradcheck`")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_gradcheck(policy):
    model = ReversibleSequential(block(), block(), policy=policy).double()
    assert torch.autograd.gradcheck(model, make_input(rows=1))


@ask.works("`gradgradcheck`")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_gradgradcheck(policy):
    model = ReversibleSequential(block(), block(), policy=policy).double()
    assert torch.autograd.gradgradcheck(model, make_input(rows=1))


@ask.same("only one output stream is used, the older", settings=EVERYTHING)
def test_only_the_older_stream(model):
    return one_stream(model, 0)


@ask.same("only one output stream is used, the newer", settings=EVERYTHING)
def test_only_the_newer_stream(model):
    return one_stream(model, -1)


def one_stream(model, which: int):
    x = make_input()
    streams = run_streams(model, x.chunk(model.num_streams, 1))
    return torch.autograd.grad(streams[which].pow(2).sum(), [x, *model.parameters()], allow_unused=True)


@ask.same("the output is not used at all, `allow_unused=True`")
def test_output_not_used(model):
    x = make_input()
    model(x)
    x.pow(2).sum().backward()
    return x.grad


@ask.same("the input requires no gradient", settings=EVERYTHING)
def test_no_input_gradient(model):
    return model(make_input().detach()).pow(2).sum().backward()


@ask.same("only the input requires a gradient; all parameters are frozen", settings=EVERYTHING)
def test_only_the_input_requires_gradient(model):
    model.requires_grad_(False)
    return train(model)


@ask.same("only one stream of the input requires a gradient")
def test_one_stream_requires_gradient(model):
    a, b = make_input().detach().chunk(2, 1)
    b = b.clone().requires_grad_()
    y0, y1 = run_streams(model, (a, b))
    (y0.sin() + y1.cos()).sum().backward()
    return b.grad


@ask.same("nothing requires a gradient", note="nothing is kept, and each block runs once")
def test_nothing_requires_gradient(model):
    model.requires_grad_(False)
    y = model(make_input().detach())
    return y, y.requires_grad


@ask.same("some layers are frozen")
def test_frozen_layers(model):
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    return model(make_input().detach()).pow(2).sum().backward()


@ask.same("only the last layer trains")
def test_only_the_last_layer_trains(model):
    model[:-1].requires_grad_(False)
    return model(make_input().detach()).pow(2).sum().backward()


@ask.same("only the first layer trains")
def test_only_the_first_layer_trains(model):
    model[1:].requires_grad_(False)
    return model(make_input().detach()).pow(2).sum().backward()


@ask.same("only the biases train")
def test_only_biases_train(model):
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    return train(model)


@ask.same("layers are frozen after the forward pass")
def test_frozen_after_the_forward_pass(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    model[1].requires_grad_(False)
    loss.backward()
    return x.grad, [p.requires_grad for p in model.parameters()]


@ask.same("layers are unfrozen after the forward pass")
def test_unfrozen_after_the_forward_pass(model):
    model[1].requires_grad_(False)
    x = make_input()
    loss = model(x).pow(2).sum()
    model[1].requires_grad_(True)
    loss.backward()
    return x.grad


@ask.same("the loss touches an activation inside a block, caught by a hook")
def test_captured_activations(model):
    caught: list[Tensor] = []
    handles = [b[1].register_forward_hook(lambda _, __, out: caught.append(out)) for b in model]
    x = make_input()
    y = model(x)
    loss = sum(c.pow(2).sum() for c in caught) + y.sum()
    for handle in handles:
        handle.remove()
    loss.backward()
    return x.grad


@ask.same("`retain_grad` on an activation inside a block")
def test_retain_grad_inside(model):
    caught: list[Tensor] = []
    handle = model[2][1].register_forward_hook(lambda _, __, out: (out.retain_grad(), caught.append(out))[1])
    results = train(model)
    handle.remove()
    return caught[0].grad, results


@ask.same("`autograd.grad` on an activation inside a block")
def test_grad_on_an_activation(model):
    caught: list[Tensor] = []
    model[2][1].register_forward_hook(lambda _, __, out: caught.append(out))
    y = model(make_input())
    return torch.autograd.grad(y.pow(2).sum(), caught[0])


@ask.same("`autograd.grad` on a gradient edge (`get_gradient_edge`)")
def test_gradient_edge(model):
    caught = []
    model[2][1].register_forward_hook(lambda _, __, out: caught.append(torch.autograd.graph.get_gradient_edge(out)))
    y = model(make_input())
    return torch.autograd.grad(y.pow(2).sum(), caught[0])


@ask.refuses(
    "a gradient of an activation inside, after the outputs are gone",
    revcore.InversionError,
    "a gradient was asked of a tensor inside a reversible network whose outputs are gone",
)
def test_outputs_are_gone(refused):
    caught: list[Tensor] = []
    model = ReversibleSequential(block(), block()).double()
    model[0][1].register_forward_hook(lambda _, __, out: caught.append(out))
    model(make_input())
    with refused:
        caught[0].sum().backward()


@ask.same("gradients that are infinite or NaN stay so")
def test_gradients_that_are_not_finite(model):
    x = make_input()
    y = model(x)
    (y[0] / 0).sum().backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()  # a gradient of NaN equals nothing, so its pattern is compared
    return [torch.stack((g.isnan(), g.isposinf(), g.isneginf())).double() for g in grads]


loops = Section("Loops and optimizers")


@loops.same("gradient accumulation over micro-batches", settings=EVERYTHING)
def test_gradient_accumulation(model):
    for scale in (1.0, 2.0, 3.0):
        (scale * model(make_input())).pow(2).sum().backward()


@loops.same("two forward passes before two backward passes")
def test_two_forwards_before_backward(model):
    x = make_input()
    first, second = model(x).pow(2).sum(), model(2 * x).pow(3).sum()
    first.backward()
    second.backward()
    return x.grad


@loops.same("the same, the backward passes in reverse order")
def test_two_forwards_backward_in_reverse(model):
    x = make_input()
    first, second = model(x).pow(2).sum(), model(2 * x).pow(3).sum()
    second.backward()
    first.backward()
    return x.grad


@loops.same("two forward passes, one of them through its own output; one backward", tolerance=1e-11)
def test_two_forwards_one_backward(model):
    x = make_input()
    (model(x).pow(2).sum() + model(model(x)).sin().sum()).backward()
    return x.grad


@loops.same("truncated backpropagation: the output is detached and goes on")
def test_truncated(model):
    x = make_input()
    state = x
    for _ in range(3):
        state = model(state)
        state.pow(2).mean().backward()
        state = state.detach()
    return x.grad, state


def optimize(model, make_optimizer, steps=3):
    optimizer = make_optimizer(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(make_input()).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return list(model.parameters())


@loops.same("SGD with momentum and clipped gradients, 3 steps", settings=EVERYTHING)
def test_sgd(model):
    return optimize(model, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9))


@loops.same("AdamW, 3 steps", tolerance=1e-9, note="Adam divides by a gradient's size, so its rounding weighs more")
def test_adamw(model):
    return optimize(model, lambda p: torch.optim.AdamW(p, 0.01))


@loops.same("an optimizer with a closure (LBFGS)", make=block, tolerance=1e-8)
def test_closure_of_an_optimizer(model):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = model(make_input()).pow(2).mean()
        loss.backward()
        return loss

    return optimizer.step(closure), list(model.parameters())


@loops.same("sharpness-aware steps: weights moved and moved back between two passes")
def test_sharpness_aware(model):
    train(model)
    moves = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p.add_(move)
    model.zero_grad()
    results = train(model)
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves, strict=True):
            p.sub_(move)
    return results


@loops.same("the input is optimised, not the model (an attack, a style)")
def test_optimising_the_input(model):
    x = make_input()
    optimizer = torch.optim.SGD([x], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    return x


@loops.refuses(
    "an optimizer step between forward and backward",
    revcore.InversionError,
    "its parameters were changed in place after the forward pass",
    note="the plain network raises too, where a changed weight was saved",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_step_before_backward(refused, policy):
    model = ReversibleSequential(block(), block(), policy=policy).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = model(make_input()).pow(2).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with refused:
        loss.backward()


@loops.refuses(
    "a stream, output of `reversible`, is changed in place under `no_grad`",
    RuntimeError,
    "has been modified by an inplace operation",
)
def test_output_stream_changed(refused):
    streams = reversible(revcore.revnet(2), [block().double(), block().double()], make_input().chunk(2, 1))
    loss = torch.cat(streams).pow(2).sum()
    with torch.no_grad():
        streams[0].mul_(2.0)
    with refused:
        loss.backward()


@loops.same("the output is changed in place (`y.relu_()`)")
def test_output_changed_in_place(model):
    x = make_input()
    y = model(x)
    y.relu_()
    y.pow(2).sum().backward()
    return x.grad


@loops.same("a part of the output is overwritten (`y[:, 0] = 0`)")
def test_output_overwritten(model):
    x = make_input()
    y = model(x)
    y[:, 0] = 0
    y.pow(2).sum().backward()
    return x.grad


@loops.works("the input is changed in place after the forward pass", note="the plain network raises: it saved it")
def test_input_changed_in_place():
    model = ReversibleSequential(dropout_block(), dropout_block()).double()
    grads = []
    for factor in (1.0, 2.0):
        torch.manual_seed(0)
        x = make_input().detach()
        loss = model(x).pow(2).sum()
        x.mul_(factor)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    x = make_input().detach()
    loss = Plain(*copy.deepcopy(list(model)))(x).pow(2).sum()
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@loops.refuses(
    "the same under `Checkpoint()`",
    RuntimeError,
    "has been modified by an inplace operation",
    note="it keeps the input",
)
def test_input_changed_in_place_under_checkpoint(refused):
    model = ReversibleSequential(block(), block(), policy=Checkpoint()).double()
    x = make_input().detach()
    loss = model(x).pow(2).sum()
    x.mul_(2.0)
    with refused:
        loss.backward()


@loops.same("`train()` and `eval()` in turn: a validation pass between two training steps")
def test_validation_between(model):
    results = train(model)
    model.eval()
    with torch.no_grad():
        results.append(model(make_input()))
    model.train()
    return results, train(model)


@loops.same("a validation pass between a forward pass and its backward")
def test_validation_before_backward(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    model.eval()
    with torch.no_grad():
        y = model(x)
    model.train()
    loss.backward()
    return x.grad, y


@loops.same("`model.eval()` between a forward pass and its backward", note="blocks run again as they ran first")
def test_eval_before_backward(model):
    x = make_input()
    loss = model(x).pow(2).sum()
    model.eval()
    loss.backward()
    return x.grad, [module.training for module in model.modules()]


@loops.same("gradients in evaluation mode", settings=EVERYTHING)
def test_gradients_in_evaluation_mode(model):
    return train(model.eval())
