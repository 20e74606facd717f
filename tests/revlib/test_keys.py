"""State dicts by the key rules of revlib 1.0.1 and 1.7.2 load into the modules of today, strictly."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revcore_torch as revlib
from revcore_torch.utils import MomentumNetStem, module_list_to_momentum_net, momentum_net

WIDTH = 4


def of_1_0_1(key: str, order: list[str]) -> str:
    name, _, rest = key.partition(".")
    return f"stem.{order.index(name)}.wrapped_module.{rest}"


def of_1_7_2(key: str, order: list[str]) -> str:
    name, _, rest = key.partition(".")
    i = order.index(name)
    return f"{i // 2}-{i % 2}.wrapped_module.wrapped_module.{rest}"


VERSIONS = pytest.mark.parametrize("version", [of_1_0_1, of_1_7_2])
Version = Callable[[str, list[str]], str]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh())


def network(depth: int = 5, named: bool = False) -> revlib.ReversibleSequential:
    blocks = [block() for _ in range(depth)]
    if named:
        return revlib.ReversibleSequential(OrderedDict((f"layer-{i}", b) for i, b in enumerate(blocks)))
    return revlib.ReversibleSequential(*blocks)


def saved(model: nn.Module, version: Version, prefix: str = "") -> dict[str, Any]:
    """Return what revlib would have saved of the same weights."""
    order = list(model._modules)
    return {prefix + version(key, order): value for key, value in model.state_dict().items()}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@VERSIONS
@pytest.mark.parametrize("depth", [1, 4, 5, 23])
@pytest.mark.parametrize("named", [False, True])
def test_loads_strictly(version: Version, depth: int, named: bool) -> None:
    theirs, ours = network(depth), network(depth, named)
    state = saved(theirs, version)
    before = dict(state)
    assert ours.load_state_dict(state) == ([], [])
    assert state == before
    x = torch.randn(3, 2 * WIDTH)
    assert torch.equal(theirs.eval()(x), ours.eval()(x))
    with pytest.raises(RuntimeError, match="Missing key"):  # the names are those of today, and not revlib's
        nn.Module.load_state_dict(nn.Sequential(*copy.deepcopy([*ours])), state)  # type: ignore[arg-type]


@VERSIONS
def test_loads_inside_a_larger_model(version: Version) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"stem": nn.Linear(3, WIDTH), "body": nn.ModuleList([network(2), network(3)])})

    theirs, ours = model(), model()
    state: dict[str, Any] = {f"stem.{key}": value for key, value in theirs["stem"].state_dict().items()}  # type: ignore[index]
    for i, body in enumerate(theirs["body"]):  # type: ignore[index, arg-type]
        state |= saved(body, version, f"body.{i}.")
    assert ours.load_state_dict(state) == ([], [])
    assert_same(ours, theirs)


def test_momentum_nets_load() -> None:
    """Their blocks stand at the even places; revlib's other blocks have no weights."""
    theirs = momentum_net(*[block() for _ in range(3)])
    state = saved(theirs, of_1_7_2)
    assert "2-0.wrapped_module.wrapped_module.wrapped_module.0.weight" in state
    ours = momentum_net(*[block() for _ in range(3)])
    assert ours.load_state_dict(state) == ([], [])
    assert_same(ours, theirs)
    layers = module_list_to_momentum_net(nn.ModuleList([block() for _ in range(2)]))
    assert next(iter(layers.state_dict())) == (
        "0.wrapped_modules.0.wrapped_module.wrapped_module.wrapped_module.0.weight"  # revlib's own
    )


@VERSIONS
def test_assign_and_not_strict(version: Version) -> None:
    theirs, ours = network(3), network(3)
    state = saved(theirs, version)
    ours.load_state_dict(state, assign=True)
    assert_same(ours, theirs)
    gone = next(key for key in state if "running_mean" in key)
    del state[gone]
    missing, unexpected = network(3).load_state_dict(state, strict=False)
    assert (len(missing), unexpected) == (1, [])


@VERSIONS
def test_errors_name_the_keys(version: Version) -> None:
    state = saved(network(4), version)
    last = next(key for key in state if re.match(r"stem\.3\.|1-1\.", key))
    with pytest.raises(RuntimeError, match=re.escape(f'Unexpected key(s) in state_dict: "{last}"')):
        network(3).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "4\.0\.weight"'):
        network(5).load_state_dict(state)
    wide = {key: torch.zeros(7) if key.endswith("0.bias") else value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.0\.bias"):
        network(4).load_state_dict(wide)


class Stem(nn.Module):
    """A block whose own names are like revlib's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleList([Wrapped()])

    def forward(self, x: Tensor) -> Tensor:
        return self.stem[0](x)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wrapped_module = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped_module(x)


def test_names_of_today_stay_as_they_are() -> None:
    blocks: dict[str, nn.Module] = OrderedDict(stem=nn.Sequential(Wrapped()), other=Stem())
    blocks["0-0"] = MomentumNetStem(Wrapped())
    model = revlib.ReversibleSequential(blocks)
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        nn.init.normal_(p)
    assert twin.load_state_dict(model.state_dict()) == ([], [])
    assert_same(twin, model)


@VERSIONS
def test_blocks_whose_names_are_like_revlibs(version: Version) -> None:
    theirs, ours = (revlib.ReversibleSequential(Stem(), Stem(), Wrapped()) for _ in range(2))
    assert ours.load_state_dict(saved(theirs, version)) == ([], [])
    assert_same(ours, theirs)
