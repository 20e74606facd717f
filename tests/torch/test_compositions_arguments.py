"""What goes into blocks beside their streams, and what comes out of them beside ``f``."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore
from revcore_torch import Checkpoint, Reverse, ReversibleSequential, StoreAll, reversible
from tests.plain.pytorch import Plain
from tests.torch.harness import EVERYTHING, WIDTH, Apply, block, make_input, run_streams, train
from tests.torch.registry import Section

given = Section("Arguments of blocks")


def leaf(value: float = 0.3, *shape: int) -> Tensor:
    return torch.full(shape or (WIDTH,), value, dtype=torch.float64, requires_grad=True)


class WithContext(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Any = None, scale: Any = None, *, gate: Any = None) -> Tensor:
        h = self.linear(x)
        h = torch.tanh(h if context is None else h * context)
        h = h if gate is None else h * gate
        return h if scale is None else h * scale


class From(nn.Module):
    """A block whose argument is a tree; ``tensors`` takes the tensors out of it."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.linear, self.tensors = nn.Linear(WIDTH, WIDTH), tensors

    def forward(self, x: Tensor, tree: Any) -> Tensor:
        return torch.tanh(self.linear(x)) * sum(self.tensors(tree))


@given.same("a leaf tensor shared by all blocks", make=WithContext)
def test_shared_leaf(model):
    context = leaf()
    return train(model, context), context.grad


@given.same("a tensor with a graph (non-leaf) shared by all blocks", make=WithContext)
def test_shared_non_leaf(model):
    a, scale = leaf(), leaf(1.5, 1)
    return train(model, a.exp(), scale=scale.sin()), a.grad, scale.grad


@given.same("a shared tensor that the loss uses too", make=WithContext)
def test_shared_and_used_in_the_loss(model):
    a, x = leaf(), make_input()
    context = a.exp()
    (model(x, context).pow(2).sum() + context.pow(3).sum()).backward()
    return a.grad, x.grad


@given.same("a shared tensor made by another trained module (an encoder)", make=WithContext)
def test_shared_from_an_encoder(model):
    torch.manual_seed(1)
    encoder = nn.Linear(3, WIDTH).double()
    results = train(model, encoder(torch.ones(1, 3, dtype=torch.float64)).sigmoid())
    return results, [p.grad for p in encoder.parameters()]


@given.same("only the argument requires a gradient", make=WithContext)
def test_only_the_argument_requires_gradient(model):
    model.requires_grad_(False)
    a = leaf()
    model(make_input().detach(), a.exp()).pow(2).sum().backward()
    return a.grad


@given.same("the argument is the input itself, or a part of it", make=WithContext)
def test_argument_is_the_input(model):
    x = make_input()
    model(x, x[:, :WIDTH]).pow(2).sum().backward()
    return x.grad


@given.same("the argument is a parameter of the model", make=WithContext)
def test_argument_is_a_parameter(model):
    return train(model, model[0].linear.bias)


@given.same("per-step arguments (`layerwise_args_kwargs`), non-leaf", make=WithContext, tolerance=1e-11)
def test_layerwise(model):
    leaves = [leaf(0.3 + i / 5) for i in range(len(model))]
    pairs = [((a.cos(),), {"gate": a.exp()}) for a in leaves]
    return train(model, layerwise_args_kwargs=pairs), [a.grad for a in leaves]


@given.same("common and per-step arguments together", make=WithContext, tolerance=1e-11)
def test_common_and_layerwise(model):
    a, leaves = leaf(0.5), [leaf(0.3 + i / 5) for i in range(len(model))]
    pairs = [((), {"gate": b}) for b in leaves]
    return train(model, a.exp(), layerwise_args_kwargs=pairs), a.grad, [b.grad for b in leaves]


@given.same("per-step tables that are views of one parameter", make=WithContext)
def test_layerwise_views(model):
    table = torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH).requires_grad_()
    return train(model, layerwise_args_kwargs=[((row,), {}) for row in table]), table.grad


