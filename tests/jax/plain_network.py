"""One small network twice: by revcore_jax, and written out by hand without it; and how the two are held together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import revcore_jax
from revcore import Additive, Chain, Couple, Momentum, Program, Repeat, Reverse
from tests.helpers import assert_close, tree_error

D, ROWS, PAIRS = 3, 2, 2
DEPTH = 2 * PAIRS
BETA = 0.8
LAYER = Chain((Couple(0, (1,), Additive()), Couple(1, (0,), Momentum(BETA))))

Kind = Literal["chain", "repeat"]
KINDS: tuple[Kind, ...] = ("chain", "repeat")
PROGRAMS = {"chain": Program((LAYER,) * PAIRS), "repeat": Program((Repeat(LAYER, PAIRS),))}


def mlp(p: Any, x: Any, context: Any = 0.0) -> Any:
    return jnp.tanh(x @ p["w"] + context) @ p["v"]


@dataclass(frozen=True)
class Net:
    """``net(params, streams, *args)`` returns the two streams; parameters as the kind of program takes them."""

    kind: Kind
    ours: bool

    def __call__(
        self,
        params: Any,
        streams: Any,
        *args: Any,
        block: Callable[..., Any] = mlp,
        policy: Any = Reverse(),  # noqa: B008 (frozen)
        layerwise: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        if self.ours:
            return revcore_jax.reversible(
                PROGRAMS[self.kind], [block] * len(params), params, streams, *args,
                layerwise_args_kwargs=layerwise, policy=policy, **kwargs,
            )  # fmt: skip
        a, b = streams
        more = self.pairs(layerwise or self.slots(lambda i: ((), {})))
        for (p, q), ((la, ka), (lb, kb)) in zip(self.pairs(params), more, strict=True):
            a = a + block(p, b, *args, *la, **kwargs, **ka)
            b = BETA * b + (1 - BETA) * block(q, a, *args, *lb, **kwargs, **kb)
        return a, b

    def pairs(self, tree: Any) -> list[tuple[Any, Any]]:
        """Part what is given for all slots into one pair for each layer."""
        if self.kind == "chain":
            return list(zip(tree[::2], tree[1::2], strict=True))
        take = lambda t, i: jax.tree.map(lambda a: a[i] if isinstance(a, jax.Array) else a, t)  # noqa: E731
        return [(take(tree[0], i), take(tree[1], i)) for i in range(PAIRS)]

    def slots(self, make: Callable[[int], Any]) -> list[Any]:
        """Return ``make(i)`` of each of the ``DEPTH`` blocks in the order of running, as this kind takes it."""
        made = [make(i) for i in range(DEPTH)]
        return made if self.kind == "chain" else [stack(made[::2]), stack(made[1::2])]


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a) if isinstance(a[0], jax.Array) else a[0], *trees)


def normal(seed: int, *shape: int, dtype: Any = np.float64) -> jax.Array:
    """Numbers that float32 holds exactly, so that all dtypes compute one function at one place."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32), dtype)


def arrays(kind: Kind, dtype: Any = np.float64, rows: int = ROWS, d: int = D) -> tuple[Any, tuple[Any, Any]]:
    """Return parameters and streams."""
    params = Net(kind, False).slots(
        lambda i: {"w": normal(i, d, d, dtype=dtype) / 2, "v": normal(i + 99, d, d, dtype=dtype) / 2}
    )
    return params, (normal(50, rows, d, dtype=dtype), normal(51, rows, d, dtype=dtype))


def energy(y: Any) -> Any:
    return jnp.sum(jnp.sin(y[0]) * y[1]) + jnp.sum(y[1] * y[1])


def loss(net: Net, **how: Any) -> Callable[..., Any]:
    return lambda params, streams, *args: energy(net(params, streams, *args, **how))


def gradient(net: Net, **how: Any) -> Callable[..., Any]:
    """Value, and gradients of parameters and streams."""
    return jax.value_and_grad(loss(net, **how), argnums=(0, 1))


def assert_equal_networks(got: Any, want: Any, dtype: str = "float64") -> None:
    """Fail unless two trees have one structure and the same numbers: to 1e-12 in float64, to rounding in float32."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    a, b = ([leaf for leaf in jax.tree.leaves(tree) if leaf.size] for tree in (got, want))
    assert [leaf.shape for leaf in a] == [leaf.shape for leaf in b]
    if dtype == "float64":
        assert [leaf.dtype for leaf in a] == [leaf.dtype for leaf in b]
        assert tree_error(a, b) <= 1e-12
    else:
        assert_close(a, b, depth=DEPTH, dtype=dtype)
