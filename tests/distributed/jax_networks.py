"""One small transformer in Flax NNX, reversible or written out by hand, and its training on any mesh of devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import revcore_jax
from revcore import Chain, Couple, Policy, Program, Repeat, Reverse

WIDTH, HEADS, VOCABULARY, TIME = 8, 4, 16, 6
ROWS, STEPS = 8, 5
PAIR = Couple(0, 1), Couple(1, 0)


class Attention(nnx.Module):
    """Causal self-attention behind a LayerNorm: (batch, time, width) → the same. (Flax's own has a float32 softmax.)"""

    def __init__(self, p: float, dtype: Any, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, WIDTH, WIDTH, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, param_dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = linear(), linear(), linear(), linear()
        self.drop = nnx.Dropout(p, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        q, k, v = (f(x).reshape(*x.shape[:-1], HEADS, -1) for f in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9))
        return self.drop(self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)))


class MLP(nnx.Module):
    """Two linear layers behind a LayerNorm: (batch, time, width) → the same."""

    def __init__(self, p: float, dtype: Any, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, param_dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, param_dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(p, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.drop(self.down(nnx.gelu(self.up(self.norm(x)))))


class Plain(nnx.Module):
    """The additive network in Flax alone, layer by layer, over the same stacked modules."""

    def __init__(self, *layers: Any) -> None:
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        (graph, attention), (other, mlp) = map(nnx.split, self.layers)
        after: list[Any] = []
        x0, x1 = jnp.split(x, 2, -1)
        for i in range(len(jax.tree.leaves(attention)[0])):
            first, second = (
                nnx.merge(g, jax.tree.map(lambda a, i=i: a[i], s)) for g, s in ((graph, attention), (other, mlp))
            )
            x0 = x0 + first(x1)
            x1 = x1 + second(x0)
            after.append((nnx.state(first), nnx.state(second)))
        for layer, states in zip(self.layers, zip(*after, strict=True), strict=True):  # the counts of random numbers
            nnx.update(layer, jax.tree.map(lambda *a: jnp.stack(a), *states))
        return jnp.concatenate([x0, x1], -1)


class Transformer(nnx.Module):
    """Tokens (batch, time) → logits (batch, time, vocabulary); ``depth`` pairs of attention and MLP.

    Without a policy it is the network written out by hand, which keeps everything.
    """

    def __init__(self, depth: int, policy: Policy | None = None, p: float = 0.0, dtype: Any = jnp.float64) -> None:
        rngs = nnx.Rngs(0)
        layers = [revcore_jax.nnx.stack([kind(p, dtype, rngs) for _ in range(depth)]) for kind in (Attention, MLP)]
        program = Program([Repeat(Chain(PAIR), depth)])
        self.embedding = nnx.Embed(VOCABULARY, 2 * WIDTH, param_dtype=dtype, rngs=rngs)
        self.blocks = (
            Plain(*layers)
            if policy is None
            else revcore_jax.nnx.ReversibleSequential(*layers, program=program, policy=policy)
        )
        self.norm = nnx.LayerNorm(2 * WIDTH, param_dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(2 * WIDTH, VOCABULARY, param_dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


# --- where arrays lie -------------------------------------------------------------------------------------------------

_AXES: Mapping[str, tuple[str | None, ...]] = {  # of a kernel's own axes; one before them is that of the layers
    "query": ("data", "tensor"),
    "key": ("data", "tensor"),
    "value": ("data", "tensor"),
    "out": ("tensor", "data"),
    "up": ("data", "tensor"),
    "down": ("tensor", "data"),
}


@dataclass(frozen=True)
class Layout:
    """A mesh of ``data`` × ``tensor`` devices, and which of the two axes parameters are cut along.

    ``across`` lays the tensor axis, not the data axis, across processes; ``local`` takes devices of this process alone.
    """

    data: int = 1
    tensor: int = 1
    cut: frozenset[str] = frozenset()
    across: bool = False
    local: bool = False

    @property
    def mesh(self) -> jax.sharding.Mesh:
        devices = np.array((jax.local_devices() if self.local else jax.devices())[: self.data * self.tensor])
        if self.across:
            return jax.sharding.Mesh(devices.reshape(self.tensor, self.data).T, ("data", "tensor"))
        return jax.sharding.Mesh(devices.reshape(self.data, self.tensor), ("data", "tensor"))

    def of(self, tree: Any) -> Any:
        """Return the sharding of each leaf of a state, by the name of its module; moments lie as their parameters."""

        def place(path: Any, leaf: Any) -> NamedSharding:
            names = jax.tree_util.keystr(path)
            axes = next((a for name, a in _AXES.items() if f"'{name}'" in names and "'kernel'" in names), ())
            kept = [axis if axis in self.cut else None for axis in axes]
            return NamedSharding(self.mesh, P(*[None] * (len(leaf.shape) - len(kept)), *kept))

        return jax.tree_util.tree_map_with_path(place, tree)

    def whole(self, tree: Any) -> Any:
        """Return a tree as NumPy arrays, wherever its parts lie."""
        everywhere = NamedSharding(self.mesh, P())
        gathered = jax.jit(lambda t: t, out_shardings=everywhere)(tree)
        return jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), gathered)


# --- training ---------------------------------------------------------------------------------------------------------


def batches(steps: int = STEPS) -> list[np.ndarray]:
    """Return whole batches of tokens, (rows, time + 1) each: equal in every process."""
    return [np.random.default_rng([2, i]).integers(0, VOCABULARY, (ROWS, TIME + 1), np.int32) for i in range(steps)]


def loss_of(graph: Any, params: Any, rest: Any, tokens: Any) -> tuple[Any, Any]:
    """Return the mean cross-entropy, and what else the model holds afterwards (counts of random numbers)."""
    model = nnx.merge(graph, params, rest, copy=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:])
    return losses.mean(), nnx.split(model, nnx.Param, ...)[2]


class Training:
    """A transformer and AdamW on a layout: nothing here knows that anything is reversible.

    (``eps`` is large enough that no step divides one rounding error by another.)
    """

    def __init__(self, layout: Layout, make: Callable[[], Any]) -> None:
        self.layout, optimizer = layout, optax.adamw(1e-2, eps=1e-4)
        self.graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
        moments = jax.eval_shape(optimizer.init, params)

        def step(state: Any, tokens: Any) -> Any:
            params, rest, moments = state
            gradient = jax.value_and_grad(loss_of, argnums=1, has_aux=True)
            (loss, rest), grads = gradient(self.graph, params, rest, tokens)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), rest, moments), loss, grads

        places = layout.of((params, rest, moments))
        rng = np.random.default_rng(1)
        filled = jax.tree.map(lambda a: rng.uniform(-0.5, 0.5, a.shape).astype(a.dtype), params)
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), moments)
        self.state = jax.tree.map(_put, (filled, jax.tree.map(_begun, rest), zeros), places)
        self.rows = NamedSharding(layout.mesh, P("data"))
        self.step = jax.jit(step, out_shardings=(places, NamedSharding(layout.mesh, P()), places[0]))

    def batch(self, tokens: np.ndarray) -> jax.Array:
        return _put(tokens, self.rows)

    def run(self, data: Sequence[np.ndarray]) -> dict[str, Any]:
        """Train; return losses, the first gradients, and the parameters afterwards."""
        losses, first = [], None
        for tokens in data:
            self.state, loss, grads = self.step(self.state, self.batch(tokens))
            losses.append(float(loss))
            first = first or self.layout.whole(jax.tree.leaves(grads))
        assert losses[0] != losses[-1]
        return {"losses": losses, "gradients": first, "parameters": self.layout.whole(jax.tree.leaves(self.state[0]))}


