"""One small model in torch, NNX and Linen, whose attributes have the same names."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402
from torch import nn  # noqa: E402

from revcore_jax import neutral as jax_neutral  # noqa: E402


class TorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Any) -> Any:
        h = self.norm(x)
        return self.gain * self.mlp(self.attn(h, h, h, need_weights=False)[0])


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(4, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.1, deterministic=True, rngs=rngs)
        self.mlp = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), gelu, nnx.Linear(6, 4, rngs=rngs))
        self.gain = nnx.Param(jnp.ones(4))

    def __call__(self, x: Any) -> Any:
        return self.gain * self.mlp(self.attn(self.norm(x)))


class LinenBlock(linen.Module):
    def setup(self) -> None:
        self.norm = linen.LayerNorm(epsilon=1e-5, use_fast_variance=False)
        self.attn = linen.MultiHeadDotProductAttention(2)
        self.mlp = linen.Sequential([linen.Dense(6), gelu, linen.Dense(4)])
        self.gain = self.param("gain", lambda key: jnp.ones(4))

    def __call__(self, x: Any) -> Any:
        return self.gain * self.mlp(self.attn(self.norm(x)))


def gelu(x: Any) -> Any:
    return jax.nn.gelu(x, approximate=False)


class TorchModel(nn.Module):
    """A reversible container is an ``nn.Sequential`` in torch ..."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(TorchBlock(), TorchBlock())
        self.heads = nn.ModuleList([nn.Linear(4, 7), nn.Linear(4, 2)])

    def forward(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.body:
            x = x + block(x)
        return self.heads[0](x)


class NnxBody(nnx.Module):
    """... and keeps its blocks in a list in Flax, which names leave out."""

    neutral_transparent: ClassVar = ("layers",)

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.body = NnxBody(rngs)
        self.heads = nnx.List([nnx.Linear(4, 7, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for block in self.body.layers:
            x = x + block(x)
        return self.heads[0](x)


class LinenBody(linen.Module):
    neutral_transparent: ClassVar = ("layers",)
    layers: Any

    def __call__(self, x: Any) -> Any:
        for block in self.layers:
            x = x + block(x)
        return x


class LinenModel(linen.Module):
    def setup(self) -> None:
        self.embed = linen.Embed(7, 4)
        self.body = LinenBody([LinenBlock(), LinenBlock()])
        self.heads = [linen.Dense(7), linen.Dense(2)]

    def __call__(self, tokens: Any) -> Any:
        x = self.body(self.embed(tokens))
        return self.heads[0](x) + 0 * self.heads[1](x).sum()


RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 7, (2, 5))


def torch_loss(model: nn.Module) -> Any:
    return (model(torch.from_numpy(TOKENS)) ** 2).mean()


def nnx_loss(model: Any) -> Any:
    return (model(TOKENS) ** 2).mean()


@functools.cache
def first_nnx_model() -> NnxModel:
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(first_value, state))


def first_value(shape: Any) -> Any:
    """Return random numbers, without a compilation; keys and counts need not be random."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.asarray(RNG.standard_normal(shape.shape), shape.dtype)


def nnx_model() -> NnxModel:
    return nnx.clone(first_nnx_model())


@nnx.jit
def nnx_gradients(model: NnxModel) -> Any:
    return nnx.grad(nnx_loss)(model)


@functools.cache
def linen_variables() -> tuple[linen.Module, Any, Any]:
    model = LinenModel()
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    variables = jax.tree.map(lambda shape: RNG.standard_normal(shape.shape, np.float32), shapes)
    return model, variables, jax_neutral.linen_layers(model, TOKENS)
