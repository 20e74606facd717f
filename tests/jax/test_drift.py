"""Drift in JAX: the warning where a network is differentiated, and the probe against ``check_inverse``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revcore import (
    Anchor,
    Chain,
    Couple,
    Coupling,
    DriftWarning,
    Momentum,
    Program,
    Repeat,
    Reverse,
    SpecError,
    StoreAll,
    bdia,
    momentum_net,
    revnet,
)
from revcore import drift as words
from revcore_jax import Checkpoint, DriftProbe, check_inverse, reversible
from tests.helpers import name_of

WIDTH = 16
DEEP = Program([Repeat(Chain([Couple(0, 1, Momentum(0.5)), Couple(1, 0, Momentum(0.5))]), 16)])


@pytest.fixture(autouse=True)
def never_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_warned", set())


def block(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w)


def arguments(program: Program, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    repeated = isinstance(program.steps[0], Repeat)
    shape = (program.steps[0].n, WIDTH, WIDTH) if repeated else (WIDTH, WIDTH)  # type: ignore[union-attr]
    params = [drawn(*shape) / WIDTH**0.5 for _ in range(program.num_slots)]
    return [block] * program.num_slots, params, [drawn(32, WIDTH) for _ in range(program.num_streams)]


def loss(program: Program, policy: Any, params: Any, streams: Any) -> Any:
    out = reversible(program, [block] * program.num_slots, params, streams, policy=policy)
    return sum((o**2).sum() for o in out)


def caught(function: Any, *args: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        jax.eval_shape(function, *args)
    assert all(issubclass(w.category, DriftWarning) for w in found)
    return [str(w.message) for w in found]


def test_the_warning_comes_once_while_a_gradient_is_traced() -> None:
    _, params, streams = arguments(DEEP)

    def gradient(params: Any, streams: Any) -> Any:
        return jax.grad(loss, 2)(DEEP, Reverse(), params, streams)

    assert caught(lambda p, s: loss(DEEP, Reverse(), p, s), params, streams) == []  # nothing is differentiated
    assert caught(jax.jit(gradient), params, streams) == [words.foresee(DEEP, ["float32"] * 2, Reverse())]
    assert caught(gradient, params, streams) == []
    narrow = [s.astype(jnp.float16) for s in streams]
    assert len(caught(gradient, [p.astype(jnp.float16) for p in params], narrow)) == 1


@pytest.mark.parametrize("policy", [StoreAll(), Checkpoint(), Reverse(anchor_every=4)], ids=name_of)
def test_nothing_is_said_where_nothing_drifts(policy: Any) -> None:
    _, params, streams = arguments(DEEP)
    assert caught(lambda p, s: jax.grad(loss, 2)(DEEP, policy, p, s), params, streams) == []


def test_functions_of_jax_alone_are_predicted_under_jit() -> None:
    shrunk = Coupling.from_functions(
        lambda x, f: jax.lax.mul(x, jnp.full_like(x, 0.5)) + f, lambda y, f: jax.lax.sub(y, f) / 0.5
    )
    program = revnet(40, shrunk)
    _, params, streams = arguments(program)
    assert len(caught(jax.jit(lambda p, s: jax.grad(loss, 2)(program, Reverse(), p, s)), params, streams)) == 1


@pytest.mark.filterwarnings("ignore::revcore.DriftWarning")
def test_the_warning_changes_no_gradient(quick_compilation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    program = revnet(2)
    blocks, params, streams = arguments(program)

    def gradient() -> Any:
        def total(params: Any, streams: Any) -> Any:
            keyed = [lambda w, x, key: block(w, x) * jax.random.bernoulli(key, 0.5, x.shape)] * len(blocks)
            out = reversible(program, keyed, params, streams, jax.random.key(0, impl="rbg"))
            return sum((o**2).sum() for o in out)

        return jax.grad(total, (0, 1))(params, streams)

    expected = gradient()
    monkeypatch.setattr("revcore_jax.drift.foresee", lambda *_: "it drifts")
    for a, b in zip(jax.tree.leaves(gradient()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert words._warned


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(revnet(8), id="revnet"),
        pytest.param(momentum_net(6), id="momentum_net", marks=pytest.mark.long),
        pytest.param(Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), 8)]), id="repeat"),
        pytest.param(Program([Couple(0, 1), Anchor(), Couple(1, 0), Couple(0, 1)]), id="anchor"),
    ],
)
def test_the_probe_tells_what_check_inverse_does(program: Program, quick_compilation: None) -> None:
    blocks, params, streams = arguments(program)
    for i, step in enumerate(s for s in program.unrolled if s.block):
        if isinstance(step, Anchor):
            blocks[i] = lambda w, *s: tuple(jnp.tanh(x @ w) for x in s)
    full = check_inverse(program, blocks, params, streams)
    whole = DriftProbe(program, samples=10_000)(blocks, params, streams)
    assert whole is not None
    assert whole.steps == full.steps
    # one pass is compiled step by step, the other in larger pieces, which may round otherwise
    np.testing.assert_allclose(whole.reconstruction, full.drift, rtol=0.3)
    few = DriftProbe(program, samples=128)(blocks, params, streams)
    assert few is not None
    # of all steps together: where a step drifts by less than one rounding, few of the 128 elements differ at all
    np.testing.assert_allclose(np.linalg.norm(few.reconstruction), np.linalg.norm(whole.reconstruction), rtol=0.3)


def test_only_every_nth_step_is_measured(quick_compilation: None) -> None:
    program = revnet(2)
    given = arguments(program)
    probe = DriftProbe(program, every=3)
    assert [probe(*given) is not None for _ in range(5)] == [True, False, False, True, False]
    assert [at for at, _ in probe.history] == [0, 3]


def test_the_picture(quick_compilation: None, tmp_path: Path) -> None:
    program = revnet(2)
    probe = DriftProbe(program)
    with pytest.raises(SpecError, match="nothing was measured yet, in 0 training steps"):
        probe.picture(tmp_path / "none.png")
    probe(*arguments(program))
    probe.picture(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").stat().st_size > 5_000


def test_what_cannot_be_measured() -> None:
    program = revnet(2)
    blocks, params, streams = arguments(program)
    with pytest.raises(SpecError, match=r"call it outside of jax\.jit"):
        jax.jit(lambda s: DriftProbe(program)(blocks, params, s).A)(streams)  # type: ignore[union-attr]
    with pytest.raises(SpecError, match="an exact program's streams come back to the bit or raise"):
        DriftProbe(bdia(4))
