"""Every layer kind that the neutral form knows, as each library makes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402
from torch import nn  # noqa: E402

F64 = np.float64


@dataclass(frozen=True)
class Case:
    """One layer kind: how each library makes it, and the input in torch's layout."""

    name: str
    torch: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module]
    linen: Callable[[], linen.Module]
    shape: tuple[int, ...]
    channels_second: bool = False
    integer: bool = False


def conv(name: str, n: int, **options: Any) -> Case:
    stride, padding, groups = (options.get(k, d) for k, d in (("stride", 1), ("padding", 0), ("groups", 1)))
    make: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    kernel, flax = (3, 2, 3)[:n], {"strides": (stride,) * n, "padding": [(padding, padding)] * n}
    flax |= {"feature_group_count": groups, "param_dtype": F64}
    return Case(
        name,
        lambda: make(4, 6, kernel, stride=stride, padding=padding, groups=groups),
        lambda rngs: nnx.Conv(4, 6, kernel, rngs=rngs, **flax),
        lambda: linen.Conv(6, kernel, **flax),
        (2, 4, 7, 6, 5)[: n + 2],
        channels_second=True,
    )


def conv_transpose(name: str, stride: int, padding: int, transpose_kernel: bool) -> Case:
    kernel = (3, 4)
    flax: dict[str, Any] = {"strides": (stride, stride), "padding": [(k - 1 - padding,) * 2 for k in kernel]}
    flax |= {"param_dtype": F64, "transpose_kernel": transpose_kernel}
    return Case(
        name,
        lambda: nn.ConvTranspose2d(4, 6, kernel, stride=stride, padding=padding),
        lambda rngs: nnx.ConvTranspose(4, 6, kernel, rngs=rngs, **flax),
        lambda: linen.ConvTranspose(6, kernel, **flax),
        (2, 4, 5, 6),
        channels_second=True,
    )


class TorchAttention(nn.MultiheadAttention):
    def forward(self, x: Any) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def attend(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Plain attention: jax.nn.dot_product_attention computes in float32."""
    weights = jax.nn.softmax(jnp.einsum("...qhd,...khd->...hqk", query, key) / np.sqrt(query.shape[-1]))
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


NORM: dict[str, Any] = {"epsilon": 1e-5, "use_fast_variance": False, "param_dtype": F64}
LAYERS = [
    Case(
        "linear",
        lambda: nn.Linear(5, 3),
        lambda rngs: nnx.Linear(5, 3, param_dtype=F64, rngs=rngs),
        lambda: linen.Dense(3, param_dtype=F64),
        (2, 5),
    ),
    Case(
        "linear without bias",
        lambda: nn.Linear(5, 3, bias=False),
        lambda rngs: nnx.Linear(5, 3, use_bias=False, param_dtype=F64, rngs=rngs),
        lambda: linen.Dense(3, use_bias=False, param_dtype=F64),
        (2, 5),
    ),
    conv("conv1d", 1, stride=2, padding=1),
    conv("conv2d", 2),
    conv("conv2d strided", 2, stride=2, padding=1),
    conv("conv2d grouped", 2, padding=1, groups=2),
    conv("conv3d", 3, padding=1),
    conv_transpose("conv_transpose", 1, 0, False),
    conv_transpose("conv_transpose strided", 2, 1, False),
    conv_transpose("conv_transpose transpose_kernel", 2, 1, True),
    Case(
        "layer_norm",
        lambda: nn.LayerNorm(6),
        lambda rngs: nnx.LayerNorm(6, rngs=rngs, **NORM),
        lambda: linen.LayerNorm(**NORM),
        (2, 3, 6),
    ),
    Case(
        "rms_norm",
        lambda: nn.RMSNorm(6, eps=1e-5),
        lambda rngs: nnx.RMSNorm(6, epsilon=1e-5, param_dtype=F64, rngs=rngs),
        lambda: linen.RMSNorm(epsilon=1e-5, param_dtype=F64),
        (2, 3, 6),
    ),
    Case(
        "group_norm",
        lambda: nn.GroupNorm(2, 6),
        lambda rngs: nnx.GroupNorm(6, num_groups=2, rngs=rngs, **NORM),
        lambda: linen.GroupNorm(2, **NORM),
        (2, 6, 4, 3),
        channels_second=True,
    ),
    Case(
        "instance_norm",
        lambda: nn.InstanceNorm2d(6, affine=True),
        lambda rngs: nnx.InstanceNorm(6, rngs=rngs, **NORM),
        lambda: linen.InstanceNorm(**NORM),
        (2, 6, 4, 3),
        channels_second=True,
    ),
    Case(
        "batch_norm",
        lambda: nn.BatchNorm2d(6).eval(),
        lambda rngs: nnx.BatchNorm(6, use_running_average=True, rngs=rngs, **NORM),
        lambda: linen.BatchNorm(use_running_average=True, **NORM),
        (2, 6, 4, 3),
        channels_second=True,
    ),
    Case(
        "embedding",
        lambda: nn.Embedding(7, 4),
        lambda rngs: nnx.Embed(7, 4, param_dtype=F64, rngs=rngs),
        lambda: linen.Embed(7, 4, param_dtype=F64),
        (2, 5),
        integer=True,
    ),
    Case(
        "prelu",
        lambda: nn.PReLU(),
        lambda rngs: nnx.PReLU(param_dtype=F64),
        lambda: linen.PReLU(param_dtype=F64),
        (2, 3, 6),
    ),
    Case(
        "attention",
        lambda: TorchAttention(6, 2, batch_first=True),
        lambda rngs: nnx.MultiHeadAttention(2, 6, attention_fn=attend, decode=False, param_dtype=F64, rngs=rngs),
        lambda: linen.MultiHeadDotProductAttention(2, attention_fn=attend, param_dtype=F64),
        (2, 5, 6),
    ),
    Case(
        "attention without bias",
        lambda: TorchAttention(6, 2, bias=False, batch_first=True),
        lambda rngs: nnx.MultiHeadAttention(
            2, 6, use_bias=False, attention_fn=attend, decode=False, param_dtype=F64, rngs=rngs
        ),
        lambda: linen.MultiHeadDotProductAttention(2, use_bias=False, attention_fn=attend, param_dtype=F64),
        (2, 5, 6),
    ),
]
