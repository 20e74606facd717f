"""How a JAX array becomes streams, and streams an array: what the NNX and the Linen module share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from revcore.errors import SpecError
from revcore.sequential import check_axis
from revcore_jax.trees import is_array


def split(x: Any, how: str, num_streams: int, axis: int | None) -> tuple[Any, ...]:
    """Make streams of an array."""
    if not is_array(x):
        raise SpecError(f"the input came as {type(x).__name__}, expected a JAX array")
    if how == "copy":
        return (x,) * num_streams
    if how == "zeros":
        return (*(jnp.zeros_like(x) for _ in range(num_streams - 1)), x)
    assert axis is not None
    check_axis(axis, x.shape, num_streams, "axis")
    return tuple(jnp.split(x, num_streams, axis))


def merge(streams: Sequence[Any], how: str, axis: int | None) -> Any:
    """Make an array of streams."""
    if how == "concat":
        assert axis is not None
        return jnp.concatenate(streams, axis)
    if how == "last":
        return streams[-1]
    total = sum(streams[1:], streams[0])
    return total / len(streams) if how == "mean" else total
