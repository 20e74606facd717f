"""What blocks are made of: parametrisations, tied and frozen weights, kinds of layers, nested nets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, reversible
from tests.torch.harness import EVERYTHING, WIDTH, Apply, after_linear, block, dropout_block, make_input, train
from tests.torch.registry import Section

# --- parameters -------------------------------------------------------------------------------------------------------

weights = Section("Parameters and parametrisations")


def parametrised(wrap: Any) -> Any:
    return lambda width=WIDTH: nn.Sequential(wrap(nn.Linear(width, width)), nn.Tanh())


@weights.same("`parametrizations.spectral_norm`", make=parametrised(parametrizations.spectral_norm))
def test_spectral_norm(model):
    return train(model), train(model)


@weights.same("the old `utils.spectral_norm`", make=parametrised(nn.utils.spectral_norm))
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*deprecated")
def test_old_spectral_norm(model):
    return train(model), train(model)


@weights.same("`parametrizations.weight_norm`", make=parametrised(parametrizations.weight_norm))
def test_weight_norm(model):
    return train(model)


@weights.same("the old `utils.weight_norm`", make=parametrised(nn.utils.weight_norm))
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*deprecated")
def test_old_weight_norm(model):
    return train(model)


@weights.same("`parametrizations.orthogonal`", make=parametrised(parametrizations.orthogonal), tolerance=1e-11)
def test_orthogonal(model):
    return train(model)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def symmetric(linear: nn.Module) -> nn.Module:
    parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


@weights.same("a parametrisation written by hand", make=parametrised(symmetric))
def test_parametrisation(model):
    return train(model)


@weights.same("the same, forward and backward inside `parametrize.cached()`", make=parametrised(symmetric))
def test_parametrisation_cached(model):
    with parametrize.cached():
        return train(model)


@weights.same("the same, only the forward pass inside `parametrize.cached()`", make=parametrised(symmetric))
def test_parametrisation_cached_in_forward(model):
    x = make_input()
    with parametrize.cached():
        loss = model(x).pow(2).sum()
    loss.backward()
    return x.grad


@weights.same("one parametrised layer in all blocks, inside `parametrize.cached()`", make=parametrised(symmetric))
def test_parametrisation_cached_and_tied(model):
    for b in model[1:]:
        b[0] = model[0][0]
    with parametrize.cached():
        x = make_input()
        loss = model(x).pow(2).sum()
        loss.backward()
    return x.grad


@weights.same("pruning (`utils.prune`)", make=parametrised(lambda m: prune.l1_unstructured(m, "weight", 0.4)))
def test_pruning(model):
    return train(model)


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 3)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 3)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.down.T @ self.up.T


@weights.same("LoRA adapters over a frozen base", make=parametrised(LoRA), settings=EVERYTHING)
def test_lora(model):
    return train(model)


@weights.same("LoRA adapters over a frozen base, an input without gradient", make=parametrised(LoRA))
def test_lora_without_input_gradient(model):
    return model(make_input().detach()).pow(2).sum().backward()


@weights.same("LoRA adapters merged into the base and taken out again, between steps", make=parametrised(LoRA))
def test_lora_merged(model):
    train(model)
    for sign in (1, -1):
        with torch.no_grad():
            for b in model:
                b[0].base.weight.add_(sign * b[0].up @ b[0].down)
            y = model(make_input())
    return y, train(model)


@weights.same("tied layers: one module twice in the list")
def test_tied_layers(model):
    model.append(model[0])
    return train(model)


@weights.same("all layers one module (weight sharing)")
def test_one_module_for_all(model):
    for i in range(1, len(model)):
        model[i] = model[0]
    return train(model)


@weights.same("tied parameters: one weight in two layers")
def test_tied_parameters(model):
    model[3][0].weight = model[1][0].weight
    model[2][3].weight = model[2][0].weight
    return train(model)


@weights.same("a weight of the model is used again outside (tied embeddings)")
def test_weight_used_outside(model):
    x = make_input()
    y = model(x)[:, :WIDTH] @ model[0][0].weight.T
    y.pow(2).sum().backward()
    return x.grad


@weights.same("frozen parameters inside a block")
def test_frozen_parameters(model):
    for b in model:
        b[0].weight.requires_grad_(False)
    return train(model)


class Lazy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.LazyLinear(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


@weights.same(
    "lazy modules (`LazyLinear`) get their weights in the first forward pass",
    make=Lazy,
)
def test_lazy_modules(model):
    return train(model)


@weights.refuses(
    "the same, and the block draws random numbers after that",
    revcore.InversionError,
    "a lazy module drew its first weights (run the model once under torch.no_grad() before)",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_lazy_modules_and_dropout(refused, policy):
    model = ReversibleSequential(*[nn.Sequential(Lazy(WIDTH), nn.Dropout(0.5)) for _ in range(2)], policy=policy)
    with refused:
        train(model.double())


@weights.same(
    "lazy batch norm",
    make=lambda width: nn.Sequential(nn.Linear(width, width), nn.LazyBatchNorm1d(), nn.Tanh()),
)
def test_lazy_batch_norm(model):
    return train(model)


@weights.same("lazy modules, after a first pass under `no_grad`", make=Lazy)
def test_lazy_modules_initialised(model):
    with torch.no_grad():
        model(make_input())
    return train(model)


# --- kinds of blocks --------------------------------------------------------------------------------------------------

kinds = Section("Kinds of blocks")


def two_forwards(model: Any) -> Any:
    x = make_input()
    (model(x).pow(2).sum() + model(model(x)).sin().sum()).backward()
    return x.grad


class Recurrent(nn.Module):
    def __init__(self, width: int, kind: Any = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[None])[0][0]


@kinds.same("`LSTM`", make=Recurrent)
def test_lstm(model):
    return train(model), two_forwards(model)


@kinds.same("`GRU`", make=lambda width: Recurrent(width, nn.GRU))
def test_gru(model):
    return train(model), two_forwards(model)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, 0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[None], x[None], x[None], need_weights=False)[0][0]


@kinds.same("`MultiheadAttention` with dropout", make=Attention)
def test_attention(model):
    return train(model), two_forwards(model)


@kinds.same(
    "`scaled_dot_product_attention`, causal",
    make=after_linear(
        lambda _: Apply(
            lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0]
        )
    ),
)
def test_sdpa(model):
    return train(model)


@kinds.same(
    "`TransformerEncoderLayer`", make=lambda width: nn.TransformerEncoderLayer(width, 2, 8, 0.1, batch_first=True)
)
def test_transformer_layer(model):
    return train(model), two_forwards(model)


@kinds.same("`GLU` and other gates", make=lambda width: nn.Sequential(nn.Linear(width, 2 * width), nn.GLU(), nn.SiLU()))
def test_gates(model):
    return train(model)


class Forces(nn.Module):
    """Differentiates inside itself, in the forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.energy = block(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).pow(2).sum(), x, create_graph=True)[0]


