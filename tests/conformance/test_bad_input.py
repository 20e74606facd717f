"""What cannot be right is refused in the same words by every backend: what came, what was expected; and nothing ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from revcore import Affine, Anchor, Bijection, Chain, Couple, Coupling, Program, Repeat, SpecError, revnet
from tests.conformance.backends import Backend

PROGRAM = revnet(2)


class Counted:
    """A block that counts its calls."""

    def __init__(self, function: Callable[..., Any] = lambda x, *_: x) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


# --- found before any block runs --------------------------------------------------------------------------------------

Call = Callable[[Backend, list[Counted]], Any]


def ones(backend: Backend, n: int = 2, dtype: str = "float32", shape: tuple[int, ...] = (2, 3)) -> tuple[Any, ...]:
    return tuple(backend.ones(shape, dtype) for _ in range(n))


BEFORE: dict[str, tuple[Call, str]] = {
    "one stream short": (lambda b, f: b.call(PROGRAM, f, ones(b, 1)), "1 streams came, but the program has 2"),
    "a stream too many": (lambda b, f: b.call(PROGRAM, f, ones(b, 3)), "3 streams came, but the program has 2"),
    "one array": (lambda b, f: b.call(PROGRAM, f, ones(b)[0]), r"streams came as one \w+, expected a tuple of 2 \w+"),
    "a list of numbers": (
        lambda b, f: b.call(PROGRAM, f, (*ones(b, 1), [1.0])),
        "stream 1 came as list, expected a (tensor|JAX array)",
    ),
    "None": (lambda b, f: b.call(PROGRAM, f, (None, *ones(b, 1))), "stream 0 came as NoneType, expected a "),
    "integers": (
        lambda b, f: b.call(PROGRAM, f, ones(b, dtype="int32")),
        r"stream 0 came as a (tensor|JAX array) of (torch\.)?int32, expected a floating-point or complex dtype",
    ),
    "truth values": (
        lambda b, f: b.call(PROGRAM, f, ones(b, dtype="bool")),
        r"stream 0 came as a .* of (torch\.)?bool, ",
    ),
    "unlike shapes": (
        lambda b, f: b.call(PROGRAM, f, (*ones(b, 1), *ones(b, 1, shape=(2, 4)))),
        r"streams came with shapes \(2, 3\), \(2, 4\), expected one shape for all",
    ),
    "a block short": (lambda b, f: b.call(PROGRAM, f[:1], ones(b)), "1 blocks came, but the program takes 2"),
    "a block too many": (lambda b, f: b.call(PROGRAM, f * 2, ones(b)), "4 blocks came, but the program takes 2"),
    "no blocks": (lambda b, f: b.call(PROGRAM, (), ones(b)), "0 blocks came, but the program takes 2"),
    "a block that is none": (
        lambda b, f: b.call(PROGRAM, [f[0], 3], ones(b)),
        r"block 1 came as .*(int|3), expected a ",
    ),
    "policy by name": (
        lambda b, f: b.call(PROGRAM, f, ones(b), policy="reverse"),
        r"policy came as 'reverse' \(str\), expected an instance of Reverse, StoreAll, Checkpoint or MemoryBudget",
    ),
    "no policy": (
        lambda b, f: b.call(PROGRAM, f, ones(b), policy=None),
        r"policy came as None \(NoneType\), expected an",
    ),
    "policy as a class": (
        lambda b, f: b.call(PROGRAM, f, ones(b), policy=b.engine.StoreAll),
        r"policy came as <class .*StoreAll'> \(type\), expected an instance",
    ),
    "a dict": (
        lambda b, f: b.call(PROGRAM.to_dict(), f, ones(b)),
        r"program came as .* \(dict\), expected a revcore.Program: write revnet\(depth\), or Program.from_dict",
    ),
    "a dict with an unknown field": (
        lambda b, f: b.call(Program.from_dict({**PROGRAM.to_dict(), "colour": 1}), f, ones(b)),
        "Program: unknown field 'colour'; Program has format, version, steps",
    ),
    "a coupling without inverse": (
        lambda b, f: b.call(revnet(2, Coupling.from_functions(max, None)), f, ones(b)),  # type: ignore[arg-type]
        "Coupling.from_functions: inverse came as None, but must be a function",
    ),
    "layerwise, one short": (
        lambda b, f: b.call(PROGRAM, f, ones(b), layerwise_args_kwargs=[((), {})]),
        "layerwise_args_kwargs came (as|with) 1 entries, expected .* of (the )?2",
    ),
    "layerwise, no pairs": (
        lambda b, f: b.call(PROGRAM, f, ones(b), layerwise_args_kwargs=[{}, {}]),
        r"layerwise_args_kwargs.* expected .*\(args, kwargs\)",
    ),
    "inverse of integers": (
        lambda b, f: b.undo(PROGRAM, f, ones(b, dtype="int32")),
        r"stream 0 came as a .*int32, expected",
    ),
    "inverse, a stream short": (lambda b, f: b.undo(PROGRAM, f, ones(b, 1)), "1 streams came, but the program has 2"),
    "inverse of an anchor": (
        lambda b, f: b.undo(Program([Couple(0, 1), Anchor()]), f, ones(b)),
        "step 1 is an Anchor, which has no inverse",
    ),
}


@pytest.mark.parametrize(("call", "message"), BEFORE.values(), ids=BEFORE)
def test_refused_before_any_block_runs(backend: Backend, call: Call, message: str) -> None:
    blocks = [Counted(), Counted()]
    with backend.nothing_changes(), pytest.raises(SpecError, match=message):
        call(backend, blocks)
    assert [block.calls for block in blocks] == [0, 0]


# --- found when a block has returned ----------------------------------------------------------------------------------


def _wide(x: Any) -> Any:
    return x.astype("float32") if hasattr(x, "astype") else x.float()


RETURNS: dict[str, tuple[Callable[..., Any], str]] = {
    "another shape": (
        lambda x: x[:, :1],
        r"block 1 returned shape \(2, 1\), but the stream it is coupled with has shape \(2, 3\): a block keeps",
    ),
    "another rank": (
        lambda x: x.sum(),
        r"block 1 returned shape \(\), but the stream it is coupled with has shape \(2, 3\)",
    ),
    "a wider dtype": (
        _wide,
        r"step 1 turned a stream of (torch\.)?float16, shape \(2, 3\), into (torch\.)?float32.*keeps its dtype",
    ),
    "nothing": (lambda x: None, "block 1 returned NoneType, expected a (tensor|JAX array)"),
    "a dict": (lambda x: {"f": x}, "block 1 returned dict, expected a (tensor|JAX array)"),
    "an empty tuple": (lambda x: (), "block 1 returned tuple, expected a (tensor|JAX array)"),
    "text": (lambda x: "f", "block 1 returned str, expected a (tensor|JAX array)"),
}


@pytest.mark.parametrize("policy", ["Reverse", "StoreAll", "Checkpoint"])
@pytest.mark.parametrize(("function", "message"), RETURNS.values(), ids=RETURNS)
def test_a_block_that_returns_something_else(
    backend: Backend, function: Callable[..., Any], message: str, policy: str
) -> None:
    with pytest.raises(SpecError, match=message):
        backend.call(
            PROGRAM,
            [Counted(), Counted(function)],
            ones(backend, dtype="float16"),
            policy=getattr(backend.engine, policy)(),
        )


def test_a_block_that_returns_too_little_for_its_coupling(backend: Backend) -> None:
    for function, came in ((lambda x: x, r"one \w+"), (lambda x: (x,), "a tuple of 1")):
        with pytest.raises(
            SpecError, match=f"Affine takes 2 arrays of its block's output, but the block returned {came}"
        ):
            backend.call(revnet(1, Affine()), [function], ones(backend))


def test_an_anchor_that_returns_too_few_streams(backend: Backend) -> None:
    for function, came in ((lambda a, b: (a,), "1 of them"), (lambda a, b: a, r"\w+")):
        message = rf"step 1 \(Anchor\) must return its 2 streams as a tuple, but returned {came}"
        with pytest.raises(SpecError, match=message):
            backend.call(Program([Couple(0, 1), Anchor()]), [Counted(), function], ones(backend))


# One fault each: the functions of a Bijection, and what is said of it.
LOSING: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "one too many": (lambda a, b: (a, b, a), lambda a, b: (a, b), r"step 1 \(Bijection\) .*, but returned 3 of them"),
    "one too few": (lambda a, b: [a], lambda a, b: (a, b), r"step 1 \(Bijection\) .*, but returned 1 of them"),
    "back, one too many": (
        lambda a, b: (b, a),
        lambda a, b: (b, a, a),
        r"step 1 \(Bijection.inverse\) must return its 2 streams as a tuple, but returned 3 of them: return exactly 2",
    ),
}


@pytest.mark.parametrize(("forward", "inverse", "message"), LOSING.values(), ids=LOSING)
@pytest.mark.parametrize("wrap", [lambda step: step, lambda step: Repeat(Chain([step]), 2)], ids=["alone", "repeated"])
def test_a_bijection_that_loses_streams(
    backend: Backend, forward: Any, inverse: Any, message: str, wrap: Callable[[Any], Any]
) -> None:
    """Already in the forward pass, where the inverse would lose them in the backward pass alone."""
    program = Program([Couple(0, 1), wrap(Bijection(forward, inverse))])
    with pytest.raises(SpecError, match=message):
        backend.call(program, [Counted()], tuple(map(backend.leaf, ones(backend))))


def test_an_inverse_that_loses_streams(backend: Backend) -> None:
    step = Bijection(lambda a, b: (b, a), lambda a, b: (b, a, a))
    program = Program([Couple(0, 1), step])
    assert len(backend.call(program, [Counted()], ones(backend), policy=backend.engine.StoreAll())) == 2
    block = Counted()
    with pytest.raises(SpecError, match=r"\(Bijection.inverse\) must return its 2 streams .* returned 3 of them"):
        backend.undo(program, [block], ones(backend))
    assert block.calls == 0


def test_a_coupling_that_changes_the_shape(backend: Backend) -> None:
    halved = Coupling.from_functions(lambda x, f: (x + f)[:1], lambda y, f: y)
    with pytest.raises(
        SpecError, match=r"step 0 turned a stream of .*float32, shape \(2, 3\), into .*float32, shape \(1, 3\)"
    ):
        backend.call(revnet(1, halved), [Counted()], ones(backend))


def test_the_step_that_is_named_counts_repeats(backend: Backend) -> None:
    """Two steps in a ``Repeat`` of 2, then the one that is wrong: number 4."""
    program = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 2), Couple(0, 1)])
    wrong = Coupling.from_functions(lambda x, f: (x + f)[:1], lambda y, f: y)
    program = Program([*program.steps[:1], Couple(0, 1, wrong)])
    with pytest.raises(SpecError, match="step 4 turned a stream"):
        backend.call(program, [Counted()] * (program.num_blocks if backend.name == "torch" else 3), ones(backend))


# --- the module -------------------------------------------------------------------------------------------------------


MODULE: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "odd split": (
        lambda b, model: model(b.ones((2, 5))),
        r"the input has size 5 along (split_dim 1|axis -1), which does not part into 2 equal streams: use a size",
    ),
    "no such axis": (
        lambda b, model: model(b.ones(())),
        r"(split_dim|axis) is -?1, but the input has shape \(\): give ",
    ),
    "no array": (lambda b, model: model([[1.0, 2.0]]), "the input came as list, expected a (tensor|JAX array)"),
    "integers": (
        lambda b, model: model(b.ones((2, 6), "int32")),
        r"stream 0 came as a .*int32, expected a floating-point",
    ),
    "inverse, odd split": (lambda b, model: model.inverse(b.ones((2, 5))), "the input has size 5 along"),
}


@pytest.mark.parametrize(("call", "message"), MODULE.values(), ids=MODULE)
def test_a_module_refuses_its_input_before_anything_changes(
    backend: Backend, call: Callable[[Any, Any], Any], message: str
) -> None:
    model, state = backend.stateful_module()
    before = state()
    with backend.nothing_changes(), pytest.raises(SpecError, match=message):
        call(backend, model)
    assert state() == before
    model(backend.ones((2, 6)))
    assert state() != before, "the module has no state that could have changed"


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "policy": ({"policy": "reverse"}, r"policy came as 'reverse' \(str\), expected an instance"),
    "program": ({"program": PROGRAM.to_dict()}, r"program came as .* \(dict\), expected a revcore.Program"),
    "one stream": ({"num_streams": 1}, "num_streams came as 1, but must be a whole number of at least 2"),
    "no inverse": ({"coupling_forward": lambda x, f: x + f}, "inverse came as None, but must be a function"),
    "no forward": ({"coupling_inverse": lambda x, f: x + f}, "forward came as None, but must be a function"),
    "both": (
        {"coupling": Affine(), "coupling_forward": max, "coupling_inverse": min},
        "give either coupling, or coupling_forward and coupling_inverse",
    ),
    "program and coupling": (
        {"program": PROGRAM, "coupling": Affine()},
        "give either program, or coupling and num_streams",
    ),
    "coupling by name": ({"coupling": ["additive"]}, "coupling came as 'additive', expected a revcore.Coupling"),
    "unlike lists": (
        {"coupling_forward": [max, max], "coupling_inverse": [min]},
        "2 coupling_forward and 1 coupling_inverse came, expected as many of one as of the other",
    ),
    "the seed's momentum": (
        {
            "coupling_forward": lambda x, f: x * 0.9 + f * (1 - 0.9),
            "coupling_inverse": lambda y, f: y / 0.9 - f * (1 - 0.9),
        },
        r"off by 1\..e-02 of x in float(64|32) .* whose inverse is x = \(y - 0.1·f\) / 0.9",
    ),
}


@pytest.mark.parametrize(("settings", "message"), SETTINGS.values(), ids=SETTINGS)
def test_a_module_refuses_its_settings(backend: Backend, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        backend.module(**settings)
