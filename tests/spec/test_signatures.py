"""A signature tells another network from the same one, and is silent where it cannot know."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from revcore import (
    Additive,
    Bijection,
    Couple,
    Coupling,
    Momentum,
    Program,
    Repeat,
    SpecError,
    bdia,
    grouped,
    leapfrog,
    momentum_net,
    revnet,
)
from revcore.signatures import check_signature, signature


def add(x: Any, f: Any) -> Any:
    return x + f


def subtract(y: Any, f: Any) -> Any:
    return y - f


def named(name: str | None) -> Coupling:
    return Coupling.from_functions(add, subtract, name=name)


@dataclass(frozen=True)
class Own(Coupling):
    """A coupling with a number, and with code, whose ``repr`` differs from process to process."""

    rate: float
    code: Callable[[Any], Any]


SAME = {
    "itself": (revnet(3, Momentum(0.9)), revnet(3, Momentum(0.9))),
    "exact": (revnet(3, Momentum(0.9)), revnet(3, Momentum(0.9)).exact(8)),
    "a whole number": (revnet(3, Additive(1)), revnet(3)),
    "written as a loop": (Program([Repeat(Couple(0, 1), 3)]), Program([Couple(0, 1)] * 3)),
    "deeper": (revnet(3), revnet(8)),
    "functions without a name": (revnet(3, named(None)), revnet(3, Momentum(0.9))),
    "functions of one name": (revnet(3, named("mine")), revnet(3, named("mine"))),
    "own class": (revnet(1, Own(0.5, lambda x: x)), revnet(1, Own(0.5, lambda x: x))),
}
OTHER = {
    "constant": (revnet(3, Momentum(0.9)), revnet(3, Momentum(0.8)), "in step 0 the coupling is Momentum"),
    "one step's": (revnet(3, [Additive(), Momentum(0.9)]), revnet(3), r"in step 1 the coupling is Momentum"),
    "own class": (revnet(1, Own(0.5, abs)), revnet(1, Own(0.4, abs)), r"Own\(rate=0.5\) there and Own\(rate=0.4"),
    "name": (revnet(3, named("mine")), revnet(3), r"mine there and Additive\(scale=1.0\) here"),
    "streams": (revnet(6), revnet(6, num_streams=3), "the number of streams is 2 there and 3 here"),
    "split": (revnet(3), dataclasses.replace(revnet(3), split="copy"), "split is 'chunk' there and 'copy' here"),
    "merge": (revnet(3), dataclasses.replace(revnet(3), merge="last"), "merge is 'concat' there and 'last' here"),
    "output": (revnet(3), dataclasses.replace(revnet(3), output=(0, 1)), r"output is \(1, 0\) there and \(0, 1\) here"),
    "sources": (grouped(3, 1), Program([Couple(0, 1), Couple(1, 0), Couple(2, 1)], 3), "step 0 is “0 from 1, 2"),
    "combine": (Program([Couple(0, (1, 2))], 3), Program([Couple(0, (1, 2), combine="sum")], 3), "step 0 is “0 from"),
    "steps without a block": (momentum_net(2), revnet(4, [Momentum(0.9), Additive()]), "step 1 is “1 from 0, no"),
    "order": (
        Program([Bijection.permute((1, 0))]),
        Program([Bijection.permute((0, 1))]),
        r"is Permute\(order=\(1, 0\)\) there and Permute\(order=\(0, 1\)\) here",
    ),
    "leapfrog": (leapfrog(4, 0.1), leapfrog(4, 0.2), r"scale=0.2\) there and Additive\(scale=0.4\)"),
    "bdia": (bdia(3, 0.5), bdia(3, -0.5), r"in step 1 the coupling is BDIA\(gamma=0.5\)"),
    "how many": ({"a": revnet(1), "b": revnet(1)}, revnet(1), r"it had 2 reversible networks \(a, b\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_network_passes(name: str) -> None:
    one, two = SAME[name]
    check_signature(two, signature(one))
    check_signature(one, signature(two))


@pytest.mark.parametrize("name", OTHER)
def test_another_network_is_refused_with_the_first_difference(name: str) -> None:
    saved, here, words = OTHER[name]
    with pytest.raises(SpecError, match=words):
        check_signature(here, signature(saved))
    with pytest.raises(SpecError, match="these are weights of another"):
        check_signature(saved, signature(here))
    check_signature(saved, signature(saved))


def test_the_name_of_the_network_is_told() -> None:
    with pytest.raises(SpecError, match=r"^decoder: these are weights of another network: in step 0"):
        check_signature(
            {"encoder": revnet(1), "decoder": revnet(1)}, signature({"a": revnet(1), "b": revnet(1, Momentum(0.9))})
        )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: signature([revnet(1)]), "networks came as list, expected a revcore.Program"),  # type: ignore[arg-type]
        (lambda: check_signature(revnet(1), "no json"), "'no json' came as a signature, expected what"),
        (lambda: check_signature(revnet(1), "[]"), "came as a signature, expected what"),
        (lambda: check_signature(revnet(1), None), "None came as a signature"),  # type: ignore[arg-type]
        (
            lambda: check_signature(revnet(1), json.dumps({"version": 9, "networks": {}})),
            "a signature of version 9 came, expected 1: another revcore wrote it",
        ),
    ],
)
def test_what_is_no_signature_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        call()
