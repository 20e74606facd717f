"""Reversible networks in Flax NNX, trained on real data with optax and Orbax.

    python -m examples.flax_nnx --task digits
    python -m examples.flax_nnx --task text --checkpoint-dir run     # and, after Ctrl-C, again with --resume

``Digits`` is the plain form: blocks in a list. ``Text`` is the form for great depth: equal blocks stacked, run by a
scan, so that compile time does not grow with depth either. Data: ``tasks.py``. Loop and checkpoints: ``training.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples import training
from examples.tasks import CONTEXT, VOCABULARY, Task
from revcore import Chain, Couple, Policy, Program, Repeat
from revcore_jax.nnx import ReversibleSequential, stack

CHANNELS = 16  # of each of the two streams
WIDTH = 64


class ConvBlock(nnx.Module):
    """A block keeps the shape of its stream. Statistics and dropout masks are those of an ordinary network."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(CHANNELS, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.dropout(nnx.relu(self.norm(x))))


class Digits(nnx.Module):
    """Images (batch, 8, 8, 1) → logits (batch, 10)."""

    def __init__(self, depth: int, policy: Policy, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 2 * CHANNELS, (3, 3), rngs=rngs)
        blocks = [ConvBlock(rngs) for _ in range(depth)]
        self.body = ReversibleSequential(*blocks, policy=policy)  # was: nnx.Sequential(*blocks)
        self.norm = nnx.BatchNorm(2 * CHANNELS, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(2 * CHANNELS, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.body(self.stem(images))))
        return self.head(x.mean((1, 2)))


class Attention(nnx.Module):
    """Causal self-attention behind a LayerNorm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))


class MLP(nnx.Module):
    """Two layers behind a LayerNorm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(self.norm(x))))


class Text(nnx.Module):
    """Bytes (batch, time) → logits (batch, time, 256)."""

    def __init__(self, depth: int, policy: Policy, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCABULARY, 2 * WIDTH, rngs=rngs)
        self.position = nnx.Embed(CONTEXT, 2 * WIDTH, rngs=rngs)
        # Attention changes stream 0 from stream 1, the MLP stream 1 from stream 0; and that n times, each with
        # weights of its own.
        n = depth // 2
        program = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), n)])
        blocks = stack([Attention(rngs) for _ in range(n)]), stack([MLP(rngs) for _ in range(n)])
        self.body = ReversibleSequential(*blocks, program=program, policy=policy)
        self.norm = nnx.LayerNorm(2 * WIDTH, rngs=rngs)
        self.head = nnx.Linear(2 * WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        return self.head(self.norm(self.body(x)))


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Train on one batch, and return its loss before that. Nothing here is peculiar to reversible networks."""

    def loss_of(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def predict(model: Any, inputs: jax.Array) -> jax.Array:
    return model(inputs)


class Learner:
    """What ``training.py`` asks for: a model with its optimizer."""

    label: ClassVar[str] = "Flax NNX"

    def __init__(self, task: Task, depth: int, steps: int, seed: int, policy: Policy) -> None:
        rngs = nnx.Rngs(seed)
        self.prepare(Digits(depth, policy, rngs) if task.name == "digits" else Text(depth, policy, rngs), task, steps)

    def prepare(self, model: Any, task: Task, steps: int) -> None:
        """Take a model, and make its optimizer and its training step."""
        self.model = model
        self.optimizer = nnx.Optimizer(self.model, training.optimizer(task.rate, steps), wrt=nnx.Param)
        self.model.train()  # said once before compiling, for modules remember whether it was said
        # Compiled here and now, for then it can be asked for the memory that it takes.
        self.compiled = train_step.lower(self.model, self.optimizer, *task.batch(0)).compile()

    def train_step(self, inputs: Any, targets: Any) -> jax.Array:
        return self.compiled(self.model, self.optimizer, inputs, targets)

    def logits(self, inputs: Any) -> jax.Array:
        self.model.eval()
        result = predict(self.model, inputs)
        self.model.train()
        return result

    def state(self) -> Any:
        """Return all that training changes: parameters, statistics, random state, the optimizer's moments and step."""
        return nnx.state((self.model, self.optimizer))

    def load(self, state: Any) -> None:
        nnx.update((self.model, self.optimizer), state)


app = training.app(Learner)

if __name__ == "__main__":
    training.main(app)
