"""Programs as plain data: what a dict says comes back, and what it says wrongly is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from revcore import (
    Additive,
    Affine,
    Anchor,
    Bijection,
    Chain,
    Couple,
    Coupling,
    Momentum,
    Program,
    Repeat,
    SpecError,
    grouped,
    leapfrog,
    momentum_net,
    reversible_columns,
    revnet,
)

MINE = Coupling.from_functions(lambda x, f: f - x, lambda y, f: f - y, name="mine")
MAP = Bijection(lambda a, b: (b, a), lambda a, b: (b, a), name="map")
FUNCTIONS = {"mine": MINE, "map": MAP}

PROGRAMS = {
    "revnet": revnet(5, Momentum(0.9)),
    "revnet of 4 streams": revnet(6, [Additive(0.5), Affine()], num_streams=4),
    "empty": revnet(0),
    "leapfrog": leapfrog(3, h=0.25),
    "momentum_net": momentum_net(3, beta=0.95),
    "drop-in momentum_net": dataclasses.replace(momentum_net(2), split="zeros", merge="last"),
    "grouped": grouped(3, 2),
    "reversible_columns": reversible_columns(2, 3),
    "nested": Program([Chain([Couple(0, 1), Repeat(Chain([Couple(1, 0), Bijection()]), 3)]), Anchor()], split="copy"),
    "bijections": Program([Bijection.permute((1, 0)), Bijection.space_to_depth(2, -1), Couple(0, 1, block=False)]),
    "named functions": Program([Couple(0, 1, MINE), MAP, Couple(1, 0, MINE)], merge="sum"),
}


def through_json(program: Program) -> Program:
    return Program.from_dict(json.loads(json.dumps(program.to_dict(), allow_nan=False)), FUNCTIONS)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_survives_json(program: Program) -> None:
    again = through_json(program)
    assert again == program
    assert hash(again) == hash(program)
    assert again.unrolled == program.unrolled
    assert again.to_dict() == program.to_dict()


def test_equal_programs_only() -> None:
    assert len(set(PROGRAMS.values())) == len(PROGRAMS)
    assert revnet(4) == revnet(4) != revnet(4, Additive(2))


def test_a_program_is_frozen_and_pickles() -> None:
    program = PROGRAMS["nested"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.num_streams = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(program)) == copy.deepcopy(program) == program


def couplings() -> st.SearchStrategy[Coupling]:
    number = st.floats(0.01, 0.99) | st.just(0.9)
    return (
        st.builds(Additive, number | st.integers(1, 5))
        | st.builds(Momentum, number)
        | st.just(Affine())
        | st.just(MINE)
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    n = draw(st.integers(2, 4))
    index = st.integers(0, n - 1)

    @st.composite
    def couples(draw: st.DrawFn) -> Couple:
        target = draw(index)
        others = [i for i in range(n) if i != target]
        sources = draw(st.lists(st.sampled_from(others), min_size=1, unique=True))
        block = draw(st.booleans())
        combine: Any = draw(st.sampled_from(["args", "sum"])) if block else "sum"
        coupling = draw(couplings() if block else st.just(Additive()))
        return Couple(target, sources, coupling, combine, block)

    order = st.permutations(range(n)).map(tuple)
    leaf = couples() | st.builds(Bijection.permute, order) | st.builds(Bijection) | st.builds(Anchor)
    steps = st.recursive(
        leaf,
        lambda inner: st.builds(Chain, st.lists(inner, max_size=3)) | st.builds(Repeat, inner, st.integers(1, 4)),
        max_leaves=8,
    )
    return Program(
        draw(st.lists(steps, max_size=5)),
        n,
        draw(order),
        draw(st.sampled_from(["chunk", "copy", "zeros"])),
        draw(st.sampled_from(["concat", "mean", "sum", "last"])),
        draw(st.booleans()),
    )


@given(programs())
def test_any_program_survives_json(program: Program) -> None:
    again = through_json(program)
    assert again == program
    assert (again.num_blocks, again.num_slots) == (program.num_blocks, program.num_slots)
    assert again.num_slots <= again.num_blocks <= len(again.unrolled)


@given(programs(), st.data())
def test_damaged_data_is_refused_or_means_something_else(program: Program, data: st.DataObject) -> None:
    """Whatever one changes, loading either says so or returns a sound program; it never fails in another way."""
    tree = program.to_dict()
    node: Any = tree
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(
        st.none() | st.booleans() | st.integers(-2, 9) | st.text(max_size=3) | st.just({}) | st.just([])
    )
    try:
        again = Program.from_dict(tree, FUNCTIONS)
    except SpecError:
        return
    assert Program.from_dict(again.to_dict(), FUNCTIONS) == again


def data_of(**changes: Any) -> dict[str, Any]:
    return {**revnet(1).to_dict(), **changes}


def without(*path: Any) -> dict[str, Any]:
    """A sound program's data with one field gone."""
    data = copy.deepcopy(revnet(1).to_dict())
    *parents, key = path
    node: Any = data
    for parent in parents:
        node = node[parent]
    del node[key]
    return data


