"""Reversible networks in Flax Linen, trained on real data with optax and Orbax.

    python -m examples.flax_linen --task digits
    python -m examples.flax_linen --task text --checkpoint-dir run     # and, after Ctrl-C, again with --resume

``Digits`` is the plain form: blocks in a list. ``Text`` is the form for great depth: equal blocks over stacked
variables, run by a scan, so that compile time does not grow with depth either. Data: ``tasks.py``. Loop and
checkpoints: ``training.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from examples import training
from examples.tasks import CONTEXT, VOCABULARY, Task
from revcore import Chain, Couple, Policy, Program, Repeat
from revcore_jax.linen import ReversibleSequential

CHANNELS = 16  # of each of the two streams
WIDTH = 64


class ConvBlock(nn.Module):
    """A block keeps the shape of its stream. Statistics and dropout masks are those of an ordinary network."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Conv(CHANNELS, (3, 3))(x)


class Digits(nn.Module):
    """Images (batch, 8, 8, 1) → logits (batch, 10)."""

    depth: int
    policy: Policy

    def setup(self) -> None:
        self.stem = nn.Conv(2 * CHANNELS, (3, 3))
        self.body = ReversibleSequential([ConvBlock() for _ in range(self.depth)], policy=self.policy)
        self.norm = nn.BatchNorm(momentum=0.9)
        self.head = nn.Dense(10)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = self.body(self.stem(images), train=train)  # what the body is given beside its input goes to every block
        x = nn.relu(self.norm(x, use_running_average=not train))
        return self.head(x.mean((1, 2)))


class Attention(nn.Module):
    """Causal self-attention behind a LayerNorm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=nn.make_causal_mask(x[..., 0]))


class MLP(nn.Module):
    """Two layers behind a LayerNorm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))


class Text(nn.Module):
    """Bytes (batch, time) → logits (batch, time, 256)."""

    depth: int
    policy: Policy

    def setup(self) -> None:
        self.embedding = nn.Embed(VOCABULARY, 2 * WIDTH)
        self.position = nn.Embed(CONTEXT, 2 * WIDTH)
        # Attention changes stream 0 from stream 1, the MLP stream 1 from stream 0; and that n times, each with
        # weights of its own: their arrays have a first axis of n.
        program = Program([Repeat(Chain([Couple(0, 1), Couple(1, 0)]), self.depth // 2)])
        self.body = ReversibleSequential([Attention(), MLP()], program=program, policy=self.policy)
        self.norm = nn.LayerNorm()
        self.head = nn.Dense(VOCABULARY)

    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        return self.head(self.norm(self.body(x)))


class TrainState(train_state.TrainState):
    """All that training changes; ``variables`` are those that the forward pass changes (BatchNorm's statistics)."""

    variables: Any
    key: jax.Array


@jax.jit
def train_step(state: TrainState, inputs: jax.Array, targets: jax.Array) -> tuple[TrainState, jax.Array]:
    """Train on one batch, and return its loss before that. Nothing here is peculiar to reversible networks."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits, variables = state.apply_fn(
            {"params": params, **state.variables},
            inputs,
            train=True,
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), variables

    (loss, variables), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, variables=variables), loss


@jax.jit
def predict(state: TrainState, inputs: jax.Array) -> jax.Array:
    return state.apply_fn({"params": state.params, **state.variables}, inputs, train=False)


class Learner:
    """What ``training.py`` asks for: a model with its optimizer."""

    label: ClassVar[str] = "Flax Linen"

    def __init__(self, task: Task, depth: int, steps: int, seed: int, policy: Policy) -> None:
        model = Digits(depth, policy) if task.name == "digits" else Text(depth, policy)
        inputs, targets = task.batch(0)
        first, dropout = jax.random.split(jax.random.key(seed))
        variables = jax.jit(model.init, static_argnames="train")(first, inputs, train=False)
        params = variables.pop("params")
        self._state = TrainState.create(
            apply_fn=model.apply,
            params=params,
            tx=training.optimizer(task.rate, steps),
            variables=variables,
            key=dropout,
        )
        # Compiled here and now, for then it can be asked for the memory that it takes.
        self.compiled = train_step.lower(self._state, inputs, targets).compile()

    def train_step(self, inputs: Any, targets: Any) -> jax.Array:
        self._state, loss = self.compiled(self._state, inputs, targets)
        return loss

    def logits(self, inputs: Any) -> jax.Array:
        return predict(self._state, inputs)

    def state(self) -> Any:
        """Return all that training changes: parameters, statistics, dropout's key, the optimizer's moments and step."""
        return self._state

    def load(self, state: Any) -> None:
        self._state = state


app = training.app(Learner)

if __name__ == "__main__":
    training.main(app)
