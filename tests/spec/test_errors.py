"""Every way to say a thing wrongly, and the words that it is refused with: what came, and what was expected."""

# pyright: reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import revcore
from revcore import (
    Additive,
    Affine,
    Anchor,
    Bijection,
    Chain,
    Checkpoint,
    Couple,
    Coupling,
    MemoryBudget,
    Momentum,
    Program,
    Repeat,
    Reverse,
    SpecError,
    StoreAll,
    grouped,
    leapfrog,
    momentum_net,
    reference,
    reversible_columns,
    revnet,
)
from revcore.policy import Segment, check_policy, segments
from revcore.step import Permute, SpaceToDepth

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    # couplings
    "scale 0": (lambda: Additive(0), "Additive: scale came as 0, but must be a finite number other than 0"),
    "scale nan": (lambda: Additive(math.nan), "Additive: scale came as nan, but must be a finite number"),
    "scale inf": (lambda: Additive(math.inf), "Additive: scale came as inf"),
    "scale True": (lambda: Additive(True), "Additive: scale came as True"),
    "scale str": (lambda: Additive("1"), "Additive: scale came as '1'"),
    "beta 0": (lambda: Momentum(0), "Momentum: beta came as 0, but must lie strictly between 0 and 1"),
    "beta 1": (lambda: Momentum(1), "Momentum: beta came as 1, but must lie strictly between"),
    "beta -1": (lambda: Momentum(-0.1), "Momentum: beta came as -0.1"),
    "beta nan": (lambda: Momentum(math.nan), "Momentum: beta came as nan"),
    "beta None": (lambda: Momentum(None), "Momentum: beta came as None"),
    "no inverse": (
        lambda: Coupling.from_functions(max, None),
        "from_functions: inverse came as None, but must be a function: a coupling needs both",
    ),
    "no forward": (lambda: Coupling.from_functions(1, max), "from_functions: forward came as 1, but must be"),
    # steps
    "target -1": (lambda: Couple(-1, 1), "Couple: target came as -1, but streams are counted 0, 1, 2"),
    "target 0.5": (lambda: Couple(0.5, 1), "Couple: target came as 0.5"),
    "target True": (lambda: Couple(True, 0), "Couple: target came as True"),
    "source str": (lambda: Couple(0, ("1",)), "Couple: sources came as '1'"),
    "source is target": (lambda: Couple(0, 0), r"sources came as \(0,\) with target 0, but must name at least one"),
    "source twice": (lambda: Couple(0, (1, 1)), r"sources came as \(1, 1\) with target 0"),
    "no source": (lambda: Couple(0, ()), r"sources came as \(\) with target 0"),
    "coupling str": (
        lambda: Couple(0, 1, "add"),
        "coupling came as 'add', expected a revcore.Coupling: write Additive",
    ),
    "coupling class": (lambda: Couple(0, 1, Affine), "coupling came as <class .*Affine'>, expected a revcore.Coupling"),
    "combine": (lambda: Couple(0, 1, combine="cat"), "combine came as 'cat', expected 'args' or 'sum'"),
    "no block, affine": (lambda: Couple(0, 1, Affine(), block=False), "block=False needs a coupling of one output"),
    "no block, two args": (lambda: Couple(0, (1, 2), block=False), "one source or combine='sum'"),
    "permute": (lambda: Bijection.permute((0, 2)), r"Permute: order came as \(0, 2\), expected each of 0 … 1 once"),
    "permute twice": (lambda: Permute((0, 0)), r"Permute: order came as \(0, 0\)"),
    "factor": (lambda: Bijection.space_to_depth(0), "SpaceToDepth: factor came as 0, but must be a whole number"),
    "factor half": (lambda: SpaceToDepth(0.5), "SpaceToDepth: factor came as 0.5"),
    "channel axis": (lambda: SpaceToDepth(2, 2), r"channel_axis came as 2, expected 1 \(NCHW\) or -1 \(NHWC\)"),
    "image": (lambda: SpaceToDepth(2)(np.ones((1, 1, 3, 4))), "an image of 3 × 4 does not part into patches of 2 × 2"),
    "flat image": (lambda: SpaceToDepth(2)(np.ones((3, 4))), r"a stream has shape \(3, 4\), expected four axes"),
    "channels": (lambda: SpaceToDepth(2, inverse=True)(np.ones((1, 3, 1, 1))), "3 channels do not unfold into"),
    "half a bijection": (
        lambda: Bijection(max),
        "forward came as <built-in function max> and inverse as None, expected two",
    ),
    "bijection of text": (
        lambda: Bijection("a", "b"),
        "forward came as 'a' and inverse as 'b', expected two functions",
    ),
    "chain of none": (lambda: Chain(None), "Chain: steps came as None, expected a sequence of steps"),
    "chain of text": (
        lambda: Chain(["Couple"]),
        r"Chain: step 0 came as 'Couple' \(str\), expected a Couple, Bijection",
    ),
    "chain of class": (lambda: Chain((Anchor(), Anchor)), r"Chain: step 1 came as .* \(type\)"),
    "repeat 0": (lambda: Repeat(Anchor(), 0), "Repeat: n came as 0, but must be a whole number of at least 1"),
    "repeat True": (lambda: Repeat(Anchor(), True), "Repeat: n came as True"),
    "repeat a list": (lambda: Repeat([Anchor()], 2), r"Repeat: step 0 came as \[Anchor\(\)\] \(list\)"),
    # programs
    "one stream": (lambda: Program((), 1), "num_streams came as 1, but a reversible network needs at least 2"),
    "2.0 streams": (lambda: Program((), 2.0), "num_streams came as 2.0"),
    "out of range": (lambda: Program([Couple(0, 2)]), r"step 0 is Couple\(.*but there are 2 streams \(0 … 1\): raise"),
    "deep out of range": (
        lambda: Program([Anchor(), Repeat(Chain([Couple(2, 0)]), 2)]),
        r"step 1 is Couple\(target=2.*but there are 2 streams",
    ),
    "permutes too many": (
        lambda: Program([Bijection.permute((2, 0, 1))]),
        "step 0 permutes 3 streams, but there are 2",
    ),
    "output": (lambda: Program((), 3, (0, 1)), r"output came as \(0, 1\), expected each of the 3 streams once"),
    "split": (lambda: Program((), split="half"), "split came as 'half', expected one of 'chunk', 'copy', 'zeros'"),
    "merge": (lambda: Program((), merge="first"), "merge came as 'first', expected one of 'concat', 'mean'"),
    "same_shape": (lambda: Program((), same_shape=None), "same_shape came as None, expected True or False"),
    # builders
    "depth -1": (lambda: revnet(-1), "revnet: depth came as -1, but must be a whole number of at least 0"),
    "depth 1.5": (lambda: revnet(1.5), "revnet: depth came as 1.5"),
    "couplings of text": (lambda: revnet(2, ["add"]), "coupling came as 'add'"),
    "one stream net": (lambda: revnet(2, num_streams=1), "revnet: num_streams came as 1, but must be .* at least 2"),
    "leapfrog h": (lambda: leapfrog(2, 0), "Additive: scale came as 0"),
    "momentum depth": (lambda: momentum_net(True), "momentum_net: depth came as True"),
    "momentum beta": (lambda: momentum_net(2, 1.0), "Momentum: beta came as 1.0"),
    "groups": (lambda: grouped(1, 2), "grouped: groups came as 1, but must be a whole number of at least 2"),
    "grouped depth": (lambda: grouped(2, "2"), "grouped: depth came as '2'"),
    "columns": (lambda: reversible_columns(-1), "reversible_columns: columns came as -1"),
    "levels": (lambda: reversible_columns(2, 1), "reversible_columns: levels came as 1, but must be .* at least 2"),
    # policies
    "anchor_every": (
        lambda: Reverse(0),
        r"Reverse: anchor_every came as 0, but must be a whole number of at least 1 \(of steps\)",
    ),
    "anchor_every 2.0": (lambda: Reverse(2.0), "Reverse: anchor_every came as 2.0"),
    "keep_last": (
        lambda: Reverse(keep_last=-1),
        "Reverse: keep_last came as -1, but must be a whole number of at least 0",
    ),
    "every": (lambda: Checkpoint(0), "Checkpoint: every came as 0, but must be a whole number of at least 1"),
    "every True": (lambda: Checkpoint(True), "Checkpoint: every came as True"),
    "fraction 30": (
        lambda: MemoryBudget(fraction=30),
        "MemoryBudget: fraction came as 30, expected a number more than 0 and at most 1",
    ),
    "fraction 0": (lambda: MemoryBudget(fraction=0), "MemoryBudget: fraction came as 0"),
    "policy text": (
        lambda: check_policy("reverse"),
        r"policy came as 'reverse' \(str\), expected an instance of Reverse",
    ),
    "policy class": (
        lambda: check_policy(StoreAll),
        r"policy came as <class .*StoreAll'> \(type\), expected an instance",
    ),
    "policy none": (lambda: check_policy(None), r"policy came as None \(NoneType\)"),
    # laws
    "check a pair": (lambda: revcore.check_coupling((max, min)), "check_coupling: came .*expected a revcore.Coupling"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_it_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_spec_errors_are_value_errors() -> None:
    assert issubclass(SpecError, ValueError)
    assert issubclass(revcore.InversionError, RuntimeError)


def test_a_couple_refuses_a_block_that_returns_too_little() -> None:
    step = Couple(0, 1, Affine())
    for output, came in ((np.ones(2), "one ndarray"), ((np.ones(2),), "a tuple of 1"), (None, "one NoneType")):
        with pytest.raises(
            SpecError, match=f"Affine takes 2 arrays of its block's output, but the block returned {came}"
        ):
            step.split(output, ())


def test_each_array_of_a_block_keeps_its_streams_shape() -> None:
    streams = np.ones((2, 3)), np.ones((2, 3))
    for block in (lambda x: (x[:, :1], x), lambda x: (x, x[:, :1])):
        with pytest.raises(SpecError, match=r"block 0 returned shape \(2, 1\), but the stream .* has shape \(2, 3\)"):
            reference.forward(revnet(1, Affine()), [block], streams)


# --- segments ---------------------------------------------------------------------------------------------------------


def cut(invertible: str, policy: revcore.Policy) -> str:
    """Segments as text: r, c and s for reverse, checkpoint and store, a bar between segments."""
    found = segments([c == "+" for c in invertible], policy)
    assert [(s.start, s.stop) for s in found] == list(
        zip([0] * bool(found) + [s.stop for s in found[:-1]], [s.stop for s in found], strict=True)
    )
    return "|".join(s.kind[0] * (s.stop - s.start) for s in found)


@pytest.mark.parametrize(
    ("invertible", "policy", "expected"),
    [
        ("++++", Reverse(), "rrrr"),
        ("++++", Reverse(keep_last=1), "rrr|s"),
        ("++++", Reverse(keep_last=4), "ssss"),
        ("++++", Reverse(keep_last=9), "ssss"),
        ("+++++", Reverse(anchor_every=2), "rr|rr|r"),
        ("+++++", Reverse(anchor_every=1), "r|r|r|r|r"),
        ("+++++", Reverse(anchor_every=2, keep_last=2), "rr|r|ss"),
        ("++-++", Reverse(), "rr|s|rr"),
        ("--++-", Reverse(), "ss|rr|s"),
        ("++-++++", Reverse(anchor_every=3), "rr|s|rrr|r"),
        ("++-++", Reverse(keep_last=1), "rr|s|r|s"),
        ("++-", Reverse(keep_last=1), "rr|s"),
        ("+++++", Checkpoint(), "c|c|c|c|c"),
        ("++-++", Checkpoint(2), "cc|cc|c"),
        ("+++", Checkpoint(9), "ccc"),
        ("+-+", StoreAll(), "sss"),
        ("", Reverse(), ""),
        ("", StoreAll(), ""),
        ("", Checkpoint(), ""),
    ],
)
def test_segments(invertible: str, policy: revcore.Policy, expected: str) -> None:
    assert cut(invertible, policy) == expected


def test_segments_are_plain_data() -> None:
    assert segments([True], Reverse()) == (Segment("reverse", 0, 1),)
