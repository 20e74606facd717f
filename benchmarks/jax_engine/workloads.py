"""What is run: pairs of residual blocks as pure functions ``block(params, x)``, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Block = Callable[[Any, jax.Array], jax.Array]
Pair = tuple[Any, Any]  # the parameters of the two blocks of a pair


@dataclass(frozen=True)
class Workload:
    """Two streams that change each other in turns: ``a += blocks[0](p, b)``, then ``b += blocks[1](q, a)``.

    Attributes:
        name: what it is called on the command line.
        blocks: the two of a pair.
        weights: the shapes of their parameters; matrices are drawn, vectors are ones.
        shape: of one stream.
        tokens: what throughput is counted in, for one step.
    """

    name: str
    blocks: tuple[Block, Block]
    weights: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]
    shape: tuple[int, ...]
    tokens: int

    def params(self, depth: int, dtype: Any = np.float32) -> list[Pair]:
        """Return the weights of ``depth`` pairs, the same each time."""
        draw = np.random.default_rng(0)

        def make(shape: tuple[int, ...]) -> jax.Array:
            if len(shape) == 1:
                return jnp.ones(shape, dtype)
            return jnp.asarray(draw.standard_normal(shape, np.float32) * (0.3 / shape[0] ** 0.5), dtype)

        one, two = self.weights
        return [({k: make(s) for k, s in one.items()}, {k: make(s) for k, s in two.items()}) for _ in range(depth)]

    def streams(self, dtype: Any = np.float32) -> tuple[jax.Array, jax.Array]:
        """Return the two streams, the same each time."""
        a, b = np.random.default_rng(1).standard_normal((2, *self.shape), np.float32)
        return jnp.asarray(a, dtype), jnp.asarray(b, dtype)

    @property
    def stream_bytes(self) -> int:
        """S, the unit of memory: the bytes of one stream in float32."""
        return 4 * int(np.prod(self.shape))


def tanh(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"])


def norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return scale * x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def attention(heads: int) -> Block:
    """Self-attention behind a layer norm: (batch, time, width) → the same."""

    def block(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split((norm(p["norm"], x) @ p["qkv"]).reshape(*x.shape[:2], heads, -1), 3, -1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return mixed.reshape(x.shape) @ p["out"]

    return block


def feed_forward(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(norm(p["norm"], x) @ p["up"]) @ p["down"]


def workloads(quick: bool = False) -> dict[str, Workload]:
    """Return all workloads by name; ``quick`` ones have the same parts and next to no size."""
    rows, wide, batch, time, model = (16, 8, 2, 8, 16) if quick else (2048, 256, 4, 256, 256)
    transformer = (
        {"norm": (model,), "qkv": (model, 3 * model), "out": (model, model)},
        {"norm": (model,), "up": (model, 4 * model), "down": (4 * model, model)},
    )
    made = (
        Workload("mlp", (tanh, tanh), ({"w": (wide, wide)}, {"w": (wide, wide)}), (rows, wide), rows),
        Workload("transformer", (attention(4), feed_forward), transformer, (batch, time, model), batch * time),
    )
    return {workload.name: workload for workload in made}
