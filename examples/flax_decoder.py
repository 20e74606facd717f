"""A decoder of the Llama family in Flax NNX, reversible, with the weights of a Hugging Face model.

    python -m examples.flax_decoder
    python -m examples.flax_decoder --checkpoint FOLDER      # a LlamaForCausalLM: is it the same in Flax?

A layer adds ``f(x) = layer(x) − x`` to its input in an ordinary model. Here ``f`` is a block of the program that
``revcore_torch.hf.make_reversible`` takes, such as ``v ← β·v + (1 − β)·f(x)``, ``x ← x + v``: that is
``dataclasses.replace(momentum_net(depth, beta), split="zeros", merge="last")``. What the two examples of this kind
share: ``flax_hf.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from examples import flax_hf_command
from examples.command_line import main
from examples.flax_hf import Attention, Port, body, check
from examples.tasks import CONTEXT, VOCABULARY
from revcore import Policy, Program, SpecError


class MLP(nnx.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202): ``down(silu(gate(x)) · up(x))``."""

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, use_bias=config.mlp_bias, rngs=rngs)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """``f(x) = layer(x) − x``: what a layer adds to its input."""

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        width, bias = config.hidden_size, config.attention_bias
        self.norm1 = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs)
        self.attention = Attention(
            width, config.num_attention_heads, config.num_key_value_heads, config.head_dim, bias, bias, rngs
        )
        self.norm2 = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array) -> jax.Array:
        change = self.attention(self.norm1(x), mask, partial(rotated, cos=cos, sin=sin))
        return change + self.mlp(self.norm2(x + change))


def rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each pair ``(x_i, x_{i + size/2})`` of (batch, time, heads, size) by an angle of its position's.

    RoFormer (Su et al., arXiv 2104.09864), with its pairs as Hugging Face has them; ``cos`` and ``sin`` (time, size).
    """
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos[:, None] + jnp.concatenate([-second, first], -1) * sin[:, None]


class Decoder(nnx.Module):
    """Tokens (batch, time) → logits (batch, time, vocabulary).

    Args:
        config: of a ``LlamaForCausalLM``.
        program: what its layers are run by.
        policy: what their backward pass keeps.
        rngs: random numbers for the first weights.
    """

    def __init__(self, config: Any, program: Program, policy: Policy, rngs: nnx.Rngs) -> None:
        check(config, hidden_act="silu", attention_dropout=0.0)
        self.rotary = _rotary(config)
        self.embedding = nnx.Embed(config.vocab_size, config.hidden_size, promote_dtype=_unchanged, rngs=rngs)
        self.body = body(program, policy, lambda: Layer(config, rngs))
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Return the logits; ``mask`` (batch, time) is true where a token is none of the padding."""
        x = self.embedding(tokens)
        time = tokens.shape[1]
        frequencies, scale = self.rotary
        wide = jnp.promote_types(x.dtype, jnp.float32)
        angles = jnp.arange(time, dtype=wide)[:, None] * jnp.array([*frequencies, *frequencies], wide)
        cos, sin = ((scale * f(angles)).astype(x.dtype) for f in (jnp.cos, jnp.sin))
        seen = jnp.tril(jnp.ones((time, time), bool))[None, None]
        if mask is not None:
            seen &= mask[:, None, None, :].astype(bool)
        x = self.norm(self.body(x, cos, sin, seen))
        return self.embedding.attend(x) if self.tied else self.head(x)


def _unchanged(arrays: Any, **_: Any) -> Any:
    """Leave dtypes alone: ``nnx.Embed`` would go on in that of its first weights, whatever came in their place."""
    return arrays


def _rotary(config: Any) -> tuple[tuple[float, ...], float]:
    """Return the angles by which one position is turned, and the scale of cosines and sines, as Hugging Face has them.

    So every way to stretch them that is fixed beforehand comes along (``"llama3"``, ``"linear"``, ``"yarn"``).
    """
    kind = config.rope_parameters["rope_type"]
    if kind in ("dynamic", "longrope"):
        raise SpecError(f"rope_type came as {kind!r}, whose angles change with the length of a sentence: not supported")
    made = LlamaRotaryEmbedding(config)
    return tuple(made.inv_freq.tolist()), float(made.attention_scaling)


# --- the Hugging Face side --------------------------------------------------------------------------------------------


def names(config: Any) -> Mapping[str, str]:
    """Return the names above for those of ``LlamaForCausalLM``."""
    return {
        **({"lm_head": "embedding"} if config.tie_word_embeddings else {"model.embed_tokens": "embedding"}),
        **({} if config.tie_word_embeddings else {"lm_head": "head"}),
        "model.norm": "norm",
        "model.layers.*.input_layernorm": "body.*.norm1",
        "model.layers.*.self_attn.q_proj": "body.*.attention.query",
        "model.layers.*.self_attn.k_proj": "body.*.attention.key",
        "model.layers.*.self_attn.v_proj": "body.*.attention.value",
        "model.layers.*.self_attn.o_proj": "body.*.attention.out",
        "model.layers.*.post_attention_layernorm": "body.*.norm2",
        "model.layers.*.mlp.gate_proj": "body.*.mlp.gate",
        "model.layers.*.mlp.up_proj": "body.*.mlp.up",
        "model.layers.*.mlp.down_proj": "body.*.mlp.down",
    }


def widened(model: Any) -> Any:
    """Return a copy that computes in float64 all through: its norms and angles are float32 whatever the weights are."""
    model = copy.deepcopy(model).double()
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif isinstance(child, LlamaRotaryEmbedding):
                setattr(module, name, _Rotary(child))
    return model


class _Rotary(torch.nn.Module):
    """Cosines and sines of Hugging Face's angles, in float64."""

    inv_freq: torch.Tensor

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.scale = original.attention_scaling
        self.register_buffer("inv_freq", original.inv_freq.double(), persistent=False)

    def forward(self, _: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None] * torch.cat([self.inv_freq, self.inv_freq])
        return self.scale * angles.cos(), self.scale * angles.sin()


def small(depth: int) -> LlamaConfig:
    """Return the configuration of a model of bytes, with two heads of keys and values for four of queries."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )


def _inputs(tokens: np.ndarray) -> dict[str, Any]:
    return {"input_ids": torch.from_numpy(tokens).long(), "use_cache": False}


def _batch(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return sentences of random tokens, and the token after each; no padding, whose embedding torch does not train."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size - 1, (4, min(33, config.max_position_embeddings)))
    if config.pad_token_id is not None:
        tokens += tokens >= config.pad_token_id
    tokens = tokens.astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


PORT = Port(
    task="text",
    architecture=LlamaForCausalLM,
    config=small,
    module=Decoder,
    names=names,
    widened=widened,
    inputs=_inputs,
    batch=_batch,
    fits=lambda config: config.vocab_size == VOCABULARY,
)

app = flax_hf_command.app(PORT)

if __name__ == "__main__":
    main(app)