@kinds.same("a block that differentiates inside itself (forces, energies)", make=Forces)
def test_forces(model):
    return train(model), two_forwards(model)


class StopsGradient(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.router = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.router(x).sigmoid()
        return torch.tanh(self.linear(x)) * gate


@kinds.same("a region under `no_grad` inside a block", make=StopsGradient)
def test_no_grad_inside(model):
    return train(model)


@kinds.same(
    "blocks that detach their input (stop-gradient)",
    make=lambda width: nn.Sequential(Apply(Tensor.detach), block(width)),
)
def test_detach_inside(model):
    return train(model)


@kinds.same("blocks that return a constant, or their input", make=lambda _: Apply(lambda x: x))
def test_identity(model):
    model[1] = Apply(torch.zeros_like)
    return train(model)


@kinds.same(
    "in-place operations on a block's own tensors",
    make=lambda width: nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2, inplace=True), nn.ReLU(inplace=True)),
)
def test_in_place_inside(model):
    return train(model)


@kinds.refuses(
    "a block changes a tensor in place that its own gradient needs",
    revcore.InversionError,
    "block of step 1 changed a tensor in place that its own gradient needs (saved tensor 1, float64(4, 6))",
    note="as for the plain network",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_in_place_on_a_saved_tensor(refused, policy):
    # the gradient of exp_ needs its result
    blocks = [Apply(lambda h: h.sin().exp_().mul_(2)) for _ in range(2)]
    loss = ReversibleSequential(*blocks, policy=policy)(make_input()).pow(2).sum()
    with refused:
        loss.backward()


@kinds.refuses("the same, and the block differentiates inside itself", revcore.InversionError, "and then asked for it")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_in_place_before_a_gradient_inside(refused, policy):
    def slope(h: Tensor) -> Tensor:
        return torch.autograd.grad(h.sin().exp_().mul_(2).sum(), h, create_graph=True)[0]

    with refused:
        ReversibleSequential(*[Apply(slope) for _ in range(2)], policy=policy)(make_input())


@kinds.same(
    "a block changes a tensor in place that it saved, but no gradient needs",
    make=lambda width: Apply(lambda h: h.sin() + (h * (table := torch.ones_like(h))).detach() + table.mul_(2)),
)
def test_in_place_on_what_nothing_needs(model):
    return train(model)


@kinds.refuses(
    "a block writes into its input (`nn.ReLU(inplace=True)` first)",
    revcore.SpecError,
    "changed its input in place, which is a stream that others still need",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_in_place_on_the_input(refused, policy):
    blocks = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)).double()]
    with refused:
        reversible(revcore.revnet(1), blocks, tuple(2 * s for s in make_input().chunk(2, 1)), policy=policy)


@kinds.refuses(
    "a block changes the shape",
    revcore.SpecError,
    "block 1 returned shape (4, 3), but the stream it is coupled with has shape (4, 6)",
)
def test_other_shape(refused):
    with refused:
        ReversibleSequential(block(), nn.Linear(WIDTH, 3)).double()(make_input())