@given.same("tensors nested in a dict and a list", make=lambda _: From(lambda tree: [tree["a"], *tree["more"][:1]]))
def test_nested_arguments(model):
    a, b = leaf(), leaf(0.7)
    return train(model, {"a": a.exp(), "more": [b.sin(), "text", None, 3]}), a.grad, b.grad


Pairing = namedtuple("Pairing", ["a", "b"])


@given.same("tensors in a named tuple", make=lambda _: From(lambda tree: [tree.a, tree.b]))
def test_named_tuple(model):
    a, b = leaf(), leaf(0.7)
    return train(model, Pairing(a.exp(), b.sin())), a.grad, b.grad


@dataclasses.dataclass
class Context:
    a: Tensor
    steps: int = 2


@given.same("a tensor in a dataclass", make=lambda _: From(lambda tree: [tree.a] * tree.steps))
def test_dataclass(model):
    a = leaf()
    return train(model, Context(a.exp())), a.grad


@given.same(
    "arguments that are not tensors: numbers, text, `None`, functions",
    make=lambda _: From(lambda tree: [tree[0], tree[3](tree[1])]),
)
def test_arguments_without_tensors(model):
    return train(model, (0.5, 2, None, lambda v: v**3, "text"))


@given.same(
    "integer and boolean tensors (positions, masks)", make=lambda _: From(lambda tree: [tree[0][tree[1]], tree[2]])
)
def test_integer_arguments(model):
    table = leaf(0.3, 9)
    index = torch.arange(WIDTH)
    return train(model, (table.cumsum(0), index, index > 2)), table.grad


@given.same("an attention mask given as keyword", make=WithContext)
def test_keyword_mask(model):
    return train(model, gate=torch.ones(4, WIDTH, dtype=torch.float64).triu())


