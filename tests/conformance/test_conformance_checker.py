"""The checker of the conformance suite fails what it must fail: each of these has gone unnoticed somewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from revcore import Couple, Reverse, StoreAll, reference, revnet
from revcore.parity import EPS, Record, compare
from tests.conformance.backends import Backend, load_backend
from tests.conformance.cases import (
    COUPLINGS,
    STRUCTURES,
    Bound,
    Case,
    case_of,
    loss,
    momentum_pair,
    oracle,
    parted,
    plain,
    reference_forward,
)
from tests.conformance.test_conformance import against_oracle

CASE = plain("momentum", 8, 2)
AUX = next(case for case in STRUCTURES if case.name == "aux")
Gradients = dict[str, np.ndarray]


def with_gradients(gradients: Mapping[str, Any], case: Case = CASE, dtype: str = "float64") -> Record:
    return dataclasses.replace(oracle(case), gradients=gradients, dtype=dtype)


def changed(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Gradients], Gradients]:
    return lambda gradients: gradients | {name: function(gradients[name].copy())}


def one_nan(array: np.ndarray) -> np.ndarray:
    array.flat[0] = np.nan
    return array


WRONG: dict[str, Callable[[Gradients], Gradients]] = {
    "all zero": lambda gradients: {name: 0 * array for name, array in gradients.items()},
    "one zero": changed("3.b", np.zeros_like),
    "all missing": lambda gradients: {},
    "one missing": lambda gradients: {name: array for name, array in gradients.items() if name != "3.b"},
    "context missing": lambda gradients: {name: array for name, array in gradients.items() if name != "context"},
    "one too many": lambda gradients: gradients | {"8.b": gradients["3.b"]},
    "all NaN": lambda gradients: {name: np.nan * array for name, array in gradients.items()},
    "one NaN": changed("3.b", one_nan),
    "one infinite": changed("stream.1", lambda a: a / 0),
    "one twice": changed("3.b", lambda a: 2 * a),
    "one of another shape": changed("3.b", lambda a: a[None]),
    "streams swapped": lambda g: g | {"stream.0": g["stream.1"], "stream.1": g["stream.0"]},
    "blocks swapped": lambda g: g | {"2.V": g["3.V"], "3.V": g["2.V"]},
    "all off by 1e-11": lambda gradients: {name: array * (1 + 1e-11) for name, array in gradients.items()},
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_gradients_fail(wrong: Callable[[Gradients], Gradients]) -> None:
    right = dict(oracle(CASE).gradients or {})
    assert against_oracle(with_gradients(right), CASE).ok
    assert not against_oracle(with_gradients(wrong(right)), CASE).ok


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_reversible_against_store_all_is_judged_at_its_tolerance(dtype: str) -> None:
    """Errors in random directions, just below ``16·depth·eps`` of the whole and just above."""
    rng = np.random.default_rng(0)
    right = dict(oracle(CASE).gradients or {})
    noise = {name: rng.standard_normal(array.shape) for name, array in right.items()}
    size, unit = (np.sqrt(sum((a**2).sum() for a in tree.values())) for tree in (right, noise))
    for units, ok in ((14, True), (18, False)):
        scale = units * CASE.depth * EPS[dtype] * size / unit
        off = {name: right[name] + scale * noise[name] for name in right}
        assert compare(with_gradients(off, dtype=dtype), with_gradients(right, dtype=dtype)).ok == ok


# --- gradients that are wrong for a reason ----------------------------------------------------------------------------


def adjoint_by_hand(case: Case, old: bool = False, again: np.ndarray | None = None) -> Gradients:
    """The reversible backward pass of a ``Couple`` network, step by step.

    Args:
        old: as revlib did it, where ``coupling_forward`` served as its own adjoint: a target's gradient passed
            unscaled, the block's was pulled back from it unscaled, and the two met in ``coupling_forward``.
        again: the context of the blocks' second run.
    """
    arrays = case.arrays
    again = arrays["context"] if again is None else again
    blocks = [Bound(block, case.parameters(arrays, i)) for i, block in enumerate(case.blocks)]
    outputs, _ = parted(case.program, reference_forward(case, arrays))
    cotangents: list[Any] = [None] * case.program.num_streams
    current: list[Any] = [None] * case.program.num_streams
    for i, (place, y) in enumerate(zip(case.program.output, outputs, strict=True)):
        current[place], cotangents[place] = y, arrays[f"loss.{i}"] + y
    gradients: Gradients = {"context": np.zeros(case.context)}
    for i, step in reversed(list(enumerate(case.program.unrolled))):
        assert isinstance(step, Couple)
        (source,), target, coupling = step.sources, step.target, step.coupling
        f = blocks[i](current[source], arrays["context"])
        x = coupling.inverse(current[target], f)
        gx, gf = (cotangents[target], cotangents[target]) if old else coupling.vjp(x, f, cotangents[target])
        given = {"p": case.parameters(arrays, i), "source": current[source], "context": again}
        pulled = reference.gradient(
            lambda t, i=i, gf=gf: (gf * case.blocks[i](np, t["p"], t["source"], t["context"])).sum(), given
        )
        gradients |= {f"{i}.{name}": array for name, array in pulled["p"].items()}
        gradients["context"] += pulled["context"]
        met = coupling.forward if old else np.add
        current[target], cotangents[target], cotangents[source] = x, gx, met(cotangents[source], pulled["source"])
    return gradients | {f"stream.{i}": array for i, array in enumerate(cotangents)}


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_the_old_librarys_adjoint_fails(depth: int) -> None:
    case = plain("momentum", depth, 2)
    assert against_oracle(with_gradients(adjoint_by_hand(case, old=False), case), case).ok
    wrong = adjoint_by_hand(case, old=True)
    for dtype in ("float64", "float32"):
        report = against_oracle(with_gradients(wrong, case, dtype), case)
        assert not report.ok
        assert report.gradient_error is not None
        assert report.gradient_error > 0.1


def test_the_old_librarys_adjoint_was_right_for_the_additive_coupling() -> None:
    case = plain("additive", 8, 2)
    assert against_oracle(with_gradients(adjoint_by_hand(case, old=True), case), case).ok


@pytest.mark.parametrize(("beta", "least"), [(0.9, 1e-3), (0.99, 1e-6)])
def test_the_seeds_momentum_pair_fails_in_an_engine_too(backend: Backend, beta: float, least: float) -> None:
    """Nothing stops one from handing it to ``reversible``, so the comparison with store-all must."""
    case = case_of(f"wrong-pair-{beta}", revnet(8, momentum_pair(beta, right=False)))
    report = compare(backend.run(case, Reverse()), backend.run(case, StoreAll()))
    assert not report.ok
    assert report.value_error == 0
    assert report.gradient_error is not None
    assert report.gradient_error > least


def test_a_dropped_aux_gradient_fails() -> None:
    def without_aux(arrays: Any) -> Any:
        return loss(AUX, parted(AUX.program, reference_forward(AUX, arrays))[0], AUX.arrays)

    dropped = reference.gradient(without_aux, AUX.inputs)
    assert not against_oracle(with_gradients(dropped, AUX), AUX).ok


def test_a_block_run_again_with_other_noise_fails() -> None:
    """What a swapped dropout mask does: the second run of a block is not the first. Here the context is the noise."""
    assert against_oracle(with_gradients(adjoint_by_hand(CASE, again=CASE.arrays["context"])), CASE).ok
    assert not against_oracle(with_gradients(adjoint_by_hand(CASE, again=CASE.arrays["context"][::-1])), CASE).ok


@pytest.mark.parametrize("case", [*STRUCTURES, *(plain(name, 8, 2) for name in COUPLINGS)], ids=str)
def test_every_input_has_a_gradient_to_get_wrong(case: Case) -> None:
    gradients = oracle(case).gradients or {}
    assert gradients.keys() == case.inputs.keys()
    assert all(np.linalg.norm(array) > 1e-4 for array in gradients.values())


# --- a backend that is missing ----------------------------------------------------------------------------------------


def test_a_missing_backend_is_an_error_in_ci_and_a_skip_at_home() -> None:
    with pytest.raises(ImportError):
        load_backend("mxnet", {"CI": "true"})
    with pytest.raises(pytest.skip.Exception, match="no mxnet here"):
        load_backend("mxnet", {})
