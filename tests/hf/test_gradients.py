"""Every family and kind against the same network in plain PyTorch, and what is kept of it, counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import nn

from revcore import SpecError
from revcore_torch import Checkpoint, Reverse, StoreAll, is_recomputing
from revcore_torch.hf import make_reversible, stacks
from revcore_torch.hf.patch import Patch
from revcore_torch.memory import LiveBytes
from tests.helpers import tree_error
from tests.hf.models import FAMILIES, by_hand, inputs, make
from tests.tiers import product

KINDS: dict[str, dict[str, Any]] = {"momentum": {"beta": 0.5}, "leapfrog": {"h": 0.5}, "revnet": {}}


def trained(model: Any, family: str) -> dict[str, Any]:
    """Return loss, logits and gradients of one step, dropout included."""
    model.zero_grad()
    torch.manual_seed(2)
    out = model(**inputs(family))
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients}


def name_of_depths(value: Any) -> str:
    return value if isinstance(value, str) else f"{value[-1]} layers"


def set_policy(model: nn.Module, policy: Any) -> None:
    for stack in stacks(model):
        stack.policy = policy


# A family is how its layers are called, a kind what is made of what they return: a tensor of BERT's, a tuple of T5's
@pytest.mark.parametrize(
    ("family", "kind"),
    product(FAMILIES, KINDS, fast=lambda family, kind: kind == "momentum" or family in ("bert", "t5")),
)
def test_gradients_are_those_of_the_network_written_by_hand(family: str, kind: Any) -> None:
    model = make(family)
    reference = copy.deepcopy(model)
    make_reversible(model, kind, **KINDS[kind])
    for stack in stacks(model):
        by_hand(reference.get_submodule(stack.name), kind, *(KINDS[kind].values() or (0.0,)))
    expected = trained(reference, family)
    assert any("relative_attention_bias" in name for name in expected) == (family == "t5")
    for policy in (Reverse(), StoreAll(), Checkpoint(), Reverse(keep_last=1, anchor_every=1), [Reverse()] * 3):
        set_policy(model, policy)
        found = trained(model, family)
        assert found.keys() == expected.keys()
        assert tree_error(found, expected) < 1e-9, policy


def test_a_wrong_form_by_hand_is_found() -> None:
    model, reference = make("gpt2"), make("gpt2")
    make_reversible(model, "momentum", beta=0.5)
    by_hand(reference.transformer.h, "momentum", 0.4)
    assert tree_error(trained(model, "gpt2"), trained(reference, "gpt2")) > 1e-3


@pytest.mark.parametrize(
    ("family", "kind"), product(["llama", "bert", "t5"], ["momentum", "bdia"], fast=lambda family, _: family != "llama")
)
def test_exact_gradients_are_store_alls_bit_for_bit(family: str, kind: Any) -> None:
    exact = True if kind == "momentum" else None
    model = make_reversible(make(family, dtype=torch.float32), kind, exact=exact)
    found = {}
    for policy in (StoreAll(), Reverse(), Reverse(keep_last=1), Checkpoint()):
        set_policy(model, policy)
        found[str(policy)] = trained(model, family)
    expected = found[str(StoreAll())]
    for each in found.values():
        assert each.keys() == expected.keys()
        assert all(torch.equal(each[name], expected[name]) for name in expected)


def held(family: str, depth: int, kind: Any, policy: Any, **options: Any) -> int:
    """Return the bytes that live between the forward and the backward pass."""
    model = make(family, depth, torch.float32)
    if kind:
        make_reversible(model, kind, policy=policy, **options)
    given = inputs(family, torch.float32)
    with LiveBytes() as memory:
        out = model(**given)
        live = memory.live
        out.loss.backward()
    return live


@pytest.mark.parametrize(
    ("family", "depths"),
    product(FAMILIES, [(2, 6), (2, 8, 32)], fast=lambda _, depths: len(depths) == 2, name=name_of_depths),
)
def test_what_is_held_does_not_grow_with_depth(family: str, depths: tuple[int, ...]) -> None:
    assert len({held(family, depth, "momentum", Reverse(), beta=0.9) for depth in depths}) == 1
    shallow, deep = (held(family, depth, "", None) for depth in depths[:2])
    assert deep > 2 * shallow


@pytest.mark.parametrize("kind", ["leapfrog", "revnet"])
def test_nor_with_another_kind(kind: Any) -> None:
    assert len({held("bert", depth, kind, Reverse()) for depth in (2, 6)}) == 1


def test_bdia_keeps_one_bit_an_element_and_layer() -> None:
    shallow, deep = (held("bert", depth, "bdia", Reverse()) for depth in (2, 6))
    elements, checksum = 2 * 7 * 16, 4
    assert deep - shallow == 4 * (elements // 8 + checksum)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_each_layer_runs_twice_and_its_hooks_once(family: str) -> None:
    model = make_reversible(make(family), "momentum", beta=0.5)
    layers = [m for m in model.modules() if isinstance(getattr(m.forward, "__self__", None), Patch)]
    inner: list[bool] = []
    outer: list[int] = []
    for layer in layers:
        first = next(m for m in layer.modules() if isinstance(m, nn.Dropout))
        first.register_forward_hook(lambda *_: inner.append(is_recomputing()))
        layer.register_forward_hook(lambda *_: outer.append(1))
    trained(model, family)
    per_run = inner.count(False) // len(layers)
    assert inner.count(True) == inner.count(False) == per_run * len(layers)
    assert len(outer) == len(layers)


class Deep(nn.Module):
    """Not a Hugging Face model at all: a loop over a list of layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(("depth", "beta"), [(130, 0.5), pytest.param(500, 0.9, marks=pytest.mark.long)])
def test_a_momentum_net_of_many_layers_is_finite(depth: int, beta: float) -> None:
    """The streams scaled by β⁻ⁿ, as revlib had them, leave float32 at n = 128 for β = 0.5, and at 842 for β = 0.9, and
    its products before."""
    model = make_reversible(Deep(depth), "momentum", beta=beta, layers="layers", exact=True)
    x = torch.randn(2, 4, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    assert all(t is not None and t.isfinite().all() for t in (y, x.grad, *(p.grad for p in model.parameters())))


def test_bdia_draws_its_sign_for_each_forward_pass() -> None:
    model, x = make_reversible(Deep(3), "bdia", layers="layers"), torch.randn(2, 4)
    assert len({tuple(model(x).flatten().tolist()) for _ in range(16)}) == 2


class Named(nn.Module):
    """As torchtitan and nanoGPT write it: layers by name, and inside of a dictionary that is never called."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleDict({str(i): nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for i in range(3)})
        self.parts = nn.ModuleDict({"layers": layers})
        self.stop = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers: Any = self.parts["layers"]
        for layer in list(layers.values())[: self.stop]:
            x = layer(x)
        return x


def test_a_dictionary_of_layers() -> None:
    x, results = torch.randn(2, 4, dtype=torch.float64), []
    for policy in (Reverse(), StoreAll()):
        torch.manual_seed(0)
        model = make_reversible(Named().double(), "momentum", beta=0.5, layers="parts.layers", policy=policy)
        model(x).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(r is not None and torch.allclose(r, s, rtol=1e-12) for r, s in zip(*results, strict=True))
    model.stop = 2
    with pytest.raises(SpecError, match="layers 0 to 1 of 3 were called"):
        model(x)