@given.refuses(
    "a block writes into its tensor argument",
    revcore.SpecError,
    "a block changed one of its arguments in place, so it cannot run again",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_argument_written(refused, policy):
    def count(x: Tensor, counter: Tensor) -> Tensor:
        counter += 1
        return x

    with refused:
        reversible(revcore.revnet(1), [count], make_input().chunk(2, 1), torch.zeros(1), policy=policy)


@given.refuses(
    "an argument is changed in place before the backward pass",
    RuntimeError,
    "has been modified by an inplace operation",
    note="PyTorch's own version check",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_argument_changed(refused, policy):
    context = torch.ones(WIDTH, dtype=torch.float64)
    model = ReversibleSequential(WithContext(), WithContext(), policy=policy).double()
    loss = model(make_input(), context).pow(2).sum()
    context.mul_(2)
    with refused:
        loss.backward()


class Appends(nn.Module):
    """Reads what the blocks before it left in a list, and leaves something for those after it."""

    def __init__(self, width: int, appends: bool = True) -> None:
        super().__init__()
        self.linear, self.appends = nn.Linear(width, width), appends

    def forward(self, x: Tensor, memory: Any) -> Tensor:
        kept = memory.items if hasattr(memory, "items") else memory
        h = torch.tanh(self.linear(x + sum(kept)))
        if self.appends:
            kept.append(h.detach())
        return h


class Cache:
    def __init__(self) -> None:
        self.items: list[Tensor] = []


class Layered:
    """A cache of caches, as transformers has it."""

    def __init__(self) -> None:
        self.layers = [Cache()]

    @property
    def items(self) -> list[Tensor]:
        return self.layers[0].items


CHANGED = "a block changed what an argument holds (a list, a dict, or an object with tensors)"


@given.refuses("blocks append to a list that they got as argument", revcore.SpecError, CHANGED)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_list_grows(refused, policy):
    given_before_a_change(refused, policy, [])


@given.refuses("blocks append to an object that they got as argument (a key-value cache)", revcore.SpecError, CHANGED)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
@pytest.mark.parametrize("make", [Cache, Layered])
def test_cache_grows(refused, make, policy):
    given_before_a_change(refused, policy, make())


def given_before_a_change(refused: Any, policy: Any, memory: Any) -> None:
    model = ReversibleSequential(*[Appends(WIDTH) for _ in range(3)], policy=policy).double()
    with refused:
        model(make_input(), memory)


@given.refuses("a block counts in a dict that it got as argument", revcore.SpecError, CHANGED)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_dict_counts(refused, policy):
    def count(x: Tensor, state: dict[str, int]) -> Tensor:
        state["calls"] += 1
        return x.sin() / state["calls"]

    with refused:
        ReversibleSequential(Apply(count), Apply(count), policy=policy)(make_input(), {"calls": 0})


@given.same(
    "blocks read an object that they got as argument (a key-value cache, filled before)",
    make=lambda w: Appends(w, False),
)
def test_cache_read(model):
    cache = Cache()
    cache.items = [leaf().exp(), leaf(0.7)]
    return train(model, cache)


@given.works("blocks append to a cache under `StoreAll()`", note="and read it")
def test_cache_under_store_all():
    grads = []
    for make in (lambda *blocks: ReversibleSequential(*blocks, policy=StoreAll()), Plain):
        torch.manual_seed(0)
        model = make(*[Appends(WIDTH) for _ in range(3)]).double()
        grads.append(train(model, Cache()))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@given.same("a key-value cache under `no_grad` (generation)", make=Appends)
def test_cache_in_generation(model):
    cache = Cache()
    with torch.no_grad():
        y = [model(make_input(), cache), model(make_input(), cache)]
    return y, cache.items


# --- extra outputs ----------------------------------------------------------------------------------------------------

extra = Section("Extra outputs of blocks")


class WithAux(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.linear(x))
        return h, {"loss": (h**2).mean(), "name": "layer", "seen": [h.detach()]}, None


class Returns(nn.Module):
    """Returns ``h`` and whatever ``more`` makes of it."""

    def __init__(self, width: int, more: Any) -> None:
        super().__init__()
        self.linear, self.dropout, self.more = nn.Linear(width, width), nn.Dropout(0.2), more

    def forward(self, x: Tensor) -> Any:
        h = self.dropout(torch.tanh(self.linear(x)))
        return h, *self.more(h)


def returning(more: Any) -> Any:
    return lambda width: Returns(width, more)


@extra.same("auxiliary losses with their gradients, in a dict", make=WithAux)
def test_auxiliary_losses(model):
    x = make_input()
    y, aux = model(x)
    (y.pow(2).sum() + sum(a[0]["loss"] * (i + 1) for i, a in enumerate(aux))).backward()
    return x.grad, y, aux


@extra.same("the auxiliary losses alone; the output is dropped", make=WithAux)
def test_auxiliary_losses_alone(model):
    x = make_input()
    aux = model(x)[1]
    (aux[3][0]["loss"] + aux[1][0]["loss"]).backward()
    return x.grad


@extra.same("the auxiliary loss of the first block alone", make=WithAux)
def test_auxiliary_loss_of_the_first(model):
    x = make_input()
    model(x)[1][0][0]["loss"].backward()
    return x.grad


@extra.same("auxiliary losses, differentiated twice", make=WithAux, tolerance=1e-11)
def test_auxiliary_double_backward(model):
    x = make_input()
    y, aux = model(x)
    (g,) = torch.autograd.grad(y.sum() + sum(a[0]["loss"] for a in aux), x, create_graph=True)
    (g.pow(2).sum() + aux[2][0]["loss"]).backward()
    return x.grad


@extra.same("auxiliary losses backward first, the output's loss later", make=WithAux)
def test_auxiliary_first(model):
    x = make_input()
    y, aux = model(x)
    torch.stack([a[0]["loss"] for a in aux]).sum().backward(retain_graph=True)
    y.pow(2).sum().backward()
    return x.grad


class AttentionWeights(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, 0.1, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, seen = self.attention(x[None], x[None], x[None], need_weights=True)
        return y[0], seen[0]


@extra.same("attention weights, with a loss on them", make=AttentionWeights)
def test_attention_weights(model):
    x = make_input()
    y, aux = model(x)
    (y.pow(2).sum() + sum((a * a.clamp_min(1e-9).log()).sum() for (a,) in aux)).backward()
    return x.grad, aux


@extra.same("keys and values for a cache, handed out", make=returning(lambda h: [(h[:2], h[2:])]))
def test_keys_and_values(model):
    x = make_input()
    y, aux = model(x)
    cache = torch.stack([torch.cat(pair) for (pair,) in aux])
    (y.sum() + cache.pow(2).sum()).backward()
    return x.grad, cache


@extra.same(
    "outputs that are not tensors: numbers, text, `None`, a set",
    make=returning(lambda h: [len(h), "text", None, {"a"}]),
)
def test_outputs_without_tensors(model):
    x = make_input()
    y, aux = model(x)
    y.pow(2).sum().backward()
    return y, x.grad, [[repr(item) for item in a] for a in aux]


@extra.same("a named tuple, and lists in lists", make=returning(lambda h: [Pairing(h.mean(), [[h.sum()], []])]))
def test_nested_outputs(model):
    x = make_input()
    y, aux = model(x)
    (y.sum() + sum(a.a * 2 + a.b[0][0] for (a,) in aux)).backward()
    return x.grad, [type(a).__name__ for (a,) in aux]


@extra.same(
    "a dataclass with a tensor that has a graph, and a loss on it", make=returning(lambda h: [Context(h.mean())])
)
def test_dataclass_output(model):
    x = make_input()
    y, aux = model(x)
    (y.pow(2).sum() + sum(a.a for (a,) in aux)).backward()
    return x.grad


@extra.same("the same, the loss on it alone and the output dropped", make=returning(lambda h: [Context(h.mean())]))
def test_dataclass_output_alone(model):
    x = make_input()
    aux = model(x)[1]
    torch.stack([a.a for (a,) in aux]).sum().backward()
    return x.grad


@extra.same("integer outputs (chosen experts), detached outputs", make=returning(lambda h: [h.argmax(1), h.detach()]))
def test_integer_outputs(model):
    x = make_input()
    y, aux = model(x)
    y.pow(2).sum().backward()
    return x.grad, aux


@extra.same("the block's `f` itself once more, and its input")
def test_output_is_the_stream(model):
    for i, b in enumerate(model):
        model[i] = Twice(b)
    x = make_input()
    y, aux = model(x)
    (y.pow(2).sum() + sum((f * x_in).sum() for f, x_in in aux)).backward()
    return x.grad


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = self.inner(x)
        return f, f, x


@extra.same("only some blocks return more")
def test_some_blocks_return_more(model):
    model[1], model[3] = Returns(WIDTH, lambda h: [h.mean()]).double(), Returns(WIDTH, lambda h: [h.sum()]).double()
    x = make_input()
    y, aux = model(x)
    (y.sum() + aux[1][0] + aux[3][0]).backward()
    return x.grad


@extra.same("an extra output is changed in place", make=returning(lambda h: [h * 2]))
def test_extra_output_changed_in_place(model):
    x = make_input()
    y, aux = model(x)
    total = aux[1][0] + 0
    total.relu_()
    (y.sum() + total.pow(2).sum()).backward()
    return x.grad


@extra.refuses(
    "an output stream or extra output of the engine is changed in place, with gradients",
    RuntimeError,
    "is a view and is being modified inplace",
    note="`ReversibleSequential` joins its streams in a new tensor, which may be changed; `clone()` the others",
)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_output_stream_changed_in_place(refused, policy):
    streams = reversible(
        revcore.revnet(2), [block().double(), block().double()], make_input().chunk(2, 1), policy=policy
    )
    with refused:
        streams[1].relu_()


@extra.same("streams in and out of the functional form", settings=EVERYTHING)
def test_functional(model):
    x = make_input()
    streams = run_streams(model, x.chunk(model.num_streams, 1))
    torch.stack([(i + 1) * s.pow(2).sum() for i, s in enumerate(streams)]).sum().backward()
    return streams, x.grad
