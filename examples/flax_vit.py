"""A Vision Transformer in Flax NNX, reversible, with the weights of a Hugging Face model.

    python -m examples.flax_vit
    python -m examples.flax_vit --kind revnet
    python -m examples.flax_vit --checkpoint FOLDER      # a ViTForImageClassification: is it the same in Flax?

As ``flax_decoder.py``: a layer's ``f(x) = layer(x) − x`` is a block of the program that
``revcore_torch.hf.make_reversible`` takes. What the two share: ``flax_hf.py``.
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
from transformers import ViTConfig, ViTForImageClassification

from examples import flax_hf_command
from examples.command_line import main
from examples.flax_hf import Attention, Port, body, check
from revcore import Policy, Program


class Layer(nnx.Module):
    """``f(x) = layer(x) − x``: what a layer adds to its input."""

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        width, heads = config.hidden_size, config.num_attention_heads
        norm = partial(nnx.LayerNorm, width, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.norm1, self.norm2 = norm(), norm()
        self.attention = Attention(width, heads, heads, width // heads, config.qkv_bias, True, rngs)
        self.up = nnx.Linear(width, config.intermediate_size, rngs=rngs)
        self.down = nnx.Linear(config.intermediate_size, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        change = self.attention(self.norm1(x))
        return change + self.down(jax.nn.gelu(self.up(self.norm2(x + change)), approximate=False))


class VisionTransformer(nnx.Module):
    """Images (batch, height, width, channels) → logits (batch, classes); ViT (Dosovitskiy et al., arXiv 2010.11929).

    Args:
        config: of a ``ViTForImageClassification``.
        program: what its layers are run by.
        policy: what their backward pass keeps.
        rngs: random numbers for the first weights.
    """

    def __init__(self, config: Any, program: Program, policy: Policy, rngs: nnx.Rngs) -> None:
        check(config, hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        width, patch = config.hidden_size, (config.patch_size,) * 2
        number = (config.image_size // config.patch_size) ** 2
        self.patches = nnx.Conv(config.num_channels, width, patch, strides=patch, padding="VALID", rngs=rngs)
        self.first = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(jnp.zeros((1, number + 1, width)))
        self.body = body(program, policy, lambda: Layer(config, rngs))
        self.norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(width, config.num_labels, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patches(images.astype(self.first.dtype))
        x = x.reshape(len(x), -1, x.shape[-1])
        first = jnp.broadcast_to(self.first[...], (len(x), *self.first.shape[1:]))
        x = self.body(jnp.concatenate([first, x], 1) + self.positions[...])
        return self.head(self.norm(x)[:, 0])


# --- the Hugging Face side --------------------------------------------------------------------------------------------


def names(_: Any) -> Mapping[str, str]:
    """Return the names above for those of ``ViTForImageClassification``."""
    return {
        "vit.embeddings.cls_token": "first",
        "vit.embeddings.position_embeddings": "positions",
        "vit.embeddings.patch_embeddings.projection": "patches",
        "vit.layers.*.layernorm_before": "body.*.norm1",
        "vit.layers.*.attention.q_proj": "body.*.attention.query",
        "vit.layers.*.attention.k_proj": "body.*.attention.key",
        "vit.layers.*.attention.v_proj": "body.*.attention.value",
        "vit.layers.*.attention.o_proj": "body.*.attention.out",
        "vit.layers.*.layernorm_after": "body.*.norm2",
        "vit.layers.*.mlp.fc1": "body.*.up",
        "vit.layers.*.mlp.fc2": "body.*.down",
        "vit.layernorm": "norm",
        "classifier": "head",
    }


def widened(model: Any) -> Any:
    """Return a copy in float64."""
    return copy.deepcopy(model).double()


def small(depth: int) -> ViTConfig:
    """Return the configuration of a model for the digits: 8 × 8 pixels in patches of 2 × 2."""
    config = ViTConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    config.num_labels = 10
    return config


def _inputs(images: np.ndarray) -> dict[str, Any]:
    return {"pixel_values": torch.from_numpy(images).movedim(-1, 1)}


def _batch(config: Any) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, config.image_size, config.image_size, config.num_channels))
    return images, rng.integers(0, config.num_labels, 4).astype(np.int32)


PORT = Port(
    task="digits",
    architecture=ViTForImageClassification,
    config=small,
    module=VisionTransformer,
    names=names,
    widened=widened,
    inputs=_inputs,
    batch=_batch,
    fits=lambda config: (config.image_size, config.num_channels, config.num_labels) == (8, 1, 10),
)

app = flax_hf_command.app(PORT)

if __name__ == "__main__":
    main(app)