def with_field(value: Any, *path: Any) -> dict[str, Any]:
    data = copy.deepcopy(revnet(1).to_dict())
    *parents, key = path
    node: Any = data
    for parent in parents:
        node = node[parent]
    node[key] = value
    return data


COUPLING = ("steps", 0, "coupling")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "came a list, expected the dict that to_dict"),
        ("{}", "came a str, expected the dict that to_dict"),
        ({}, "came format None version None, expected 'revcore.Program' version 1"),
        (data_of(format="other"), "came format 'other' version 1, expected 'revcore.Program' version 1"),
        (data_of(version=2), "version 2, expected 'revcore.Program' version 1"),
        (data_of(version="1"), "version '1', expected 'revcore.Program' version 1"),
        (data_of(colour=1), "Program: unknown field 'colour'; Program has format, version, steps"),
        (without("steps"), "Program: missing field 'steps'; Program has"),
        (without("merge"), "Program: missing field 'merge'"),
        (without("steps", 0, "kind"), "unknown kind None, expected one of Couple, Bijection"),
        (without("steps", 0, "target"), "Couple: missing field 'target'; Couple has kind, target, sources"),
        (with_field(1, "steps", 0, "width"), "Couple: unknown field 'width'; Couple has"),
        (with_field("Pair", "steps", 0, "kind"), "unknown kind 'Pair', expected one of Couple"),
        (with_field(["Couple"], "steps", 0, "kind"), r"unknown kind \['Couple'\], expected one of Couple"),
        (with_field(0.5, *COUPLING, "beta"), "Additive: unknown field 'beta'; Additive has kind, scale"),
        (with_field("big", *COUPLING, "scale"), "Additive: scale came as 'big', but must be a finite number"),
        (with_field([1], *COUPLING, "scale"), r"Additive: scale came as \(1,\)"),
        (
            with_field({"kind": "Additive", "scale": 1}, *COUPLING, "scale"),
            r"Additive: scale came as Additive\(scale=1\)",
        ),
        (with_field("Anchor", *COUPLING, "kind"), "Anchor: unknown field 'scale'; Anchor has kind"),
        (
            with_field({"kind": "Anchor"}, *COUPLING),
            r"Couple: coupling came as Anchor\(\), expected a revcore.Coupling",
        ),
        (with_field(None, *COUPLING), "Couple: coupling came as None, expected a revcore.Coupling"),
        (with_field("0", "steps", 0, "target"), "Couple: target came as '0', but streams are counted"),
        (with_field(None, "steps", 0, "sources"), "Couple: cannot be made of"),
        (with_field({"kind": "named"}, *COUPLING), "the program uses None, which is made of code: pass functions"),
        (with_field({"kind": "named", "name": []}, *COUPLING), r"the program uses \[\], which is made of code"),
        (
            with_field({"kind": "named", "name": "a", "b": 1}, *COUPLING),
            "named: unknown field 'b'; what is named has kind",
        ),
        (with_field(1, "steps"), "Program: steps came as 1, expected a sequence of steps"),
        (with_field([7], "steps"), r"Program: step 0 came as 7 \(int\), expected a Couple"),
        (with_field([{"kind": "Additive", "scale": 1.0}], "steps"), r"Program: step 0 came as Additive"),
        (with_field([0, 0], "output"), r"Program: output came as \(0, 0\), expected each of the 2 streams once"),
        (with_field("tear", "split"), "Program: split came as 'tear', expected one of 'chunk', 'copy', 'zeros'"),
        (with_field("max", "merge"), "Program: merge came as 'max', expected one of 'concat'"),
        (with_field(1, "same_shape"), "Program: same_shape came as 1, expected True or False"),
        (with_field(1, "num_streams"), "Program: num_streams came as 1, but a reversible network needs at least 2"),
    ],
)
def test_wrong_data_is_refused_by_name(data: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Program.from_dict(data)


def test_functions_are_found_by_their_name() -> None:
    program = PROGRAMS["named functions"]
    data = program.to_dict()
    assert {"kind": "named", "name": "map"} in data["steps"]
    for functions, missing, came in (
        (None, "mine", "none"),
        ({}, "mine", "none"),
        ({"mine": MINE}, "map", r"\['mine'\]"),
    ):
        message = rf"uses '{missing}', which is made of code: pass functions=\{{'{missing}': ...\}} \(came: {came}\)"
        with pytest.raises(SpecError, match=message):
            Program.from_dict(data, functions)
    with pytest.raises(SpecError, match=r"step 1 came as FunctionCoupling\(.*expected a Couple, Bijection"):
        Program.from_dict(data, {"mine": MINE, "map": MINE})


def test_functions_without_a_name_cannot_be_written() -> None:
    for step in (Couple(0, 1, Coupling.from_functions(max, min)), Bijection(max, min)):
        with pytest.raises(SpecError, match=r"is made of code, which a dict cannot hold: give it a name"):
            Program([step]).to_dict()


class Negated(Coupling):
    def forward(self, x: Any, f: Any) -> Any:
        return f - x

    def inverse(self, y: Any, f: Any) -> Any:
        return f - y


class Doubled(Additive):
    def push(self, f: Any) -> Any:
        return 2 * f


@pytest.mark.parametrize("coupling", [Negated(), Doubled()], ids=["new", "derived from one that can"])
def test_a_coupling_of_ones_own_cannot_be_written_without_a_name(coupling: Coupling) -> None:
    with pytest.raises(SpecError, match="is made of code"):
        revnet(1, coupling).to_dict()


# --- what a program means ---------------------------------------------------------------------------------------------


def test_builders_say_what_the_papers_say() -> None:
    def moves(program: Program) -> list[tuple[int, tuple[int, ...]]]:
        return [(step.target, step.sources) for step in program.unrolled if isinstance(step, Couple)]

    assert moves(revnet(4, num_streams=3)) == [(0, (1,)), (1, (2,)), (2, (0,)), (0, (1,))]
    assert [revnet(d, num_streams=3).output for d in range(4)] == [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 1, 2)]
    assert leapfrog(1, h=0.25).unrolled == (Couple(0, 1, Additive(0.5)),)
    assert momentum_net(1, 0.8).unrolled == (Couple(0, 1, Momentum(0.8)), Couple(1, 0, Additive(), block=False))
    assert moves(grouped(2, 2)) == [(0, (1,)), (1, (0,))] * 2
    assert moves(reversible_columns(2, 3)) == [(0, (1,)), (1, (0, 2)), (2, (1,))] * 2
    assert not reversible_columns(1).same_shape
    cycled = [step.coupling for step in revnet(3, [Additive(), Affine()]).unrolled if isinstance(step, Couple)]
    assert cycled == [Additive(), Affine(), Additive()]


def test_blocks_and_slots_are_counted() -> None:
    step = Repeat(Chain([Couple(0, 1), Repeat(Couple(1, 0), 2), Bijection(), Bijection.permute((1, 0)), Anchor()]), 3)
    program = Program([step, Couple(0, 1, block=False)])
    assert program.num_blocks == 3 * (1 + 2 + 1 + 1)
    assert program.num_slots == 1 + 1 + 1 + 1
    assert len(program.unrolled) == 3 * 6 + 1