@kinds.refuses("a block returns a wider dtype than its stream", revcore.SpecError, "float64")
def test_wider_dtype(refused):
    with refused:
        ReversibleSequential(block(), Apply(Tensor.double))(make_input().detach().float())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh() ** 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * 2 * x.tanh() * (1 - x.tanh() ** 2)


@kinds.same("a custom `autograd.Function` with `save_for_backward`", make=after_linear(lambda _: Apply(Square.apply)))
def test_custom_function(model):
    return train(model)


class ReadsTwice(Square):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (once,), (again,) = ctx.saved_tensors, ctx.saved_tensors
        return grads[0] * 2 * once.tanh() * (1 - again.tanh() ** 2)


@kinds.same("the same, and its backward reads `ctx.saved_tensors` twice", make=lambda _: Apply(ReadsTwice.apply))
def test_saved_tensors_read_twice(model):
    return train(model)


class Hoarder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (1 - ctx.x.tanh() ** 2)


@kinds.works(
    "a custom `autograd.Function` that keeps tensors on `ctx`",
    note="right values, and one warning with its name: memory grows",
)
@pytest.mark.parametrize("layers", [1, 0], ids=["after a layer", "alone"])
def test_function_that_hides_tensors(layers):
    x = make_input()
    hoarder = nn.Sequential(*[nn.Linear(WIDTH, WIDTH)] * layers, Apply(Hoarder.apply))
    blocks = [nn.Linear(WIDTH, WIDTH).double(), hoarder.double()]
    with pytest.warns(UserWarning, match=r"step 1 keeps tensors on ctx \(Hoarder\.x\)"):
        reversible(revcore.revnet(2), blocks, x.chunk(2, 1))
    ours = reversible(revcore.revnet(2), blocks, x.chunk(2, 1))  # a second warning would be an error
    stored = reversible(revcore.revnet(2), blocks, x.chunk(2, 1), policy=revcore.StoreAll())
    for a, b in zip(*(torch.autograd.grad(torch.cat(s).sin().sum(), x) for s in (ours, stored)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@kinds.refuses("a block that acts otherwise the second time", revcore.InversionError, "ran differently the second time")
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_other_the_second_time(refused, policy):
    calls = []
    moody = Apply(lambda x: x[:2].sin().repeat(2, 1) if calls.append(1) or len(calls) > 1 else x.sin())
    loss = ReversibleSequential(moody, policy=policy)(make_input()).pow(2).sum()
    with refused:
        loss.backward()


def nested_block(width: int) -> nn.Module:
    inner = ReversibleSequential(dropout_block(width // 2), block(width // 2), block(width // 2))
    return nn.Sequential(inner, nn.Tanh(), nn.Linear(width, width))


@kinds.same("reversible nets inside reversible nets", make=nested_block)
def test_nested(model):
    return train(model)


@kinds.same("the same, two forward passes and one backward", make=nested_block, tolerance=1e-11)
def test_nested_two_forwards(model):
    return two_forwards(model)


@kinds.same("the same, differentiated twice", make=nested_block, tolerance=1e-10)
def test_nested_double_backward(model):
    x = make_input()
    y = model(x)
    (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    g.pow(2).sum().backward()
    return x.grad


@kinds.same("functions instead of modules, with a closure over a tensor that has a graph")
def test_closure_over_a_tensor(model):
    leaf = torch.full((WIDTH,), 0.3, dtype=torch.float64, requires_grad=True)
    gate = leaf.exp()
    for i, b in enumerate(model):
        model[i] = Apply(lambda h, b=b: torch.tanh(b[0](h)) * gate)
    return train(model), leaf.grad


@kinds.refuses(
    "a tensor that a block closes over is changed in place before the backward pass",
    revcore.InversionError,
    "block of step 1 uses a tensor from outside that was changed in place after the forward pass",
    note="as for the plain network",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_closed_over_tensor_changed(refused, policy):
    gate = torch.full((1, WIDTH), 0.5, dtype=torch.float64)
    blocks = [Apply(lambda h: h.sin() * gate.squeeze(0))] * 2
    loss = ReversibleSequential(*blocks, policy=policy)(make_input()).pow(2).sum()
    gate.mul_(2)
    with refused:
        loss.backward()


@kinds.same("several streams go into a block (`Couple` with two sources)")
def test_steps_that_are_not_revnets(model):
    # the plain networks of the other tests know one source, so this one is written out here
    x = make_input(width=3 * WIDTH)
    a, b, c = x.chunk(3, 1)
    if hasattr(model, "policy"):
        program = revcore.Program([revcore.Couple(0, (1, 2)), revcore.Couple(2, (0,))], num_streams=3)
        blocks = [Apply(lambda p, q: model[0](p * q)), model[1]]
        a, b, c = reversible(program, blocks, (a, b, c), policy=model.policy)
    else:
        a = a + model[0](b * c)
        c = c + model[1](a)
    torch.cat((a, b, c), 1).pow(3).sum().backward()
    return a, b, c, x.grad
