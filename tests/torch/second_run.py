"""Situations in which a block's second run might not be its first, each tried under every policy.

A situation gives blocks and what is done with them. The plain network does the same; ours must give the same numbers,
or an error in the words that the situation names: never other numbers without a word.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import revcore
from revcore import InversionError, SpecError
from revcore_torch import Checkpoint, Reverse, StoreAll, reversible
from tests.torch.harness import WIDTH, assert_close, make_input

Network = Callable[..., Any]
DEPTH = 4
SECOND = "did something else the second time"
POLICIES: dict[str, Any] = {
    "reverse": Reverse(),
    "last step kept": Reverse(keep_last=1),
    "anchors": Reverse(anchor_every=2),
    "operations kept": Reverse(recompute=[torch.ops.aten.tanh.default]),
    "checkpoint": Checkpoint(every=2),
    "by step": [Reverse(), StoreAll(), Checkpoint(), Reverse()],
    "exact": "exact",
}


class Setup(NamedTuple):
    """What a situation is made of, anew for each network."""

    blocks: Sequence[Any]
    step: Callable[[Network], Any] | None = None  # what is done with the network; None: two steps of training
    watched: Sequence[nn.Module] = ()  # modules beside the blocks whose gradients and buffers count


class Situation(NamedTuple):
    name: str
    make: Callable[[], Setup | Sequence[Any]]
    refused: str
    silent: bool
    policies: Sequence[str]


def plain(blocks: Sequence[Any]) -> Network:
    """Return the network written out by hand."""

    def network(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        a, b = x.chunk(2, -1)
        aux = []
        for block in blocks:
            f = block(b, *args, **kwargs)
            f, *more = f if isinstance(f, tuple) else (f,)
            aux.append(tuple(more))
            a, b = b, a + f
        y = torch.cat((a, b), -1)
        return (y, aux) if any(aux) else y

    return network


def ours(blocks: Sequence[Any], policy: Any, determinism_check: str = "values") -> Network:
    program = revcore.revnet(len(blocks))
    if policy == "exact":
        program, policy = program.exact(bits=40), Reverse()
    if isinstance(policy, list):
        policy = policy[: len(blocks)]

    def network(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = reversible(
            program, blocks, x.chunk(2, -1), *args, policy=policy, determinism_check=determinism_check, **kwargs
        )
        if isinstance(result[0], tuple):
            return torch.cat(result[0], -1), result[1]
        return torch.cat(result, -1)

    return network


def train(network: Network, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Do two steps of training."""
    seen = []
    for _ in range(2):
        x = make_input()
        y = network(x, *args, **kwargs)
        y.pow(2).sum().backward()
        seen += [y, x.grad]
    return seen


def outcome(situation: Situation, wrap: Callable[[Sequence[Any]], Network]) -> list[Tensor]:
    """Return everything that can be seen of a run from outside."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002 - the global generator is what is looked at
    setup = situation.make()
    if not isinstance(setup, Setup):
        setup = Setup(setup)
    seen = (setup.step or train)(wrap(setup.blocks))
    modules = [m for m in (*setup.blocks, *setup.watched) if isinstance(m, nn.Module)]
    seen += [p.grad for m in modules for p in m.parameters() if p.grad is not None]
    seen += [b for m in modules for b in m.buffers()]
    drawn = [torch.rand(2), torch.tensor(random.random()), torch.tensor(np.random.rand())]  # noqa: NPY002
    return [t.detach().clone().to(torch.float64) for t in (*seen, *drawn)]


def check(situation: Situation) -> None:
    expected = outcome(situation, plain)
    assert sum(t.abs().sum() for t in expected[:2]) > 0, "the situation shows nothing"
    refused = []
    for name in situation.policies:
        try:
            got = outcome(situation, lambda blocks, name=name: ours(blocks, POLICIES[name]))
        except (InversionError, SpecError, RuntimeError) as error:
            if not situation.refused or not re.search(situation.refused, str(error)):
                raise AssertionError(f"{name}: {error}") from error
            refused.append(name)
            continue
        try:
            assert_close(got, expected, 1e-9)
        except AssertionError as error:
            raise AssertionError(f"{name}: differs silently: {error}") from None
    assert not situation.refused or situation.policies[0] in refused, "nothing was refused"
    if situation.silent:
        wrong = outcome(situation, lambda blocks: ours(blocks, Reverse(), "none"))
        with pytest.raises(AssertionError, match="off by"):
            assert_close(wrong, expected, 1e-9)


SITUATIONS: list[Situation] = []


def same(name: str, policies: Sequence[str] = tuple(POLICIES)) -> Any:
    """Add a situation in which ours is the plain network."""
    return _add(name, "", False, policies)


def refused(name: str, words: str = SECOND, *, silent: bool = True, policies: Sequence[str] = tuple(POLICIES)) -> Any:
    """Add a situation that is refused, at least under the first policy; ``silent``: without the check it is wrong."""
    return _add(name, words, silent, policies)


def _add(name: str, words: str, silent: bool, policies: Sequence[str]) -> Any:
    def add(make: Any) -> Any:
        SITUATIONS.append(Situation(name, make, words, silent, policies))
        return make

    return add


def body(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).double()


class Block(nn.Module):
    """A block with a function of its own input and itself after its layers."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.body, self.function = body(), function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, self.body(x), *args, **kwargs)


def four(make: Callable[[], Any]) -> list[Any]:
    return [make() for _ in range(DEPTH)]