def _begun(shape: Any) -> Any:
    """Return the keys and counts of random numbers from which a run starts: an own key for each layer."""
    if not jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return np.zeros(shape.shape, shape.dtype)
    return jax.random.split(jax.random.key(3), shape.shape)


def _put(whole: Any, place: NamedSharding) -> jax.Array:
    """Lay an array, equal in all processes, onto devices of all of them."""
    if isinstance(whole, jax.Array):  # of random keys, which NumPy does not have
        data = np.asarray(jax.random.key_data(whole))
        return jax.random.wrap_key_data(_put(data, NamedSharding(place.mesh, P())))
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def train(layout: Layout, policy: Policy | None = Reverse(), p: float = 0.0, depth: int = 2) -> dict[str, Any]:  # noqa: B008
    return Training(layout, lambda: Transformer(depth, policy, p)).run(batches())


@functools.cache
def alone(p: float = 0.0) -> dict[str, Any]:
    """Train the network written out by hand on one device of this process."""
    return train(Layout(local=True), None, p)


def distance(ours: Any, theirs: Any) -> float:
    """Return ``‖a − b‖ / ‖b‖`` over two whole trees of one structure; NaN where anything is NaN."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    assert [np.shape(a) for a, _ in pairs] == [np.shape(b) for _, b in pairs]
    size = sum(np.sum(np.square(b)) for _, b in pairs)
    assert size > 0, "there is nothing to compare"
    return float(np.sqrt(sum(np.sum(np.square(a - b)) for a, b in pairs) / size))


def assert_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any], tolerance: float = 1e-12) -> None:
    """Fail unless losses, gradients and parameters of two trainings are equal to ``tolerance``, each by itself."""
    off = {name: distance(ours[name], theirs[name]) for name in ("losses", "gradients", "parameters")}
    assert all(error <= tolerance for error in off.values()), off
