"""One name, one meaning: what both backends offer takes the same arguments, but for the exceptions listed here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

TORCH, JAX, NNX, LINEN = "revcore_torch", "revcore_jax", "revcore_jax.nnx", "revcore_jax.linen"

# A name on the right takes the place of the one on the left; None: there is none on that side.
EXCEPTIONS: dict[str, dict[str | None, str | None]] = {
    "same": {},
    # torch's blocks hold their parameters; JAX traces a block once, so that no second run could differ
    "function": {None: "params", "determinism_check": None},
    "probe": {},
    "neutral": {None: "layers"},  # Linen's variables do not tell what they belong to
    # random numbers come from keys in JAX
    # and there was no revlib for JAX
    "module": {
        "split_dim": "axis",
        "modules": "blocks",
        "input": "x",
        "output": "y",
        "revlib": None,
        "determinism_check": None,
        None: "rngs",
    },
    # a Linen module is a dataclass, and its Repeat is scanned as nn.scan does it
    "linen": {
        "split_dim": "axis",
        "modules": "layers",
        "input": "x",
        "output": "y",
        "revlib": None,
        "determinism_check": None,
        None: "parent name variable_axes variable_broadcast split_rngs metadata_params",
    },
}
# Each framework's own habit: torch parts channels, Flax features.
OWN_DEFAULTS = {"split_dim", "axis", "layers", "modules"}
PAIRS = [
    (TORCH, "reversible", JAX, "reversible", "function"),
    (TORCH, "inverse", JAX, "inverse", "function"),
    (TORCH, "DriftProbe.__init__", JAX, "DriftProbe.__init__", "probe"),
    (TORCH, "to_neutral", JAX, "to_neutral", "neutral"),
    (TORCH, "from_neutral", JAX, "from_neutral", "neutral"),
    (f"{TORCH}.parity", "record", f"{JAX}.parity", "record", "same"),
    (f"{TORCH}.parity", "parameters", f"{JAX}.parity", "parameters", "same"),
    (f"{TORCH}.parity", "programs", f"{JAX}.parity", "programs", "same"),
    (TORCH, "ReversibleSequential.__init__", NNX, "ReversibleSequential.__init__", "module"),
    (TORCH, "ReversibleSequential.forward", NNX, "ReversibleSequential.__call__", "module"),
    (TORCH, "ReversibleSequential.inverse", NNX, "ReversibleSequential.inverse", "module"),
    (TORCH, "ReversibleSequential.__init__", LINEN, "ReversibleSequential.__init__", "linen"),
    (TORCH, "ReversibleSequential.forward", LINEN, "ReversibleSequential.__call__", "linen"),
    (TORCH, "ReversibleSequential.inverse", LINEN, "ReversibleSequential.inverse", "linen"),
]


def parameters(module: str, name: str) -> dict[str, inspect.Parameter]:
    owner: Any = importlib.import_module(module)
    for part in name.split("."):
        owner = getattr(owner, part)
    return dict(inspect.signature(owner).parameters)


def differences(left: dict[str, Any], right: dict[str, Any], exceptions: dict[str | None, str | None]) -> list[str]:
    """Say in which arguments two signatures differ."""
    names = {name: exceptions.get(name, name) for name in left}
    renamed = {name: left[old] for old, name in names.items() if name is not None}
    extra = set((exceptions.get(None) or "").split())
    found = [f"only in torch: {name}" for name in renamed if name not in right]
    found += [f"only in JAX: {name}" for name in right if name not in renamed and name not in extra]
    for name in renamed.keys() & right.keys() - OWN_DEFAULTS:
        a, b = renamed[name], right[name]
        if a.default != b.default:
            found.append(f"{name} defaults to {a.default!r} and {b.default!r}")
        starred = (a.kind, b.kind)
        if a.kind != b.kind and any(kind in starred for kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD)):
            found.append(f"{name} is {a.kind.description} and {b.kind.description}")
    if [
        name for name in renamed if name in right and renamed[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
    ] != [name for name in right if name in renamed and renamed[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]:
        found.append("the order of arguments")
    return found


@pytest.mark.parametrize(("left", "a", "right", "b", "kind"), PAIRS, ids=lambda value: value if "." in value else None)
def test_same_name_same_arguments(left: str, a: str, right: str, b: str, kind: str) -> None:
    assert differences(parameters(left, a), parameters(right, b), EXCEPTIONS[kind]) == []


@pytest.mark.parametrize(
    "other",
    [
        lambda program, streams, *args, policy=None: ...,
        lambda program, streams, *args, policy=1, more=2: ...,
        lambda streams, program, *args, policy=1: ...,
        lambda program, streams, args, policy=1: ...,
        lambda program, *args, policy=1: ...,
    ],
)
def test_the_test_above_would_notice(other: Callable[..., Any]) -> None:
    def function(program: Any, streams: Any, *args: Any, policy: Any = 1) -> None: ...

    one, two = (dict(inspect.signature(f).parameters) for f in (function, other))
    assert differences(one, one, {}) == []
    assert differences(one, two, {}) != []


def test_names_that_both_offer() -> None:
    torch, jax = (importlib.import_module(name) for name in (TORCH, JAX))
    both = set(torch.__all__) & set(jax.__all__)
    assert both >= {
        "reversible",
        "inverse",
        "check_inverse",
        "DriftProbe",
        "to_neutral",
        "from_neutral",
        "Reverse",
        "StoreAll",
        "Checkpoint",
    }
    for policy in ("Reverse", "StoreAll", "Checkpoint"):
        assert getattr(torch, policy) is getattr(jax, policy)
