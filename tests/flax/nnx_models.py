"""What the NNX tests share: a block in which everything moves, its plain network, and the two ways each test runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from revcore_jax.nnx import ReversibleSequential
from tests.helpers import assert_close, tree_error
from tests.plain.nnx import Plain

D = 4


def linear(rngs: nnx.Rngs, dtype: Any, d: int = D) -> nnx.Linear:
    return nnx.Linear(d, d, param_dtype=dtype, kernel_init=nnx.initializers.normal(0.3), rngs=rngs)


class Block(nnx.Module):
    """Linear, BatchNorm, tanh, Dropout: parameters, statistics, and a random stream of its own."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any, d: int = D) -> None:
        self.first = linear(rngs, dtype, d)
        self.norm = nnx.BatchNorm(d, param_dtype=dtype, rngs=rngs)
        self.norm.mean, self.norm.var = (nnx.BatchStat(f(d, dtype)) for f in (jnp.zeros, jnp.ones))  # else float32
        self.dropout = nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(jnp.tanh(self.norm(self.first(x))))


class Smooth(nnx.Module):
    """Linear and tanh: parameters alone."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any, d: int = D) -> None:
        self.first = linear(rngs, dtype, d)

    def __call__(self, x: Any) -> Any:
        return jnp.tanh(self.first(x))


class Net(nnx.Module):
    """Something before and after, as a trunk has it in a model."""

    def __init__(self, trunk: Any, rngs: nnx.Rngs, dtype: Any) -> None:
        self.embed, self.trunk, self.head = linear(rngs, dtype, 2 * D), trunk, linear(rngs, dtype, 2 * D)

    def __call__(self, x: Any) -> Any:
        return self.head(self.trunk(self.embed(x)))


def blocks(dtype: Any, n: int = 2, kind: Callable[..., Any] = Block) -> list[Any]:
    rngs = nnx.Rngs(0)
    return [kind(rngs, dtype) for _ in range(n)]


def loss(model: Any, x: Any, rngs: Any = None) -> Any:
    return jnp.sum(jnp.sin(model(x) if rngs is None else model(x, rngs=rngs)))


def arrays(tree: Any) -> list[Any]:
    """Return the arrays of a module, state or tree of both, keys as their data."""
    leaves = jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    return [jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in leaves]


@dataclass(frozen=True)
class Mode:
    """One way to run a test: float64 step by step and float32 under jit, each held to its own rounding."""

    dtype: Any
    jit: bool

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return nnx.jit(function) if self.jit else function

    def x(self, *lead: int, d: int = 2 * D, seed: int = 0) -> Any:
        return jnp.asarray(np.random.default_rng(seed).standard_normal((*lead, 6, d)), self.dtype)

    def pair(self, kind: Callable[..., Any] = Block, n: int = 2, **settings: Any) -> tuple[Any, Any]:
        """Return the reversible network and the plain one, of equal blocks."""
        return (
            ReversibleSequential(*blocks(self.dtype, n, kind), **settings),
            Plain(*blocks(self.dtype, n, kind)),
        )

    def nets(self, kind: Callable[..., Any] = Block) -> list[Net]:
        return [Net(trunk, nnx.Rngs(7), self.dtype) for trunk in self.pair(kind)]

    def same(self, got: Any, want: Any, depth: int = 4) -> None:
        """Fail unless two trees agree: 1e-12 in float64, 16·depth·eps in float32; keys and counts exactly."""
        got, want = arrays(got), arrays(want)
        assert [a.dtype for a in got] == [a.dtype for a in want]
        whole = [jnp.issubdtype(a.dtype, jnp.integer) for a in got]
        assert all(np.array_equal(a, b) for a, b, i in zip(got, want, whole, strict=True) if i)
        got, want = ([a for a, i in zip(t, whole, strict=True) if not i] for t in (got, want))
        if not got:
            return
        if self.dtype == jnp.float64:
            assert tree_error(got, want) <= 1e-12
        else:
            assert_close(got, want, depth=depth, dtype="float32")

    def same_run(self, models: Sequence[Any], run: Callable[[Any], Any]) -> Any:
        """Fail unless ``run`` returns the same for both models and leaves the same state in them."""
        run = self.compiled(run)
        got, want = (run(model) for model in models)
        self.same(got, want)
        self.same(models[0], models[1])
        return got


def _modes(fast: str) -> pytest.MarkDecorator:
    both = {"float64": Mode(jnp.float64, jit=False), "float32-jit": Mode(jnp.float32, jit=True)}
    return pytest.mark.parametrize(
        "mode",
        [pytest.param(mode, id=name, marks=() if name == fast else pytest.mark.long) for name, mode in both.items()],
    )


# Both ways, of which one is in the fast tier: under jit, where a trace must hold and little is compiled; or step by
# step, where variables and random counts must be the caller's own objects and change at once.
modes = _modes("float32-jit")
step_by_step = _modes("float64")
