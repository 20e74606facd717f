"""The demo's language model in JAX: a byte-level transformer over two reversible streams, as pure functions.

Parameters are one flat dict by their neutral names (:mod:`revcore.weights`), those of the repeated blocks stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from revcore import weights
from revcore.demo.backend import Dtype
from revcore.demo.config import BETAS, DECAY, EPSILON, HEAD_SIZE, Config, decays
from revcore.errors import SpecError
from revcore.policy import Policy, Reverse
from revcore.program import Program
from revcore_jax.engine import reversible

Params = dict[str, Array]


def layer_norm(p: Params, x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["norm.weight"] + p["norm.bias"]


def attention(p: Params, x: Array) -> Array:
    """Causal self-attention behind a LayerNorm: (batch, time, width) → the same."""
    batch, time, width = x.shape
    qkv = (layer_norm(p, x) @ p["qkv.weight"].T).reshape(batch, time, 3, width // HEAD_SIZE, HEAD_SIZE)
    q, k, v = (qkv[:, :, i] for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_SIZE**-0.5
    scores = jnp.where(jnp.tri(time, dtype=bool), scores, -jnp.inf)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return y.reshape(batch, time, width) @ p["out.weight"].T + p["out.bias"]


def mlp(p: Params, x: Array) -> Array:
    """Two layers behind a LayerNorm: (batch, time, width) → the same."""
    hidden = jax.nn.gelu(layer_norm(p, x) @ p["up.weight"].T + p["up.bias"], approximate=False)
    return hidden @ p["down.weight"].T + p["down.bias"]


def language_model(program: Program, policy: Policy, params: Params, tokens: Array) -> Array:
    """Bytes (batch, time) → logits (batch, time, 256)."""
    x = params["embedding.weight"][tokens] + params["position.weight"][: tokens.shape[1]]
    blocks = [attention, mlp]
    body = [_under(params, f"body.{slot}.") for slot in range(len(blocks))]
    streams = reversible(program, blocks, body, jnp.split(x, 2, axis=-1), policy=policy)
    return layer_norm(params, jnp.concatenate(streams, -1)) @ params["head.weight"].T


def mean_loss(program: Program, policy: Policy, params: Params, tokens: Array) -> Array:
    """The mean cross-entropy of ``tokens`` (batch, time + 1), in nats a byte."""
    log_probs = jax.nn.log_softmax(language_model(program, policy, params, tokens[:, :-1]))
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1).mean()


def _decaying(params: Any) -> dict[str, bool]:
    return {name: decays(name) for name in params}


_OPTIMIZER = optax.adamw(1.0, *BETAS, eps=EPSILON, weight_decay=DECAY, mask=_decaying)


class _Functions(NamedTuple):
    """What is compiled for a program and a policy."""

    loss: Any
    gradients: Any
    logits: Any
    train_step: Any

    @staticmethod
    @lru_cache(maxsize=64)  # so that models alike are compiled once
    def of(program: Program, policy: Policy) -> _Functions:
        loss = partial(mean_loss, program, policy)

        def train_step(params: Params, moments: Any, tokens: Array, rate: Array) -> tuple[Params, Any, Array]:
            value, grads = jax.value_and_grad(loss)(params, tokens)
            updates, moments = _OPTIMIZER.update(grads, moments, params)
            # Both of AdamW's terms are proportional to its rate, which is 1 above: rates come as numbers, step by step.
            return jax.tree.map(lambda p, u: p + rate.astype(p.dtype) * u, params, updates), moments, value

        return _Functions(
            jax.jit(loss),
            jax.jit(jax.value_and_grad(loss)),
            jax.jit(partial(language_model, program, policy)),
            jax.jit(train_step, donate_argnums=(0, 1)),
        )


class Model:
    """:class:`revcore.demo.backend.Model` in JAX.

    >>> from revcore.demo.config import first_weights
    >>> config = Config(depth=2, width=16, context=8, batch=1)
    >>> model = Model(config, "cpu")
    >>> model.load({f"weights.{name}": array for name, array in first_weights(config).items()})
    >>> model.logits(np.zeros((1, 8), np.int32)).shape
    (1, 8, 256)
    """

    label: ClassVar[str] = "JAX"
    memory_method: ClassVar[str] = "temporary bytes of the compiled gradient (lax.scan)"

    def __init__(
        self, config: Config, device: str, dtype: Dtype = "float32", policy: Policy = Reverse()  # noqa: B008 - frozen
    ) -> None:  # fmt: skip
        self._config, self._device, self._dtype = config, _device(device), dtype
        self._run = _Functions.of(config.program, policy)
        self._params: Params = {}
        self._moments: Any = None

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        with self._here():
            self._params = self._stacked(_under(state, "weights."))
            self._moments = _OPTIMIZER.init(self._params)
            if "step" in state:
                self._moments = optax.tree_utils.tree_set(
                    self._moments,
                    count=jnp.asarray(state["step"], jnp.int32),
                    mu=self._stacked(_under(state, "first.")),
                    nu=self._stacked(_under(state, "second.")),
                )

    def state(self) -> dict[str, np.ndarray]:
        parts = {
            "weights": self._params,
            "first": optax.tree_utils.tree_get(self._moments, "mu"),
            "second": optax.tree_utils.tree_get(self._moments, "nu"),
        }
        step = np.asarray(optax.tree_utils.tree_get(self._moments, "count"), np.int64)
        return {
            f"{part}.{name}": array for part, tree in parts.items() for name, array in self._apart(tree).items()
        } | {"step": step}

    def train_step(self, tokens: np.ndarray, rate: float) -> float:
        with self._here():
            self._params, self._moments, loss = self._run.train_step(
                self._params, self._moments, tokens, np.float64(rate)
            )
            return float(loss)

    def loss(self, tokens: np.ndarray) -> float:
        with self._here():
            return float(self._run.loss(self._params, tokens))

    def gradients(self, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        with self._here():
            loss, grads = self._run.gradients(self._params, tokens)
            return float(loss), self._apart(grads)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with self._here():
            return np.asarray(self._run.logits(self._params, tokens))

    def activation_bytes(self, tokens: np.ndarray) -> int:
        with self._here():
            # XLA places every buffer before it makes machine code. That code is never run, so it need not be fast.
            quickly = {"xla_backend_optimization_level": 0}
            lowered = self._run.gradients.lower(self._params, tokens)
            memory = lowered.compile(compiler_options=quickly).memory_analysis()
        assert memory is not None  # as on some platforms; not on the CPU
        return memory.temp_size_in_bytes

    def _stacked(self, tensors: Mapping[str, np.ndarray]) -> Params:
        stacked = weights.stack(tensors, self._config.program, "body.")
        return {name: jnp.asarray(array, self._dtype) for name, array in stacked.items()}

    def _apart(self, tree: Mapping[str, Array]) -> dict[str, np.ndarray]:
        return weights.unstack({name: np.asarray(array) for name, array in tree.items()}, self._config.program, "body.")

    def _here(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(jax.default_device(self._device))
        stack.enter_context(jax.enable_x64(self._dtype == "float64"))
        # On GPUs the default would be TensorFloat-32; parity is judged in true float32.
        stack.enter_context(jax.default_matmul_precision("highest"))
        return stack


def _under(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _device(name: str) -> Any:
    if name not in ("cpu", "gpu"):
        raise SpecError(f"device came as {name!r}, expected 'cpu' or 'gpu'")
    try:
        return jax.devices(name)[0]
    except RuntimeError as error:
        raise SpecError(
            f"device came as {name!r}, but JAX {jax.__version__} finds none here: write --device cpu, or "
            "install jax for your GPU: pip install 'jax[cuda13]'"
        ) from error
